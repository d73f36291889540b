"""Tokens that a query's own scores choose: page by page, by what bounds a page's scores (Quest,
arXiv 2406.10774) or by its mean key; and the best tokens of all, which no index finds, for
comparison.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.checks import require
from quantspec_jax.methods.method import Layer
from quantspec_jax.methods.selection import EXACT, Selection, best_of_group, heads_of
from quantspec_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TopTokens(Selection):
    """The tokens of highest score."""

    def index(self, text: Layer, queries: jax.Array, prompt: int) -> Any:
        """The keys, [K, T, D]."""
        return text.keys.swapaxes(0, 1)

    def index_bits(self, model: ModelConfig) -> float:
        """All keys: half of the values of the cache."""
        return {"int8": 8.25, "int4": 4.25}[self.codes] / 2

    def chosen(self, index: Any, q: jax.Array, bound: jax.Array) -> jax.Array:
        """Of a query and a kv head."""
        return self.within_budget(best_of_group(q, index), bound)


@dataclasses.dataclass(frozen=True)
class TopPages(Selection):
    """page: tokens that are read together. by: "bounds", the greatest score that keys between a
    page's least and greatest could have, or "mean", that of its mean key."""

    page: int = 32
    by: str = "bounds"
    first: int = 16
    whole_layers: int = 2

    def __post_init__(self) -> None:
        require(self.by in ("bounds", "mean"), "by", self.by, "bounds, mean")
        divides = self.group_size % self.page == 0
        require(divides, "page", self.page, f"a divisor of the group size {self.group_size}")

    def index(self, text: Layer, queries: jax.Array, prompt: int) -> Any:
        """[K, pages, D]: two numbers a channel of a page, or one."""
        keys = text.keys.swapaxes(0, 1)
        pages = keys.reshape(len(keys), -1, self.page, keys.shape[-1])
        return (pages.min(2), pages.max(2)) if self.by == "bounds" else (pages.mean(2),)

    def index_bits(self, model: ModelConfig) -> float:
        """In 16 bits a number, for the keys, half of the values."""
        return 16 * (2 if self.by == "bounds" else 1) / self.page / 2

    def chosen(self, index: Any, q: jax.Array, bound: jax.Array) -> jax.Array:
        """Whole pages in the order of their scores; the last is cut where the budget ends."""
        if self.by == "mean":
            scores = best_of_group(q, index[0])
        else:
            heads = heads_of(q, len(index[0]))
            parts = zip((jnp.minimum(heads, 0), jnp.maximum(heads, 0)), index, strict=True)
            low, high = (
                jnp.einsum("krsd,knd->krsn", part, end, precision=EXACT) for part, end in parts
            )
            scores = (low + high).max(1)
        return self.within_budget(jnp.repeat(scores, self.page, -1), bound)
