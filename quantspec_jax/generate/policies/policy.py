"""What a policy is, and how pages are counted and listed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import ByPage, Pages
from quantspec_jax.checks import is_number, require

SINKS = 1  # pages, the first
SLACK = 1e-6  # of a share times a number, so that 0.1 of 70 pages are 7 in any precision


class Sizes(NamedTuple):
    """L, K and T/G of a cache."""

    layers: int
    kv_heads: int
    tiles: int


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which pages a draft reads; part of what a program is compiled for. As it stands it reads all
    of them and remembers nothing.

    Args:
      share: of the coded tokens that are read, in (0, 1].

    observes: whether `observe` looks at prompts.
    votes: whether `update` looks at the attention of verifications, which these then leave.
    every: rounds that read the same pages; None: all of them, as long as no more are coded.
    """

    share: float = 1.0

    name: ClassVar[str]
    observes: ClassVar[bool] = False
    votes: ClassVar[bool] = False

    @property
    def every(self) -> int | None:
        """See above."""
        return None

    def __post_init__(self) -> None:
        possible = is_number(self.share) and 0 < self.share <= 1
        require(possible, "draft_share", self.share, "a number in (0, 1]")

    def observe(
        self,
        q: jax.Array,
        k: jax.Array,
        length: jax.Array,
        *,
        sm_scale: float,
        group_size: int,
        tiles: int,
    ) -> jax.Array | None:
        """What there is to know of one layer's prompts: [B, P, H, D] queries and [B, P, K, D] keys
        after RoPE, valid below `length` [B] → [B, K, T/G] float32, a number a page; None: nothing.
        """
        return None

    def start(self, observed: Sequence[jax.Array | None], coded: jax.Array) -> Any:
        """What is remembered of each sequence before its first round: a pytree of arrays with the
        batch first, from what `observe` found in each layer and the number of coded pages [B]."""
        return ()

    def pages(
        self, memory: Any, coded: jax.Array, sizes: Sizes, backend: str = "auto"
    ) -> tuple[Pages, ...] | None:
        """The pages to read in each layer, for all steps of a round, of `coded` [B] pages that
        there are; None: all of them."""
        return None

    def update(
        self, memory: Any, seen: Sequence[ByPage], accepted: jax.Array, backend: str = "auto"
    ) -> Any:
        """After a verification. `seen`: each layer's attention by page; rows beyond number
        `accepted` [B] mean nothing."""
        return memory


def most_pages(share: float, tiles: int, least: int) -> int:
    """Entries that a list needs for the longest sequence."""
    return min(max(math.ceil(share * tiles * (1 - SLACK)), least), tiles)


def budget(share: float, coded: jax.Array, least: int) -> jax.Array:
    """[B] coded pages → [B] how many of them are read: the share, or `least` if there are."""
    wanted = jnp.ceil(share * (1 - SLACK) * coded.astype(jnp.float32)).astype(jnp.int32)
    return jnp.minimum(jnp.maximum(wanted, least), coded)


def places_of(number: int) -> jax.Array:
    """[1, 1, 1, number]: 0, 1, 2, ..."""
    return jnp.arange(number)[None, None, None]


def of_sequence(numbers: jax.Array) -> jax.Array:
    """[B] → [B, 1, 1, 1]."""
    return numbers[:, None, None, None]


def by_layer(tiles: Iterable[jax.Array], count: jax.Array) -> tuple[Pages, ...]:
    """Lists [B, K, P] of each layer, as long as one another."""
    return tuple(Pages(each, count) for each in tiles)
