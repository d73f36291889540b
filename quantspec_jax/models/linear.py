"""Linear layers: of the target, and of a draft with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.int4_matmul.api import int4_matmuls
from pallas_kernels.int4_matmul.xla import dequantize
from pallas_kernels.layout import PackedWeight, TiledWeight, untile
from quantspec_jax.dtypes import FLOAT32
from quantspec_jax.models.parameters import Params


def precision(dtype: np.dtype) -> jax.lax.Precision | None:
    """float32 models multiply in float32 on every backend (a GPU's default is TF32)."""
    return jax.lax.Precision.HIGHEST if dtype == FLOAT32 else None


def linear(x: jax.Array, weights: Params, backend: str) -> jax.Array:
    """[..., Kin] → [..., N] in x's type, or float32."""
    return _add_bias(products(x, [weights], backend, x.dtype)[0], weights)


def linears(x: jax.Array, layers: Sequence[Params], backend: str) -> list[jax.Array]:
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
    x: jax.Array, layers: Sequence[Params], backend: str, out_dtype: Any = jnp.float32
) -> list[jax.Array]:
    """x times each layer's kernel; of packed ones float32, or `out_dtype` where nothing is to be
    added. All packed ones that read x in the same order are one call."""
    results: list[jax.Array | None] = [None] * len(layers)
    for i, weights in enumerate(layers):
        if results[i] is not None:
            continue
        if not isinstance(weights["kernel"], PackedWeight):
            results[i] = jnp.matmul(x, weights["kernel"], precision=precision(x.dtype))
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
