"""AQUA-KV (arXiv 2501.19392): a layer stores what a linear map of the layer below cannot predict.

    k̃ = P [k̂₋₁; 1]                k̂ = k̃ + Q(k − k̃)          k before RoPE, all heads of a token
    ṽ = M [k̂; v̂₋₁; 1]             v̂ = ṽ + Q(v − ṽ)          the keys of this layer come first

k̂₋₁ and v̂₋₁ are what the layer below came to, so that whoever reads sees what whoever wrote saw, and
errors do not add up. Q is HIGGS; the first layer is coded by it alone, in 4 bits. P and M are ridge
regressions in closed form (section 3.2), fitted layer by layer on what the unmodified model does.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quantspec_jax.methods import higgs
from quantspec_jax.methods.method import Layer, Method, channels, rows, shared_bits
from quantspec_jax.models.config import ModelConfig

RIDGE = 1e-3  # λ, over the mean of the diagonal
HIGHEST = jax.lax.Precision.HIGHEST


class Predictors(NamedTuple):
    """of_keys [n + 1, n] and of_values [2 n + 1, n]; the last row is the bias."""

    of_keys: jax.Array
    of_values: jax.Array


class Coded(NamedTuple):
    """Of a layer's residuals, [T, n] each: HIGGS' codes."""

    keys: higgs.Codes
    values: higgs.Codes


def regression(inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """W [m + 1, n] so that [inputs [N, m], 1] W is near to outputs [N, n]: least squares with
    λ mean|diag C| on the diagonal of C = Σ xxᵀ. Both are centred first, so that the bias costs
    nothing: of keys with large biases λ would shrink all else."""
    middle, mean = (x.mean(0, keepdims=True) for x in (inputs, outputs))
    x, outputs = inputs - middle, outputs - mean
    if not x.shape[1]:
        return mean
    c = jnp.matmul(x.T, x, precision=HIGHEST)
    c += RIDGE * jnp.abs(jnp.diagonal(c)).mean() * jnp.eye(len(c), dtype=c.dtype)
    slopes = jnp.linalg.solve(c, jnp.matmul(x.T, outputs, precision=HIGHEST))
    bias = mean - jnp.matmul(middle, slopes, precision=HIGHEST)
    return jnp.concatenate([slopes, bias])


def _half(x: jax.Array) -> jax.Array:
    """In the 16 bits that parameters are stored in."""
    return x.astype(jnp.float16).astype(jnp.float32)


def _with_one(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1)


def _predicted(weights: jax.Array, inputs: jax.Array) -> jax.Array:
    return jnp.matmul(_with_one(inputs), weights, precision=HIGHEST)


@dataclasses.dataclass(frozen=True)
class Aqua(Method):
    """width: of the codes of all layers but the first, which has `first_width`. half: scales are
    numbers of 16 bits, as a file holds them."""

    width: int
    first_width: int = 4
    half: bool = False
    before_rope: bool = dataclasses.field(default=True, kw_only=True)
    learns: bool = dataclasses.field(default=True, kw_only=True)
    stacked: bool = dataclasses.field(default=True, kw_only=True)
    sinks: int = dataclasses.field(default=4, kw_only=True)

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """Codes, scales, and the predictors' parameters shared by all tokens."""
        n, layers = channels(model), model.num_layers
        codes = [higgs.code_bits(width, n) for width in (self.first_width, self.width)]
        predictors = shared_bits(3 * n * n + 2 * n, model, tokens)
        return (codes[0] + (layers - 1) * (codes[1] + predictors)) / layers

    def operations(self, model: ModelConfig) -> float:
        """P and M, of every token, in every layer but the first."""
        return 6 * channels(model) ** 2 * (model.num_layers - 1)

    def fit(
        self, text: Layer, below: Layer | None, gradient: Layer | None = None
    ) -> tuple[Any, Layer]:
        """P and M of a layer; of the first, which nothing predicts, the means."""
        if below is None:
            nothing = [rows(x)[:, :0] for x in text]
            means = (_half(regression(*x)) for x in zip(nothing, map(rows, text), strict=True))
            learned = Predictors(*means)
            return learned, self.read(learned, text, None)
        keys, values = map(rows, text)
        below_keys, below_values = map(rows, below)
        of_keys = _half(regression(below_keys, keys))
        read = self._residual(keys, _predicted(of_keys, below_keys))
        inputs = jnp.concatenate([read, below_values], 1)
        of_values = _half(regression(inputs, values))
        made = self._residual(values, _predicted(of_values, inputs))
        return Predictors(of_keys, of_values), _like(text, read, made)

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """What the codes of a layer's residuals and the layer below come to."""
        return _like(text, *self.encode(learned, text, other)[1])

    def encode(self, learned: Any, text: Layer, below: Layer | None) -> tuple[Coded, Layer]:
        """The codes of a layer's residuals, and what they and the layer below come to, [T, n]."""
        width = self.width_of(below)
        keys, values = map(rows, text)
        predicted = _predicted_keys(learned, below)
        coded = higgs.encode(keys - predicted, width, self.half)
        read = predicted + higgs.decode(coded, width)
        predicted = _predicted_values(learned, read, below)
        coded_values = higgs.encode(values - predicted, width, self.half)
        made = predicted + higgs.decode(coded_values, width)
        return Coded(coded, coded_values), Layer(read, made)

    def decode(self, learned: Any, coded: Coded, below: Layer | None) -> Layer:
        """The latter, from the codes: [T, n]."""
        width = self.width_of(below)
        read = _predicted_keys(learned, below) + higgs.decode(coded.keys, width)
        predicted = _predicted_values(learned, read, below)
        return Layer(read, predicted + higgs.decode(coded.values, width))

    def width_of(self, below: Any) -> int:
        """Bits of a value's code in a layer with another below it, and in the first (None)."""
        return self.first_width if below is None else self.width

    def _residual(self, x: jax.Array, predicted: jax.Array) -> jax.Array:
        return predicted + higgs.rounded(x - predicted, self.width, self.half)


def _predicted_keys(learned: Any, below: Layer | None) -> jax.Array | float:
    """By the layer below; in the first layer the mean, 0 where none was learned."""
    if below is None:
        return learned.of_keys if learned else 0.0
    return _predicted(learned.of_keys, rows(below.keys))


def _predicted_values(learned: Any, keys: jax.Array, below: Layer | None) -> jax.Array | float:
    """By this layer's keys, as they are read, and the layer below."""
    if below is None:
        return learned.of_values if learned else 0.0
    return _predicted(learned.of_values, jnp.concatenate([keys, rows(below.values)], 1))


def _like(text: Layer, keys: jax.Array, values: jax.Array) -> Layer:
    return Layer(keys.reshape(text.keys.shape), values.reshape(text.values.shape))
