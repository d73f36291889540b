"""A pass's keys and values into the cache's buffer, and its queries ready for attention."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.layout import LayerCache
from pallas_kernels.rope_append import xla
from pallas_kernels.rope_append.heads import Heads


def rope_append(
    heads: Heads,
    cache: LayerCache,
    start: jax.Array,
    first: jax.Array | None = None,
    *,
    ahead: bool = False,
    backend: str = "auto",
) -> tuple[jax.Array, LayerCache]:
    """Finish a pass's heads, and write keys and values into the buffer; one launch, in place.

    Args:
      heads: of S consecutive tokens a sequence.
      cache: the layer's.
      start: [B] int32, position of the first.
      first: [B] int32, position of the first row of `heads.rope`, which may have more rows than the
        pass; None: it is `start`, and there are S rows.
      ahead: all but q, k, v and the buffer was so when the attention of another layer, which has
        been launched before this, began: the kernel may read it while what was launched since ends.
      backend: `auto`, `mosaic_gpu` or `xla`.

    Returns:
      [B, S, H, D] queries, and the cache with positions start … start + S − 1 in its buffer (see
      `xla.append` for those beyond the half that `start` lies in).
    """
    if _mosaic_gpu(heads, cache, backend):
        from pallas_kernels import ptx
        from pallas_kernels.rope_append import mosaic_gpu

        kernel = dispatch.shared(mosaic_gpu.rope_append, ("ahead",))
        return kernel(heads, cache, start, first, ahead=ahead and ptx.begins_early())
    return xla.rope_append(heads, cache, start, first)


def _mosaic_gpu(heads: Heads, cache: LayerCache, backend: str) -> bool:
    """Whether the Pallas kernel takes the call. CUDA code is imported only where it can."""
    if backend == "xla" or dispatch.device() is None:
        return dispatch.use_mosaic_gpu(backend, "rope_append", None)
    from pallas_kernels.rope_append import mosaic_gpu

    return dispatch.use_mosaic_gpu(backend, "rope_append", mosaic_gpu.unsupported(heads, cache))
