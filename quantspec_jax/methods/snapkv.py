"""SnapKV (arXiv 2404.14469): at a prompt's end, the tokens that its last queries attended to.

    votes_t = Σ of the last w queries' probabilities of t        pooled over neighbours (equation 4)

The share of highest votes stays, and the last w; what comes later stays, too. Votes are summed over
the heads that read a kv head (the authors repeat keys to all heads first).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.checks import require
from quantspec_jax.methods.method import Layer
from quantspec_jax.methods.selection import Selection, budgeted, observed_attention

POOLS = ("none", "average", "max")


def pooled(votes: jax.Array, pool: str, width: int) -> jax.Array:
    """[K, P], each with its neighbours within a window; zeros beyond the ends, for "average"."""
    if pool == "none":
        return votes
    nothing, reduce = (0.0, jax.lax.add) if pool == "average" else (-jnp.inf, jax.lax.max)
    found = jax.lax.reduce_window(votes, nothing, reduce, (1, width), (1, 1), "SAME")
    return found / width if pool == "average" else found


def voted(
    queries: jax.Array, keys: jax.Array, budget: int, pool: str = "none", width: int = 1
) -> jax.Array:
    """Which tokens of a prompt stay, [K, P]: `budget` of those before the last w, and these."""
    w, p = len(queries), len(keys)
    votes = observed_attention(queries, keys)[..., : p - w].sum((1, 2))
    stays = budgeted(pooled(votes, pool, width), jnp.ones((1, p - w), bool), jnp.asarray(budget))
    return jnp.concatenate([stays, jnp.ones((len(stays), w), bool)], 1)


@dataclasses.dataclass(frozen=True)
class SnapKV(Selection):
    """pool: none, average or max of `width` neighbours. First tokens have to win votes, too."""

    first: int = 0
    pool: str = "none"
    width: int = 7
    from_prompt: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        require(self.pool in POOLS, "pool", self.pool, ", ".join(POOLS))

    def index(self, text: Layer, queries: jax.Array, prompt: int) -> Any:
        """What stays of the prompt, and all that comes later [K, T]."""
        budget = max(0, round(self.share * prompt) - len(queries))
        stays = voted(queries, text.keys[:prompt], budget, self.pool, self.width)
        later = jnp.ones((len(stays), len(text.keys) - prompt), bool)
        return jnp.concatenate([stays, later], 1)

    def chosen(self, index: Any, q: jax.Array, bound: jax.Array) -> jax.Array:
        """Whatever the query."""
        return index[:, None]
