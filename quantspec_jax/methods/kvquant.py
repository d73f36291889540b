"""KVQuant (arXiv 2401.18079): non-uniform codes of keys before RoPE and of values, the few numbers
that stretch a range kept beside them as they are.

    z = (x − (hi + lo)/2) / ((hi − lo)/2)         x̂ = table[nearest to z] (hi − lo)/2 + (hi + lo)/2

    keys     lo and hi of a channel, from the text that is learned from
    values   lo and hi of a token, found as it comes

One table of 2^b numbers a layer, for keys and for values: k-means of all z within −1 … 1, weighted
by Fisher's information, the squared gradient of the loss at each number (section 3.3). Quantiles,
what counts as an outlier and the 50 steps are as in the authors' code; there scikit-learn makes the
tables, here the same algorithm in JAX.

Without outliers it shows which tokens are learned from. SmolLM2 on 2,048 tokens of Moby-Dick, 2
bits, no exact first token: perplexity 55.4 (full: 46.4), 0.773 and 0.808 of greedy and sampled
proposals accepted, from 8 × 1,024 tokens from all over a novel; 57.6, 0.760 and 0.791 from
16 × 1,024 of one place of it (benchmarks/codecs-kvquant-dense-smollm2-*.json).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quantspec_jax.methods.kmeans import code_of, lloyd_numbers
from quantspec_jax.methods.method import Layer, Method, channels, rows, shared_bits
from quantspec_jax.models.config import ModelConfig

OUTLIER_BITS = 32  # a value and an index, 16 each


class Tables(NamedTuple):
    """low, high [n] of the keys' channels; points [2^b] that keys and values are coded by, and what
    their codes are read as (Q-Norm; else the points)."""

    low: jax.Array
    high: jax.Array
    points: tuple[jax.Array, jax.Array]
    read_as: tuple[jax.Array, jax.Array]


class Ranged(NamedTuple):
    """Numbers x [N, n], with a middle and half a range each, and which are outliers."""

    x: jax.Array
    middle: jax.Array
    half: jax.Array
    outlier: jax.Array

    @property
    def normed(self) -> jax.Array:
        return (self.x - self.middle) / self.half

    @property
    def inside(self) -> jax.Array:
        return (~self.outlier).astype(jnp.float32)


def ranged(x: jax.Array, low: jax.Array, high: jax.Array, outlier: jax.Array) -> Ranged:
    """With bounds of x's shape; a range of nothing is one of 1."""
    half = (high - low) / 2
    return Ranged(x, (high + low) / 2, jnp.where(half > 0, half, 1.0), outlier)


def table(x: Ranged, weight: jax.Array, width: int) -> jax.Array:
    """The points [2^width] of all numbers that are no outliers. Section 3.3, equation 1."""
    return lloyd_numbers(jnp.clip(x.normed, -1, 1), weight * x.inside, 2**width)


def normalized(x: Ranged, points: jax.Array) -> jax.Array:
    """Q-Norm (section 3.5): points moved and stretched so that mean and deviation of what is read
    are those of what was coded."""
    z, inside = jnp.clip(x.normed, -1, 1), x.inside
    found = points[code_of(z, points)]

    def moments(numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = (numbers * inside).sum() / inside.sum()
        return mean, jnp.sqrt((((numbers - mean) ** 2) * inside).sum() / inside.sum())

    (mean, deviation), (coded_mean, coded_deviation) = moments(z), moments(found)
    ratio = deviation / jnp.where(coded_deviation > 0, coded_deviation, 1.0)
    return (points - coded_mean) * ratio + mean


def coded(x: Ranged, points: jax.Array, read_as: jax.Array) -> jax.Array:
    """Coded and read again, outliers as they are."""
    found = read_as[code_of(x.normed, points)] * x.half + x.middle
    return jnp.where(x.outlier, x.x, found)


@dataclasses.dataclass(frozen=True)
class KVQuant(Method):
    """outliers: the share that is kept apart, half of it at either end; 0: none, and ranges are
    whole."""

    width: int
    outliers: float = 0.01
    q_norm: bool = False
    before_rope: bool = dataclasses.field(default=True, kw_only=True)
    learns: bool = dataclasses.field(default=True, kw_only=True)
    weighted: bool = dataclasses.field(default=True, kw_only=True)
    sinks: int = dataclasses.field(default=1, kw_only=True)

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """Codes, two numbers a token for the values' range, outliers with their places, and the
        tables. How many keys exceed the range that was learned, the text decides."""
        n = channels(model)
        shared = shared_bits(2 * n + 2 * 2**self.width, model, tokens)
        return self.width + 32 / (2 * n) + self.outliers * OUTLIER_BITS + shared

    def fit(
        self, text: Layer, below: Layer | None, gradient: Layer | None = None
    ) -> tuple[Tables, Layer]:
        """Ranges of the keys' channels, and the points."""
        levels = jnp.array([self.outliers / 2, 1 - self.outliers / 2])
        low, high = jnp.quantile(rows(text.keys), levels, axis=0)
        found = self._ranged(text, low, high)
        weights = [jnp.ones_like(x.x) for x in found]
        if gradient is not None:
            weights = [rows(x) ** 2 for x in gradient]
        points = [table(x, weight, self.width) for x, weight in zip(found, weights, strict=True)]
        read_as = points
        if self.q_norm:
            read_as = [normalized(*both) for both in zip(found, points, strict=True)]
        learned = Tables(low, high, (points[0], points[1]), (read_as[0], read_as[1]))
        return learned, self.read(learned, text, None)

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """Of all heads of a token together."""
        found = self._ranged(text, learned.low, learned.high)
        read = map(coded, found, learned.points, learned.read_as)
        return Layer(*(x.reshape(text.keys.shape) for x in read))

    def _ranged(self, text: Layer, low: jax.Array, high: jax.Array) -> tuple[Ranged, Ranged]:
        keys, values = map(rows, text)
        low, high = (jnp.broadcast_to(x[None], keys.shape) for x in (low, high))
        beyond = (keys < low) | (keys > high)
        return (
            ranged(keys, low, high, beyond & (self.outliers > 0)),
            self._ranged_values(values),
        )

    def _ranged_values(self, values: jax.Array) -> Ranged:
        """A token's quantiles tell outliers, which are its median from then on; what is left tells
        the range."""
        outlier = jnp.zeros_like(values, bool)
        inner = values
        if self.outliers > 0:
            levels = jnp.array([self.outliers / 2, 1 - self.outliers / 2, 0.5])
            low, high, median = jnp.quantile(values, levels, axis=1, keepdims=True)
            outlier = (values <= low) | (values >= high)
            inner = jnp.where(outlier, median, values)
        low, high = inner.min(1, keepdims=True), inner.max(1, keepdims=True)
        return ranged(
            values,
            jnp.broadcast_to(low, values.shape),
            jnp.broadcast_to(high, values.shape),
            outlier,
        )
