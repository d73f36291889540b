"""Residual addition and RMS norm in XLA, for any backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / √(mean x² + ε) · weight over the last axis, computed in float32, in x's type."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * jnp.broadcast_to(weight.astype(jnp.float32), x.shape)).astype(x.dtype)


def add_rms_norm(
    x: jax.Array, y: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.add_rms_norm.api.add_rms_norm`."""
    total = x + y.astype(x.dtype)
    return total, rms_norm(total, weight, eps)
