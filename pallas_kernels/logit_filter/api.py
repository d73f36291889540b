"""Which tokens are left once top-k, top-p and min-p have removed theirs, and their mass."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.logit_filter import xla
from pallas_kernels.logit_filter.kept import Kept


def kept(
    scores: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    *,
    wanted: tuple[bool, bool] | None = None,
    backend: str = "auto",
) -> Kept:
    """The tokens that top-k, then top-p (Holtzman et al., arXiv 1904.09751, section 3.1), then
    min-p (Nguyen et al., arXiv 2407.01082, section 3) leave of each row; one launch of the kernel.

    A token's weight is exp((score − the row's largest) / temperature). Top-k keeps the k largest
    scores and what equals the last of them. Top-p removes the least likely tokens, 1 − top_p of the
    mass that is left together at most; of equal tokens the first stay. Min-p removes weights below
    it. At temperature 0 the first of the largest scores is kept. One token stays in any case.

    Args:
      scores: [B, S, N] float32.
      temperature: [B] float32.
      top_k: [B] int32, 0: off.
      top_p: [B] float32, 1: off.
      min_p: [B] float32, 0: off.
      wanted: whether any sequence wants top-k, and top-p; None: that is not known, and branches
        find out. (The kernel looks at each row's own.)
    """
    call = (scores, temperature, top_k, top_p, min_p)
    if _mosaic_gpu(scores, backend):
        from pallas_kernels.logit_filter import mosaic_gpu

        return dispatch.shared(mosaic_gpu.kept, ())(*call)
    return dispatch.shared(xla.kept, ("wanted",))(*call, wanted=wanted)


def _mosaic_gpu(scores: jax.Array, backend: str) -> bool:
    """Whether the Pallas kernel takes the call: wherever it can, without a word where it cannot.
    CUDA code is imported only where it can."""
    if backend == "xla" or dispatch.device() is None:
        return dispatch.use_mosaic_gpu(backend, "logit_filter", None)
    from pallas_kernels.logit_filter import mosaic_gpu

    return mosaic_gpu.unsupported(scores) is None
