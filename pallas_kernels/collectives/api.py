"""Meetings of the devices of a mesh's axis, inside `jax.shard_map`.

With `peers`, this device's addresses of the others (`mailboxes.addresses`), a meeting of few rows
is one launch that writes into the others' memory, where `takes` says so. What comes of it has the
same bits on all devices. Such meetings of a program over one axis have to follow from one another.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.collectives import xla


def all_reduce(
    y: jax.Array,
    axis: str,
    residual: jax.Array | None = None,
    *,
    peers: jax.Array | None = None,
    out_dtype: Any = jnp.float32,
    backend: str = "auto",
) -> jax.Array:
    """Σ y over the devices of `axis`, in float32, rounded to `out_dtype`; plus `residual`.

    Args:
      y: [..., E], this device's part.
      residual: [..., E] in `out_dtype`, the same on all devices; or None.

    Returns:
      [..., E] in `out_dtype`, the same on all devices.
    """
    if out_dtype == jnp.bfloat16 and takes(y, peers, backend):
        from pallas_kernels.collectives import mosaic_gpu

        kernel = dispatch.shared(mosaic_gpu.all_reduce, ())
        return kernel(y.astype(jnp.float32), peers, residual)
    return xla.all_reduce(y, axis, residual, out_dtype)


def merge(
    out: jax.Array,
    log_sum_exp: jax.Array,
    axis: str,
    *,
    peers: jax.Array | None = None,
    out_dtype: Any = jnp.float32,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attention to the keys of all devices of `axis`, from that to each one's (Flash-Decoding,
    arXiv 2311.01282).

    Args:
      out: [..., D] float32, attention to this device's keys.
      log_sum_exp: [...] float32, of the scores; −∞ where it has nothing to see.

    Returns:
      As those, `out` in `out_dtype`, the same on all devices.
    """
    if out_dtype == jnp.bfloat16 and takes(out, peers, backend):
        from pallas_kernels.collectives import mosaic_gpu

        return dispatch.shared(mosaic_gpu.merge, ())(out, log_sum_exp, peers)
    return xla.merge(out, log_sum_exp, axis, out_dtype)


def all_gather(
    x: jax.Array, axis: str, *, peers: jax.Array | None = None, backend: str = "auto"
) -> jax.Array:
    """The last dimension of x [..., E] of all devices of `axis`, side by side: [..., D E]."""
    if x.dtype == jnp.float32 and takes(x, peers, backend):
        from pallas_kernels.collectives import mosaic_gpu

        return dispatch.shared(mosaic_gpu.all_gather, ())(x, peers)
    return xla.all_gather(x, axis)


def takes(part: Any, peers: Any, backend: str = "auto") -> bool:
    """Whether the devices' parts meet in a Pallas kernel, which makes bfloat16 of sums and merges.
    Those of many rows are XLA's, which then moves fewer bytes; nothing is said of it."""
    if peers is None or backend == "xla" or dispatch.device() is None:
        return False
    from pallas_kernels.collectives import mosaic_gpu

    return mosaic_gpu.unsupported(part) is None
