"""Meetings of devices by XLA's own collectives: on any backend, and of any size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def all_reduce(
    y: jax.Array, axis: str, residual: jax.Array | None = None, out_dtype: Any = jnp.float32
) -> jax.Array:
    """See `pallas_kernels.collectives.api.all_reduce`."""
    total = jax.lax.psum(y.astype(jnp.float32), axis).astype(out_dtype)
    return total if residual is None else residual + total


def all_gather(x: jax.Array, axis: str) -> jax.Array:
    """See `pallas_kernels.collectives.api.all_gather`."""
    return jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)


def merge(
    out: jax.Array, log_sum_exp: jax.Array, axis: str, out_dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.collectives.api.merge`."""
    both = jnp.concatenate([out, log_sum_exp[..., None]], -1)
    parts = jax.lax.all_gather(both, axis)  # one meeting; the sum has the same order everywhere
    outs, sums = parts[..., :-1], parts[..., -1]
    whole = jax.nn.logsumexp(sums, 0)
    weights = jnp.exp(sums - jnp.where(jnp.isfinite(whole), whole, 0)[None])
    return (weights[..., None] * outs).sum(0).astype(out_dtype), whole
