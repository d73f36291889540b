"""Weights rounded to nearest, in groups of 4 bits."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.xla import dequantize
from pallas_kernels.layout import QuantizedWeight, pack
from quantspec_jax.weights.formats import WeightFormat


def quantize_weight(kernel: jax.Array, group_size: int, symmetric: bool) -> QuantizedWeight:
    """[Kin, N] → 4-bit groups of `group_size` input channels, rounded to nearest.

    Symmetric: the weight of the largest magnitude has code −8 whatever its sign, so all sixteen
    codes are used and the scale may be negative. Scale and minimum are rounded to bf16 first and
    the codes computed against what is stored. Where `group_size` does not divide Kin the last group
    is shorter, and filled up with unused codes.
    """
    kin, n = kernel.shape
    groups = -(-kin // group_size)
    rows = jnp.arange(groups * group_size).reshape(groups, group_size, 1)
    w = jnp.pad(kernel.astype(jnp.float32), ((0, groups * group_size - kin), (0, 0)))
    w = w.reshape(groups, group_size, n)
    if symmetric:
        low, high = jnp.min(w, 1), jnp.max(w, 1)
        scale = (jnp.where(high > -low, high, low) / -8).astype(jnp.bfloat16)
        codes = jnp.round(w / _nonzero(scale)[:, None])
        return QuantizedWeight(_pack(codes), scale, None)
    low = jnp.min(w, 1, initial=jnp.inf, where=rows < kin)
    high = jnp.max(w, 1, initial=-jnp.inf, where=rows < kin)
    minimum = low.astype(jnp.bfloat16)
    scale = ((high - minimum.astype(jnp.float32)) / 15).astype(jnp.bfloat16)
    codes = jnp.round((w - minimum.astype(jnp.float32)[:, None]) / _nonzero(scale)[:, None]) - 8
    return QuantizedWeight(_pack(codes), scale, minimum)


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale != 0, scale, 1).astype(jnp.float32)


def _pack(codes: jax.Array) -> jax.Array:
    return pack(jnp.clip(codes, -8, 7).astype(jnp.int8))


@partial(jax.jit, static_argnums=1)
def quantize_linear(kernel: jax.Array, stored: WeightFormat) -> dict[str, QuantizedWeight]:
    """[Kin, N] → the entries of one linear layer in 4 or 8 bits, rounded to nearest: `kernel`, and
    for 8 bits `residual`, the codes of what `kernel` leaves. Their products add up."""
    upper = quantize_weight(kernel, stored.group_size, stored.symmetric)
    if stored.bits == 4:
        return {"kernel": upper}
    rest = kernel.astype(jnp.float32) - dequantize(upper)[: kernel.shape[0]]
    return {"kernel": upper, "residual": quantize_weight(rest, stored.group_size, True)}
