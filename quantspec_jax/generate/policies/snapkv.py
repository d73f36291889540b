"""What the prompt's end attends to, chosen once: SnapKV."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Pages
from pallas_kernels.page_choice.api import most_voted
from quantspec_jax.generate.policies.policy import (
    Policy,
    Sizes,
    budget,
    by_layer,
    most_pages,
    of_sequence,
    places_of,
)
from quantspec_jax.generate.policies.prompt import by_page, last_queries_mass

OBSERVED, POOLED = 32, 7  # queries, and tokens of the max-pooling: the paper's for LongBench


class Chosen(NamedTuple):
    """tiles [B, L, K, P] int32, ascending, `number` [B, 1, 1, 1] of them; prompt [B, 1, 1, 1]
    int32, the pages that there were to choose from. Of several devices each has its own."""

    tiles: jax.Array
    number: jax.Array
    prompt: jax.Array


@dataclasses.dataclass(frozen=True)
class SnapKV(Policy):
    """The pages of the prompt that its last 32 queries attend to, for each kv head; chosen once.
    What came after the prompt is read whole. SnapKV (Li et al., arXiv 2404.14469, section 4): the
    queries' attention weights are summed over the observation window, here over the query heads of
    a kv head, too, and max-pooled over 7 neighbours. In place of the tokens with most of it those
    pages are kept whose tokens have most together, since the cache is the target's, which keeps
    all. The window itself lies in the buffer.

    Args:
      share: of the prompt's coded tokens that are read.
    """

    share: float = 0.25
    name: ClassVar[str] = "snapkv"
    observes: ClassVar[bool] = True

    def observe(
        self,
        q: jax.Array,
        k: jax.Array,
        length: jax.Array,
        *,
        sm_scale: float,
        group_size: int,
        tiles: int,
    ) -> jax.Array:
        """The window's pooled weights by page."""
        mass = last_queries_mass(q, k, length, OBSERVED, sm_scale)
        window, stride = (1, 1, POOLED), (1, 1, 1)
        pooled = jax.lax.reduce_window(mass, -jnp.inf, jax.lax.max, window, stride, "SAME")
        return by_page(pooled, group_size, tiles)

    def start(self, observed: Sequence[jax.Array | None], coded: jax.Array) -> Chosen:
        """The choice."""
        votes = jnp.stack([x for x in observed if x is not None], 1)  # [B, L, K, T/G]
        count = budget(self.share, coded, 1)
        places = most_pages(self.share, votes.shape[-1], 1)
        chosen = jnp.stack(most_voted(votes, coded, count, places=places, backend="xla"), 1)
        return Chosen(chosen, of_sequence(count), of_sequence(coded))

    def pages(
        self, memory: Chosen, coded: jax.Array, sizes: Sizes, backend: str = "auto"
    ) -> tuple[Pages, ...]:
        """Those chosen, and all that were coded since:

        place  0 …      chosen − 1 | chosen …
        tile   the choice, sorted  | prompt …
        """
        chosen, prompt = memory.number, memory.prompt
        place = places_of(sizes.tiles)
        pad = [(0, 0)] * 3 + [(0, sizes.tiles - memory.tiles.shape[-1])]
        listed = jnp.where(place < chosen, jnp.pad(memory.tiles, pad), prompt + place - chosen)
        tiles = (listed[:, i] for i in range(sizes.layers))
        return by_layer(tiles, (chosen - prompt)[:, 0, 0, 0] + coded)
