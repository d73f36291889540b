"""The residual stream's step: a layer's output added, and the sum normalized for the next layer."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.add_rms_norm import xla


def add_rms_norm(
    x: jax.Array, y: jax.Array, weight: jax.Array, eps: float, *, backend: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """x + y and its RMS norm (Zhang and Sennrich, arXiv 1910.07467, equation 4), in one launch.

    Args:
      x: [..., E], the residual stream.
      y: [..., E], what to add, in x's type or float32; it is rounded to x's type first.
      weight: [E].
      eps: added to the mean square.

    Returns:
      x + y and its norm times `weight`, both [..., E] in x's type.
    """
    if _mosaic_gpu(x, backend):
        from pallas_kernels.add_rms_norm import mosaic_gpu

        kernel = dispatch.shared(mosaic_gpu.add_rms_norm, ("eps",))
        return kernel(x, y, weight, eps=eps)
    return dispatch.shared(xla.add_rms_norm, ("eps",))(x, y, weight, eps=eps)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, backend: str = "auto") -> jax.Array:
    """The RMS norm of x [..., E] alone, in x's type; of one row XLA makes two launches."""
    if _mosaic_gpu(x, backend):
        from pallas_kernels.add_rms_norm import mosaic_gpu

        return dispatch.shared(mosaic_gpu.rms_norm, ("eps",))(x, weight, eps=eps)
    return dispatch.shared(xla.rms_norm, ("eps",))(x, weight, eps=eps)


def _mosaic_gpu(x: jax.Array, backend: str) -> bool:
    """Whether the Pallas kernel takes the call. CUDA code is imported only where it can."""
    if backend == "xla" or dispatch.device() is None:
        return dispatch.use_mosaic_gpu(backend, "add_rms_norm", None)
    from pallas_kernels.add_rms_norm import mosaic_gpu

    return dispatch.use_mosaic_gpu(backend, "add_rms_norm", mosaic_gpu.unsupported(x))
