"""What stands around the products of a layer, in the same launch.

A layer of a decoder is four products with little in between. Where there are few rows, what is in
between costs a launch and nothing else; so it is done where a product reads its inputs and writes
its results:

    norm ─ products with q, k, v ─ bias, RoPE, buffer       products with o ─ + stream
    norm ─ products with gate and up ─ silu(gate) · up      products with down ─ + stream

Numbers are rounded to the activations' type after each of these, as in the XLA form.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.add_rms_norm.xla import rms_norm
from pallas_kernels.collectives.mailboxes import devices_of
from pallas_kernels.products.append import Append, AppendForm


class Form(NamedTuple):
    """Which parts there are: what a kernel is specialized to."""

    norm: bool = False
    residual: bool = False
    gated: bool = False
    devices: int = 1
    append: AppendForm | None = None

    @property
    def parts(self) -> int:
        """Outputs that make one result, or two."""
        return 2 if self.gated or self.append else 1

    @property
    def updated(self) -> int:
        """Operands that are written in place: the buffers."""
        return 2 if self.append else 0

    def result_dtype(self, asked: Any) -> jnp.dtype:
        """Of results: what follows the products is bfloat16."""
        follows = self.gated or self.residual or self.append
        return jnp.dtype(jnp.bfloat16 if follows else asked)

    def results(
        self, rows: int, outputs: Sequence[int], dtype: jnp.dtype
    ) -> list[jax.ShapeDtypeStruct]:
        """Of products of so many outputs: one of each, of a gated pair, or queries."""
        kept = outputs[:1] if self.gated or self.append else outputs
        return [jax.ShapeDtypeStruct((rows, n), dtype) for n in kept]

    def shaped(self, found: Sequence[jax.Array], batch: Sequence[int]) -> list[jax.Array]:
        """Results as the call gives them, [..., N] each; queries [B, S, H, D], and the buffers."""
        if self.append:
            queries, *buffers = found
            return [queries.reshape(*batch, -1, self.append.channels), *buffers]
        return [y.reshape(*batch, y.shape[-1]) for y in found]


PLAIN = Form()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["norm", "residual", "peers", "append"],
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
    append    what finishes the products of q, k and v; or None
    """

    norm: jax.Array | None = None
    eps: float = 0.0
    residual: jax.Array | None = None
    gated: bool = False
    peers: jax.Array | None = None
    append: Append | None = None

    @property
    def form(self) -> Form:
        devices = 1 if self.peers is None else devices_of(self.peers.size)
        append = None if self.append is None else self.append.form
        return Form(self.norm is not None, self.residual is not None, self.gated, devices, append)

    def launched(self) -> Around:
        """As a kernel takes it: where launches do not begin early, nothing is read ahead."""
        from pallas_kernels import ptx  # CUDA code

        if self.append is None or ptx.begins_early():
            return self
        return dataclasses.replace(self, append=dataclasses.replace(self.append, ahead=False))

    def operands(
        self, x: jax.Array, weights: Sequence[jax.Array], outputs: Sequence[int]
    ) -> tuple[list[jax.Array], list[int]]:
        """A kernel's: activations [R, Kin], the norm's weight, the residual, the addresses of
        peers, what q, k and v are finished with, the products' weights, of so many outputs each,
        the buffers; and the places of those that are read before the launches before have ended.
        """
        norm = [] if self.norm is None else [self.norm.astype(x.dtype)]
        residual = [] if self.residual is None else [self.residual.reshape(len(x), -1)]
        peers = [] if self.peers is None else [self.peers.reshape(-1)]
        finish = [] if self.append is None else self.append.operands(outputs)
        buffers = [] if self.append is None else self.append.buffers
        others = [x, *norm, *residual, *peers]
        known = len(others) + (0 if self.append is None or self.append.ahead else len(finish))
        last = len(others) + len(finish) + len(weights)
        places = [*range(1, 1 + len(norm)), *range(known, last)]
        return [*others, *finish, *weights, *buffers], places


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
    if around.append is not None:
        found = around.append.apart(found, x.dtype)
    return list(found)


def check(around: Around, outputs: Sequence[int]) -> None:
    """ValueError unless that many products can have this around them."""
    if around.append is not None and (around.gated or around.residual is not None):
        raise ValueError("append takes neither gated nor a residual beside it")
    if around.append is not None and len(outputs) != 3:
        raise ValueError(f"append takes three weights, of q, k and v; given: {len(outputs)}")
    if around.gated and (len(outputs) != 2 or len({*outputs}) != 1):
        raise ValueError(f"gated takes two weights of as many outputs; given: {tuple(outputs)}")
    if around.residual is not None and (around.gated or len(outputs) != 1):
        raise ValueError(f"residual takes one product that is not gated; given: {len(outputs)}")
    if around.peers is not None and around.residual is None:
        raise ValueError("peers come with a residual; given: None")


def rows_of(x: Any) -> int:
    """How many rows [..., Kin] activations have."""
    return math.prod(x.shape[:-1])
