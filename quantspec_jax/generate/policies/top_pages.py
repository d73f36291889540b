"""What the last verification attends to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import ByPage, Pages
from pallas_kernels.page_choice.api import most_voted, page_votes
from quantspec_jax.checks import is_int, require
from quantspec_jax.generate.policies.policy import (
    SINKS,
    Policy,
    Sizes,
    budget,
    by_layer,
    most_pages,
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

    def pages(
        self, memory: jax.Array, coded: jax.Array, sizes: Sizes, backend: str = "auto"
    ) -> tuple[Pages, ...]:
        """The selection."""
        least = SINKS + RECENT
        count = budget(self.share, coded, least)
        places = most_pages(self.share, sizes.tiles, least)
        options: dict[str, Any] = {"places": places, "ends": (SINKS, RECENT), "backend": backend}
        return by_layer(most_voted(memory, coded, count, **options), count)

    def update(
        self,
        memory: jax.Array,
        seen: Sequence[ByPage],
        accepted: jax.Array,
        backend: str = "auto",
    ) -> jax.Array:
        """The votes of this verification alone."""
        return page_votes(seen, accepted, backend=backend)
