"""Sinks and the most recent pages: StreamingLLM."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Pages
from quantspec_jax.generate.policies.policy import SINKS, Policy, Sizes, budget, most_pages


@dataclasses.dataclass(frozen=True)
class Window(Policy):
    """The first page, where attention sinks lie, and those before the buffer: StreamingLLM (Xiao et
    al., arXiv 2309.17453) in pages. Keys keep their positions in the text, since the cache is the
    target's (the paper rotates them anew, by their place among those that are kept).

    Args:
      share: of the coded tokens that are read, the sinks included.
    """

    share: float = 0.25
    name: ClassVar[str] = "window"

    def pages(
        self, memory: Any, coded: jax.Array, sizes: Sizes, backend: str = "auto"
    ) -> tuple[Pages, ...]:
        """By number alone:

        place  0 | 1 …                 count − 1
        tile   0 | coded − count + 1 … coded − 1
        """
        count = budget(self.share, coded, SINKS)
        place = jnp.arange(most_pages(self.share, sizes.tiles, SINKS))[None]
        tile = jnp.where(place < SINKS, place, place + (coded - count)[:, None])
        shape = (len(coded), sizes.kv_heads, tile.shape[1])
        return (Pages(jnp.broadcast_to(tile[:, None], shape), count),) * sizes.layers
