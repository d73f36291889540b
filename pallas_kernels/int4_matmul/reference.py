"""Products with packed 4-bit weights in XLA, written from the formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.layout import QuantizedWeight, unpack


def dequantize(weight: QuantizedWeight) -> jax.Array:
    """float32 [groups · group, N], padding rows included."""
    codes = unpack(weight.packed).astype(jnp.float32)
    scale = weight.scale.astype(jnp.float32)[:, None, :]
    if weight.minimum is None:
        w = scale * codes
    else:
        w = weight.minimum.astype(jnp.float32)[:, None, :] + scale * (codes + 8)
    return w.reshape(-1, w.shape[-1])


def int4_matmul(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """[..., Kin] times a quantized [Kin, N] → float32 [..., N]."""
    w = dequantize(weight)[: x.shape[-1]].astype(x.dtype)
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)
