"""Full-precision keys and values to the two 4-bit planes."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.layout import Planes
from pallas_kernels.quantize_pack import xla
from pallas_kernels.shapes import CacheKV, shaped


@shaped
def quantize_keys(keys: CacheKV, group_size: int, *, backend: str = "auto") -> Planes:
    """[B, K, T, D] keys after RoPE, T a multiple of G → planes. Groups: G tokens of a channel."""
    if _mosaic_gpu(keys, group_size, backend):
        from pallas_kernels.quantize_pack import mosaic_gpu

        kernel = dispatch.shared(mosaic_gpu.quantize_keys, ("group_size",))
        return kernel(keys, group_size=group_size)
    return dispatch.shared(xla.quantize_keys, ("group_size",))(keys, group_size=group_size)


@shaped
def quantize_values(values: CacheKV, group_size: int, *, backend: str = "auto") -> Planes:
    """[B, K, T, D] values, T a multiple of G → planes. Groups: min(G, D) channels of a token."""
    if _mosaic_gpu(values, group_size, backend):
        from pallas_kernels.quantize_pack import mosaic_gpu

        kernel = dispatch.shared(mosaic_gpu.quantize_values, ("group_size",))
        return kernel(values, group_size=group_size)
    return dispatch.shared(xla.quantize_values, ("group_size",))(values, group_size=group_size)


def _mosaic_gpu(x: jax.Array, group_size: int, backend: str) -> bool:
    """Whether the Pallas kernel takes the call. CUDA code is imported only where it can."""
    if backend == "xla" or dispatch.device() is None:
        return dispatch.use_mosaic_gpu(backend, "quantize_pack", None)
    from pallas_kernels.quantize_pack import mosaic_gpu

    return dispatch.use_mosaic_gpu(backend, "quantize_pack", mosaic_gpu.unsupported(x, group_size))
