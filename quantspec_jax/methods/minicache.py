"""MiniCache (arXiv 2405.14366): pairs of layers of a model's upper half share the directions of
their keys and values, and keep their lengths.

    e = sin((1 − t)Ω)/sin Ω · a/‖a‖ + sin(tΩ)/sin Ω · b/‖b‖      Ω the angle of a and b (equation 3)
    â = ‖a‖ e        b̂ = ‖b‖ e

of each token and head, after RoPE; tokens whose cosine is among the lowest, less than d_min + γ
(d_max − d_min) of their head in a tile, stay as they are in both layers (section 4.2). The authors
released no code: t = 0.6, γ = 0.05 and the half are recalled; that heads are merged one by one is
inferred. Least and greatest are a tile's, so that no token's fate depends on what comes after it.

t decides more than γ. SmolLM2 on 2,048 tokens of Moby-Dick, greedy and sampled proposals that are
accepted: t = 0.6 0.524 and 0.603, t = 0.5 0.559 and 0.634; with γ = 0.2 0.557 and 0.624, 0.590 and
0.657; with one least and greatest for the whole text, at t = 0.6, 0.520 and 0.595.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.methods.method import Layer, Method
from quantspec_jax.models.config import ModelConfig

SMALL = 1e-4  # sin Ω below this: the straight line


def between(a: jax.Array, b: jax.Array, t: float) -> tuple[jax.Array, jax.Array]:
    """The unit vectors [..., D] on the way from a's direction to b's, and the cosines [..., 1]."""
    a, b = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-20) for x in (a, b))
    cosine = jnp.clip((a * b).sum(-1, keepdims=True), -1, 1)
    angle = jnp.arccos(cosine)
    sine = jnp.sin(angle)
    safe = jnp.where(sine > SMALL, sine, 1.0)
    weights = [jnp.where(sine > SMALL, jnp.sin(s * angle) / safe, s) for s in (1 - t, t)]
    found = weights[0] * a + weights[1] * b
    return found / jnp.maximum(jnp.linalg.norm(found, axis=-1, keepdims=True), 1e-20), cosine


def merged(
    own: jax.Array, other: jax.Array, upper: bool | jax.Array, t: float, kept: float, tile: int
) -> jax.Array:
    """What is read of `own` [T, K, D], `upper` of the pair or lower; `kept` is γ."""
    a, b = jnp.where(upper, other, own), jnp.where(upper, own, other)
    direction, cosine = between(a, b, t)
    low, high = _ends(cosine, tile)
    read = jnp.linalg.norm(own, axis=-1, keepdims=True) * direction
    return jnp.where(cosine < low + kept * (high - low), own, read)


def _ends(x: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """Of [T, K, 1] numbers, for each the least and the greatest of its tile."""
    tiles = jnp.pad(x, ((0, -len(x) % tile), (0, 0), (0, 0)), mode="edge")
    tiles = tiles.reshape(-1, tile, *x.shape[1:])
    low, high = (jnp.repeat(end(tiles, 1), tile, 0)[: len(x)] for end in (jnp.min, jnp.max))
    return low, high


@dataclasses.dataclass(frozen=True)
class MiniCache(Method):
    """t: where between the lower and the upper layer; kept: γ; start: the share of layers, from the
    first, that stay; tile: tokens."""

    t: float = 0.6
    kept: float = 0.05
    start: float = 0.5
    tile: int = 128
    paired: bool = dataclasses.field(default=True, kw_only=True)

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """A direction for two, two lengths a head; of the tokens that stay about γ, both, and a
        place."""
        merged = len(self._pairs(model.num_layers)) * 2 / model.num_layers
        pair = 16 * (1 / 2 + 1 / model.head_dim) + self.kept * (16 + 32 / model.head_dim)
        return (1 - merged) * 16 + merged * pair

    def read_bits(self, model: ModelConfig, tokens: int) -> float:
        """Every layer reads its direction: no fewer."""
        return 16.0

    def partner(self, known: Any, layer: int, layers: int) -> int:
        """The other of the pair."""
        pairs = self._pairs(layers)
        return {**dict(pairs), **{upper: lower for lower, upper in pairs}}.get(layer, layer)

    def prepare(self, model: Any, chunks: Any) -> list[Any]:
        """Whether a layer is of a pair, and the upper one."""
        layers = model.config.num_layers
        others = [self.partner((), layer, layers) for layer in range(layers)]
        return [(jnp.asarray(other != i), jnp.asarray(other < i)) for i, other in enumerate(others)]

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """Its length, the pair's direction."""
        assert other is not None
        paired, upper = learned
        read = (
            merged(own, others, upper, self.t, self.kept, self.tile)
            for own, others in zip(text, other, strict=True)
        )
        return Layer(*(jnp.where(paired, *x) for x in zip(read, text, strict=True)))

    def _pairs(self, layers: int) -> list[tuple[int, int]]:
        return [(i, i + 1) for i in range(int(layers * self.start), layers - 1, 2)]
