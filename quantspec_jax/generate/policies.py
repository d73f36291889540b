"""Draft policies: which part of the cache a draft pass reads. The target reads all of it, always.

A policy is a frozen dataclass, part of what a program is compiled for. What it remembers of each
sequence is a pytree of arrays with the batch first, in the decode state.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from quantspec_jax.cache import KVCache


class Policy(Protocol):
    """Which pages a draft reads."""

    @property
    def name(self) -> str: ...

    def start(self, batch: int) -> Any:
        """What is remembered of `batch` sequences before their first round."""
        ...

    def pages(self, memory: Any, cache: KVCache) -> jax.Array | None:
        """[B, K, T/G] bool, the tiles to read, for all steps of a round; None: all of them."""
        ...


@dataclasses.dataclass(frozen=True)
class All:
    """Every page: QuantSpec as published."""

    name: str = "all"

    def start(self, batch: int) -> Any:
        """Nothing."""
        return ()

    def pages(self, memory: Any, cache: KVCache) -> jax.Array | None:
        """All."""
        return None


@dataclasses.dataclass(frozen=True)
class Window:
    """The first pages, where attention sinks lie, and the most recent ones: StreamingLLM (Xiao et
    al., arXiv 2309.17453) over the draft's view.

    Args:
      sinks, recent: pages (tiles of G tokens) that are read, beside the buffer.
    """

    sinks: int = 1
    recent: int = 4
    name: str = "window"

    def start(self, batch: int) -> Any:
        """Nothing."""
        return ()

    def pages(self, memory: Any, cache: KVCache) -> jax.Array | None:
        """By number alone."""
        planes = cache.layers[0].keys
        if planes is None:
            return None
        b, k, tiles = planes.scale.shape[:3]
        tile = jnp.arange(tiles)
        first = (cache.quantized_length // cache.group_size - self.recent)[:, None]
        read = (tile < self.sinks) | (tile >= first)
        return jnp.broadcast_to(read[:, None], (b, k, tiles))


ALL = All()
POLICIES: dict[str, type[Policy]] = {"all": All}
