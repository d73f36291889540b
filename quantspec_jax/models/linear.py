"""Linear layers: of the target, and of a draft with packed weights; and what stands around them.

A stream's norm may be left to the product that reads it (`Normed`). Where kernels take a call, the
norm, the SiLU and the sum with the stream are part of the product's launch; else they are launches
of their own, with the same meaning (`products.around`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.add_rms_norm.api import add_rms_norm, rms_norm
from pallas_kernels.bf16_matmul import api as bf16
from pallas_kernels.bf16_matmul.xla import matmul
from pallas_kernels.collectives import api as collectives
from pallas_kernels.int4_matmul import api as int4
from pallas_kernels.int4_matmul.api import int4_matmuls
from pallas_kernels.int4_matmul.xla import dequantize
from pallas_kernels.layout import PackedWeight, TiledWeight, untile
from pallas_kernels.products.around import NOTHING, Around
from quantspec_jax.axes import ONE, Axes
from quantspec_jax.dtypes import BFLOAT16, FLOAT32
from quantspec_jax.models.parameters import Params


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["x", "weight"], meta_fields=["eps"]
)
@dataclasses.dataclass(frozen=True)
class Normed:
    """The RMS norm of x [..., E] that nothing has computed yet."""

    x: jax.Array
    weight: jax.Array
    eps: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> np.dtype:
        return self.x.dtype


Activations = jax.Array | Normed


def computed(x: Activations, backend: str) -> jax.Array:
    """Activations as an array."""
    return rms_norm(x.x, x.weight, x.eps, backend=backend) if isinstance(x, Normed) else x


def apart_from_norm(x: Activations, around: Around = NOTHING) -> tuple[jax.Array, Around]:
    """What a kernel reads, and what stands around its product: the norm, if it has been left."""
    if isinstance(x, Normed):
        return x.x, dataclasses.replace(around, norm=x.weight, eps=x.eps)
    return x, around


def precision(dtype: np.dtype) -> jax.lax.Precision | None:
    """float32 models multiply in float32 on every backend (a GPU's default is TF32)."""
    return jax.lax.Precision.HIGHEST if dtype == FLOAT32 else None


def linear(x: jax.Array, weights: Params, backend: str) -> jax.Array:
    """[..., Kin] → [..., N] in x's type, or float32."""
    return _add_bias(products(x, [weights], backend, x.dtype)[0], weights)


def add_norm(
    stream: jax.Array,
    x: jax.Array,
    weights: Params,
    norm: jax.Array,
    eps: float,
    backend: str,
    axes: Axes = ONE,
) -> tuple[jax.Array, Activations]:
    """The stream [..., E] with a layer's output added, and the norm of that.

    The sum is part of the product's launch, and the norm is left to what reads it; where no kernel
    does that, both are one launch after the product. Devices that have parts of x add theirs first:
    where they reach each other's memory in the product's launch, too, or in one after it.
    """
    peers = axes.peers_over("tp")
    if axes.tp == 1 or peers is not None:
        found = one_launch(x, [weights], backend, x.dtype, residual=stream, peers=peers)
        if found is not None:
            return found[0], Normed(found[0], norm, eps)
    if axes.tp == 1:
        y = linear(x, weights, backend)
    else:
        part = _part(x, weights, backend, axes)
        alone = "bias" not in weights and x.dtype == BFLOAT16
        if alone and collectives.takes(part, peers, backend):
            total = axes.summed(part, stream, x.dtype, backend)
            return total, Normed(total, norm, eps)
        y = _add_bias(axes.summed(part), weights).astype(x.dtype)
    return add_rms_norm(stream, y, norm, eps, backend=backend)


def _part(x: jax.Array, weights: Params, backend: str, axes: Axes) -> jax.Array:
    """A device's part of `linear`, without its bias: it has some of x's channels, and their rows of
    the kernel."""
    rest = {name: leaf for name, leaf in weights.items() if name not in ("bias", "order")}
    if "order" in weights:
        everywhere = axes.joined(x).at[..., weights["order"]]
        x = axes.own(everywhere.get(mode="promise_in_bounds", unique_indices=True))
    return products(x, [rest], backend)[0]


def gated(x: Activations, gate: Params, up: Params, backend: str) -> jax.Array:
    """silu(x · gate) (x · up): [..., Kin] → [..., N] (arXiv 2002.05202, SwiGLU)."""
    found = one_launch(x, [gate, up], backend, x.dtype, gated=True)
    if found is not None:
        return found[0]
    left, right = linears(x, [gate, up], backend)
    return jax.nn.silu(left) * right


def linears(x: Activations, layers: Sequence[Params], backend: str) -> list[jax.Array]:
    """Several linear layers of the same input: [..., Kin] → [..., N] each, in x's type.

    A layer's `kernel` is an array or a `PackedWeight`; beside the latter there may be
    `residual`, a second one whose product adds to its own, and `order`, int32 [Kin]: the kernel's
    input channel i is channel order[i] of x. `bias` is added to either.
    """
    return [
        _add_bias(y, weights).astype(x.dtype)
        for y, weights in zip(products(x, layers, backend, x.dtype), layers, strict=True)
    ]


def _add_bias(y: jax.Array, weights: Params) -> jax.Array:
    if "bias" not in weights:
        return y
    return y + jnp.broadcast_to(weights["bias"].astype(y.dtype), y.shape)


def products(
    x: Activations, layers: Sequence[Params], backend: str, out_dtype: Any = jnp.float32
) -> list[jax.Array]:
    """x times each layer's kernel, in `out_dtype`; of packed ones float32 where something is to be
    added. All packed ones that read x in the same order are one call."""
    found = one_launch(x, layers, backend, out_dtype)
    if found is not None:
        return found
    x = computed(x, backend)
    results: list[jax.Array | None] = [None] * len(layers)
    for i, weights in enumerate(layers):
        if results[i] is not None:
            continue
        if not isinstance(weights["kernel"], PackedWeight):
            results[i] = matmul(x, weights["kernel"], False, out_dtype, precision(x.dtype))
            continue
        order = weights.get("order")
        together = [
            j
            for j, other in enumerate(layers)
            if isinstance(other["kernel"], PackedWeight) and other.get("order") is order
        ]
        packed = _packed_products(x, [layers[j] for j in together], order, backend, out_dtype)
        for j, y in zip(together, packed, strict=True):
            results[j] = y
    return results  # type: ignore[return-value]


def one_launch(
    x: Activations,
    layers: Sequence[Params],
    backend: str,
    out_dtype: Any,
    **around: Any,
) -> list[jax.Array] | None:
    """Products of all layers, with what stands around them (`Around`), by one kernel; None where
    none takes that. Biases are left to the caller, or to `append`: where something else follows,
    there may be none."""
    if any(name in weights for weights in layers for name in ("residual", "order")):
        return None
    appended = "append" in around  # with the biases
    biased = not appended and any("bias" in weights for weights in layers)
    if biased and around:
        return None
    kernels = [weights["kernel"] for weights in layers]
    packed = [isinstance(kernel, PackedWeight) for kernel in kernels]
    inputs, parts = apart_from_norm(x, Around(**around))
    if all(packed) and int4.takes(inputs, kernels, parts, backend):
        dtype = jnp.float32 if biased else out_dtype
        return int4_matmuls(inputs, kernels, parts, out_dtype=dtype, backend=backend)
    if not any(packed) and bf16.takes(inputs, kernels, parts, backend=backend):
        return bf16.bf16_matmuls(inputs, kernels, parts, out_dtype=out_dtype, backend=backend)
    return None


def _packed_products(
    x: jax.Array,
    layers: Sequence[Params],
    order: jax.Array | None,
    backend: str,
    out_dtype: Any,
) -> list[jax.Array]:
    """x, its channels in `order`, times layers of one or two 4-bit planes, in one call."""
    if order is not None:
        x = x.at[..., order].get(mode="promise_in_bounds", unique_indices=True)
    planes = [
        weights[name] for weights in layers for name in ("kernel", "residual") if name in weights
    ]
    if any("residual" in weights or "bias" in weights for weights in layers):
        out_dtype = jnp.float32
    found = iter(int4_matmuls(x, planes, out_dtype=out_dtype, backend=backend))
    return [
        next(found) + next(found) if "residual" in weights else next(found) for weights in layers
    ]


def unpacked(weights: Params, inputs: int) -> jax.Array:
    """The kernel that the products of a packed layer are those of: float32 [Kin, N].

    Args:
      weights: `kernel`, and `residual` and `order` where the layer has them.
      inputs: Kin.
    """
    planes = [weights[name] for name in ("kernel", "residual") if name in weights]
    whole = [untile(plane) if isinstance(plane, TiledWeight) else plane for plane in planes]
    kernel = sum(dequantize(plane)[:inputs] for plane in whole)  # the last group may be filled up
    assert isinstance(kernel, jax.Array)
    if "order" in weights:
        kernel = jnp.zeros_like(kernel).at[weights["order"]].set(kernel, unique_indices=True)
    return kernel
