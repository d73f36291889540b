"""Draft policies: which part of the cache a draft pass reads. The target reads all of it, always.

A policy is a frozen dataclass, part of what a program is compiled for. What it remembers of each
sequence is a pytree of arrays with the batch first, in the decode state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Pages
from quantspec_jax.cache import KVCache
from quantspec_jax.checks import is_number, require


class Policy(Protocol):
    """Which pages a draft reads."""

    @property
    def name(self) -> str: ...

    def start(self, batch: int) -> Any:
        """What is remembered of `batch` sequences before their first round."""
        ...

    def pages(self, memory: Any, cache: KVCache) -> Pages | None:
        """The tiles to read, for all steps of a round; None: all of them."""
        ...


@dataclasses.dataclass(frozen=True)
class All:
    """Every page: QuantSpec as published.

    Args:
      share: of the coded tokens that are read; only 1.
    """

    share: float = 1.0
    name: str = "all"

    def __post_init__(self) -> None:
        require(self.share == 1, "draft_share", self.share, "1 (draft_policy all reads all)")

    def start(self, batch: int) -> Any:
        """Nothing."""
        return ()

    def pages(self, memory: Any, cache: KVCache) -> Pages | None:
        """All."""
        return None


@dataclasses.dataclass(frozen=True)
class Window:
    """The first page, where attention sinks lie, and the most recent ones: StreamingLLM (Xiao et
    al., arXiv 2309.17453) over the draft's view. The buffer is always read.

    Args:
      share: of the coded tokens that are read, sinks included.
    """

    share: float = 0.25
    name: str = "window"

    def __post_init__(self) -> None:
        possible = is_number(self.share) and 0 < self.share <= 1
        require(possible, "draft_share", self.share, "a number in (0, 1]")

    def start(self, batch: int) -> Any:
        """Nothing."""
        return ()

    def pages(self, memory: Any, cache: KVCache) -> Pages | None:
        """By number alone."""
        planes = cache.layers[0].keys
        assert planes is not None, "a cache whose draft reads planes"
        b, k, tiles = planes.scale.shape[:3]
        coded = cache.quantized_length // cache.group_size  # [B]
        wanted = jnp.ceil(self.share * coded.astype(jnp.float32)).astype(jnp.int32)
        places = max(math.ceil(self.share * tiles), min(SINKS, tiles))
        count = jnp.minimum(jnp.clip(wanted, SINKS, places), coded)
        # The sinks, and then those before the buffer:
        #   place  0 | 1 …                 count − 1
        #   tile   0 | coded − count + 1 … coded − 1
        place = jnp.arange(places)[None]
        tile = jnp.where(place < SINKS, place, place + (coded - count)[:, None])
        return Pages(jnp.broadcast_to(tile[:, None], (b, k, tile.shape[1])), count)


SINKS = 1  # pages
ALL = All()
POLICIES: dict[str, Callable[..., Policy]] = {"all": All, "window": Window}


def policy(name: str, share: float | None) -> Policy:
    """A policy by its name and the share of the coded tokens that it reads; None: its own."""
    require(name in POLICIES, "draft_policy", name, ", ".join(POLICIES))
    return POLICIES[name]() if share is None else POLICIES[name](share)
