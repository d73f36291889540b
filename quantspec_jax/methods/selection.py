"""What methods that read a part of the tokens have in common: the tokens' codes are those of the
planes, and a budget is a share of the tokens that are coded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.methods.method import Layer, Method, View
from quantspec_jax.methods.planes import Planes, as_read
from quantspec_jax.models.config import ModelConfig

EXACT = jax.lax.Precision.HIGHEST


def budgeted(scores: jax.Array, allowed: jax.Array, budget: jax.Array) -> jax.Array:
    """The `budget` allowed tokens of highest score, of equal ones the first: [..., T] booleans.
    `allowed`: of as many axes as the scores."""
    allowed = jnp.broadcast_to(allowed, scores.shape)
    place = _places(scores)
    least = _threshold(place, allowed, budget)
    above = allowed & (place > least)
    equal = allowed & (place == least)
    left = budget - above.sum(-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, -1) <= left))


def _places(x: jax.Array) -> jax.Array:
    """int32 in the order of float32 x: of negative numbers the magnitude's bits count down."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)  # −0 is 0
    return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def _threshold(place: jax.Array, allowed: jax.Array, budget: jax.Array) -> jax.Array:
    """The greatest number [..., 1] that `budget` allowed places reach, by bisection: a sort of each
    row takes longer. The least of all where fewer are allowed."""
    shape = (*place.shape[:-1], 1)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # enough places reach `low`, too few reach `high`
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = (allowed & (place >= middle)).sum(-1, keepdims=True) >= budget
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    ends = (jnp.full(shape, -(2**31), jnp.int32), jnp.full(shape, 2**31 - 1, jnp.int32))
    return jax.lax.fori_loop(0, 33, halve, ends)[0]


def heads_of(q: jax.Array, kv_heads: int) -> jax.Array:
    """Queries [S, H, D] → [K, R, S, D]."""
    s, h, d = q.shape
    return q.reshape(s, kv_heads, h // kv_heads, d).transpose(1, 2, 0, 3)


def best_of_group(q: jax.Array, keys: jax.Array) -> jax.Array:
    """Of queries [S, H, D] and keys, or what stands for some of them, [K, n, D]: the greatest
    product of the heads that read a kv head, [K, S, n]."""
    heads = heads_of(q, len(keys))
    return jnp.einsum("krsd,knd->krsn", heads, keys, precision=EXACT).max(1)


def observed_attention(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Of the last w queries [w, H, D] of a prompt and its keys [P, K, D]: probabilities
    [K, R, w, P], each query's of the keys up to its own."""
    heads = heads_of(queries, keys.shape[1])
    scores = jnp.einsum("krsd,tkd->krst", heads, keys, precision=EXACT)
    w, p = scores.shape[-2:]
    seen = jnp.arange(p)[None] <= (jnp.arange(w) + p - w)[:, None]
    scores = jnp.where(seen[None, None], scores * queries.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(scores, -1)


@dataclasses.dataclass(frozen=True)
class Selection(Method):
    """share: of the coded tokens, `first` ones among them, which are always read; layers from 0 to
    `whole_layers` read all. Tokens are read in `codes`, a view of the planes."""

    share: float = 0.25
    codes: str = "int8"
    first: int = 4
    whole_layers: int = 0
    group_size: int = 128
    of_planes: bool = dataclasses.field(default=True, kw_only=True)
    selects: bool = dataclasses.field(default=True, kw_only=True)

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """Every token stays where it is."""
        return self._planes.bits(model, tokens)

    def read_bits(self, model: ModelConfig, tokens: int) -> float:
        """The share's, all of the first layers, and what a selection is told by."""
        whole = min(self.whole_layers, model.num_layers) / model.num_layers
        share = whole + (1 - whole) * self.share
        return share * self.bits(model, tokens) + (1 - whole) * self.index_bits(model)

    def index_bits(self, model: ModelConfig) -> float:
        """Bits a value of the cache, of what is read to select."""
        return 0

    def prepare(self, model: Any, chunks: Any) -> list[jax.Array]:
        """Whether all tokens of a layer are read."""
        return [jnp.asarray(i < self.whole_layers) for i in range(model.config.num_layers)]

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """As the planes have it."""
        return self._planes.read((), text, None)

    def compress(self, learned: Any, text: Layer, queries: jax.Array, prompt: int) -> View:
        """The planes' view, whether all of it is read, and what `index` makes."""
        read = self.read(learned, text, None)
        return View(*read, (learned, self.index(read, queries, prompt)))

    def keep(self, state: Any, q: jax.Array, bound: jax.Array) -> jax.Array:
        """The first tokens, and those that `chosen` says."""
        whole, index = state
        return whole | self.chosen(index, q, bound)

    def index(self, text: Layer, queries: jax.Array, prompt: int) -> Any:
        """What a selection is made from: of the tokens [T, K, D] as they are read, or of a prompt
        and its last queries."""
        raise NotImplementedError

    def chosen(self, index: Any, q: jax.Array, bound: jax.Array) -> jax.Array:
        """[K, S or 1, T] booleans, as `keep`."""
        raise NotImplementedError

    @property
    def _planes(self) -> Planes:
        return as_read(self.codes, self.group_size)

    def within_budget(self, scores: jax.Array, bound: jax.Array) -> jax.Array:
        """The first tokens and those of highest score [K, S, T] before `bound`."""
        at = jnp.arange(scores.shape[-1])[None, None]
        scores = jnp.where(at < self.first, jnp.inf, scores)
        budget = jnp.round(self.share * bound.astype(jnp.float32)).astype(jnp.int32)
        return budgeted(scores, at < bound, jnp.maximum(budget, self.first))
