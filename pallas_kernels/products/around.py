"""What stands around the products of a layer, in the same launch.

A layer of a decoder is four products with little in between. Where there are few rows, what is in
between costs a launch and nothing else; so it is done where a product reads its inputs and writes
its results:

    norm ─ product with q, k, v                 norm ─ products with gate and up ─ silu(gate) · up
           product with o ─ + stream                   product with down ─ + stream

Numbers are rounded to the activations' type after each of these, as in the XLA form.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from pallas_kernels.add_rms_norm.xla import rms_norm
from pallas_kernels.collectives.mailboxes import devices_of


class Form(NamedTuple):
    """Which parts there are: what a kernel is specialized to."""

    norm: bool = False
    residual: bool = False
    gated: bool = False
    devices: int = 1

    @property
    def parts(self) -> int:
        """Products that make one result."""
        return 2 if self.gated else 1


PLAIN = Form()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["norm", "residual", "peers"],
    meta_fields=["eps", "gated"],
)
@dataclasses.dataclass(frozen=True)
class Around:
    """What is done before and after products.

    norm      [Kin] weight of the RMS norm of the inputs, or None; eps is added to the mean square
    residual  [..., N] what the one product is added to, or None
    gated     of two products the first one's SiLU times the second
    peers     this device's addresses of others (`collectives.mailboxes`), whose products, of other
              input channels, are added before the residual; or None
    """

    norm: jax.Array | None = None
    eps: float = 0.0
    residual: jax.Array | None = None
    gated: bool = False
    peers: jax.Array | None = None

    @property
    def form(self) -> Form:
        devices = 1 if self.peers is None else devices_of(self.peers.size)
        return Form(self.norm is not None, self.residual is not None, self.gated, devices)

    def operands(
        self, x: jax.Array, weights: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], list[int]]:
        """A kernel's: activations [R, Kin], the norm's weight, the residual, the addresses of
        peers, the products' weights; and the places of the norm's and the products' weights."""
        norm = [] if self.norm is None else [self.norm.astype(x.dtype)]
        residual = [] if self.residual is None else [self.residual.reshape(len(x), -1)]
        peers = [] if self.peers is None else [self.peers.reshape(-1)]
        others = [x, *norm, *residual, *peers]
        places = [*range(1, 1 + len(norm)), *range(len(others), len(others) + len(weights))]
        return [*others, *weights], places


NOTHING = Around()


def apart(
    x: jax.Array,
    around: Around,
    multiply: Callable[[jax.Array], Sequence[jax.Array]],
) -> list[jax.Array]:
    """The XLA form: each part by itself, around multiply(inputs) → products. Devices do not meet
    in it."""
    assert around.peers is None
    if around.norm is not None:
        x = rms_norm(x, around.norm, around.eps)
    found = multiply(x)
    if around.gated:
        gate, up = (y.astype(x.dtype) for y in found)
        found = [jax.nn.silu(gate) * up]
    if around.residual is not None:
        (y,) = found
        found = [around.residual + y.astype(around.residual.dtype)]
    return list(found)


def check(around: Around, outputs: Sequence[int]) -> None:
    """ValueError unless that many products can have this around them."""
    if around.gated and (len(outputs) != 2 or len({*outputs}) != 1):
        raise ValueError(f"gated takes two weights of as many outputs; given: {tuple(outputs)}")
    if around.residual is not None and (around.gated or len(outputs) != 1):
        raise ValueError(f"residual takes one product that is not gated; given: {len(outputs)}")
    if around.peers is not None and around.residual is None:
        raise ValueError("peers come with a residual; given: None")


def rows_of(x: Any) -> int:
    """How many rows [..., Kin] activations have."""
    return math.prod(x.shape[:-1])
