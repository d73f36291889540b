"""What the last verification attends to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Pages
from quantspec_jax.checks import is_int, require
from quantspec_jax.generate.policies.policy import (
    SINKS,
    Policy,
    Sizes,
    budget,
    by_layer,
    highest,
    most_pages,
    of_sequence,
    places_of,
)
from quantspec_jax.generate.policies.prompt import by_page, last_queries_mass

RECENT = 1  # pages before the buffer
PROMPT_QUERIES = 8  # of a prompt that vote before the first verification does


@dataclasses.dataclass(frozen=True)
class TopPages(Policy):
    """The first page, the one before the buffer, and those with most attention mass in the last
    verification, for each kv head (the principle of Vegas, arXiv 2602.07223, in pages of a 4-bit
    plane). All rows up to the last accepted one vote, and all query heads of a kv head: measured in
    benchmarks/page-votes-*.json.

    Args:
      share: of the coded tokens that are read, in all.
      every: rounds that read the same pages; the last one's verification votes. More tokens that
        are coded end them earlier.
    """

    share: float = 0.25
    every: int = 1
    name: ClassVar[str] = "top-pages"
    observes: ClassVar[bool] = True
    votes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        possible = is_int(self.every) and self.every >= 1
        require(possible, "draft_every", self.every, "an integer ≥ 1")

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
        """As if the prompt's end had been verified."""
        mass = last_queries_mass(q, k, length, PROMPT_QUERIES, sm_scale)
        return by_page(mass, group_size, tiles)

    def start(self, observed: Sequence[jax.Array | None], coded: jax.Array) -> jax.Array:
        """[B, L, K, T/G] float32 votes."""
        return jnp.stack([x for x in observed if x is not None], 1)

    def pages(self, memory: jax.Array, coded: jax.Array, sizes: Sizes) -> tuple[Pages, ...]:
        """The selection."""
        least = SINKS + RECENT
        count = budget(self.share, coded, least)
        tile, bound = places_of(sizes.tiles), of_sequence(coded)
        always = (tile < SINKS) | (tile >= bound - RECENT)
        votes = jnp.where(always, jnp.inf, memory)
        votes = jnp.where(tile < bound, votes, -jnp.inf)
        return by_layer(highest(votes, count, most_pages(self.share, sizes.tiles, least)), count)

    def update(
        self, memory: jax.Array, masses: Sequence[jax.Array], accepted: jax.Array
    ) -> jax.Array:
        """The votes of this verification alone."""
        b, _, heads, tiles = memory.shape
        row = jnp.arange(masses[0].shape[1])[None]
        counts = (row <= accepted[:, None])[:, :, None, None]

        def votes(mass: jax.Array) -> jax.Array:  # of a layer: summed before they are joined
            by_head = jnp.where(counts, mass, 0.0).sum(1)
            return by_head.reshape(b, heads, -1, tiles).sum(2)

        return jnp.stack([votes(mass) for mass in masses], 1)
