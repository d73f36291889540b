"""Which pages a draft reads, by the attention of the last pass: votes, and the choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.kv_attention.read import ByPage
from pallas_kernels.page_choice import xla


def page_votes(seen: Sequence[ByPage], last: jax.Array, *, backend: str = "auto") -> jax.Array:
    """The attention mass of each page in each layer, summed over the rows that vote and over the
    query heads of a key-value head; of all layers in one launch.

    Args:
      seen: of each layer.
      last: [B] int32, 0 … S − 1: rows up to this one vote.

    Returns:
      [B, L, K, T/G] float32; anything for pages that hold no coded tokens.
    """
    if _mosaic_gpu(backend, lambda kernels: kernels.votes_unsupported(seen)):
        from pallas_kernels.page_choice import mosaic_gpu

        return dispatch.shared(mosaic_gpu.page_votes, ())(list(seen), last)
    return dispatch.shared(xla.page_votes, ())(list(seen), last)


def most_voted(
    votes: jax.Array,
    coded: jax.Array,
    count: jax.Array,
    *,
    places: int,
    ends: tuple[int, int] = (0, 0),
    backend: str = "auto",
) -> tuple[jax.Array, ...]:
    """The pages with most votes, in order of position; of all layers in one launch.

    Args:
      votes: [B, L, K, T/G] float32.
      coded: [B] int32, pages that hold coded tokens: one of the first so many is chosen.
      count: [B] int32, how many are, up to `coded` and `places`.
      ends: so many of the first, and of the last before `coded`, come before all others.

    Returns:
      Of each layer [B, K, places] int32: `count` numbers of pages, and T/G beyond them. Of pages
      with as many votes the first are chosen.
    """
    static: dict[str, Any] = {"places": places, "ends": ends}
    if _mosaic_gpu(backend, lambda kernels: kernels.choice_unsupported(votes)):
        from pallas_kernels.page_choice import mosaic_gpu

        kernel = dispatch.shared(mosaic_gpu.most_voted, ("places", "ends"))
        return kernel(votes, coded, count, **static)
    return dispatch.shared(xla.most_voted, ("places", "ends"))(votes, coded, count, **static)


def _mosaic_gpu(backend: str, unsupported: Callable[[Any], str | None]) -> bool:
    """Whether the Pallas kernel takes the call. CUDA code is imported only where it can."""
    if backend == "xla" or dispatch.device() is None:
        return dispatch.use_mosaic_gpu(backend, "page_choice", None)
    from pallas_kernels.page_choice import mosaic_gpu

    return dispatch.use_mosaic_gpu(backend, "page_choice", unsupported(mosaic_gpu))
