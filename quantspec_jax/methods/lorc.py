"""LoRC (arXiv 2410.03111): keys and values in fewer numbers, by the singular vectors of the weights
that make them.

    W = U Σ Vᵀ        stored: c = h U_r Σ_r        read: c V_rᵀ = (h W) V_r V_rᵀ

so that what is read of keys (before RoPE) and values is a fixed projection of them; a bias is taken
off before and put back. W has its norm's gain folded in unless `folds` is off, which is worth a few
points of what drafts get accepted (benchmarks/codecs-lorc-smollm2-*.json), and the heads of a layer
share r numbers.
Layers differ in rank (section 3.3): κ_l = κ(W_k) κ(W_v), κ̃_l = Π_{j ≥ l} κ_j, and the greater κ̃ the
more stays, between two ranks by log κ̃.

The authors released no code. The projection is derived here; how κ̃ becomes a rank is recalled, its
normalization not known, and one rank for all layers (`spread` 0) is the default. `learned_from`
"text" takes the singular vectors of a text's activations in place of the weights': for comparison.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantspec_jax.checks import require
from quantspec_jax.methods.method import Layer, Method, channels, rows, shared_bits
from quantspec_jax.models.config import ModelConfig

EXACT = jax.lax.Precision.HIGHEST


class Projection(NamedTuple):
    """onto [n, n] = V_r V_rᵀ, and the bias [n] that is none of it."""

    onto: jax.Array
    bias: jax.Array


def right_vectors(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V [n, n], columns by falling singular value, and the singular values, of [E, n]."""
    _, values, vectors = np.linalg.svd(np.asarray(weight, np.float64), full_matrices=False)
    return vectors.T, values


def ranks(conditions: np.ndarray, share: float, spread: float, n: int) -> list[int]:
    """A rank a layer, `share`·n in the mean, spread·n at most beyond it, by log κ̃."""
    log = np.cumsum(np.log(conditions)[::-1])[::-1]
    place = (log - log.min()) / (np.ptp(log) or 1)
    found = share + spread * (place - place.mean())
    return [int(np.clip(round(each * n), 1, n)) for each in found]


@dataclasses.dataclass(frozen=True)
class LoRC(Method):
    """share: of the numbers, that stay; folds: the norm's gain is part of the weights."""

    share: float = 0.5
    spread: float = 0.0
    learned_from: str = "weights"
    folds: bool = True
    before_rope: bool = dataclasses.field(default=True, kw_only=True)
    learns: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        allowed = ("weights", "text")
        require(self.learned_from in allowed, "learned_from", self.learned_from, ", ".join(allowed))
        object.__setattr__(self, "learns", self.learned_from == "text")

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """16 a number that stays, and V_r."""
        n = channels(model)
        return self.share * 16 + shared_bits(2 * self.share * n * n, model, tokens)

    def operations(self, model: ModelConfig) -> float:
        """Keys are rebuilt, since RoPE turns them after; values wait for the sum over tokens."""
        return 2 * self.share * channels(model) ** 2 * model.num_layers

    def prepare(self, model: Any, chunks: Any) -> list[Any]:
        """From the weights."""
        config = model.config
        if self.learned_from == "text":
            return [()] * config.num_layers
        require(not config.qk_norm, "LoRC", "a model that norms its keys", "keys linear in a norm")
        layers = [model.params["layers"][str(i)] for i in range(config.num_layers)]
        found = [[_weight(layer, name, self.folds) for name in ("k", "v")] for layer in layers]
        vectors = [[right_vectors(weight) for weight in both] for both in found]
        conditions = [np.prod([s[0] / s[-1] for _, s in both]) for both in vectors]
        n = channels(config)
        wanted = ranks(np.array(conditions), self.share, self.spread, n)
        return [
            tuple(
                Projection(_onto(v, rank), _bias(layer, name, n))
                for (v, _), name in zip(both, ("k", "v"), strict=True)
            )
            for layer, both, rank in zip(layers, vectors, wanted, strict=True)
        ]

    def fit(
        self, text: Layer, below: Layer | None, gradient: Layer | None = None
    ) -> tuple[Any, Layer]:
        """From a text's second moments."""
        learned = []
        for x in map(rows, text):
            _, vectors = jnp.linalg.eigh(jnp.matmul(x.T, x, precision=EXACT))
            top = vectors[:, -round(self.share * x.shape[1]) :]
            onto = jnp.matmul(top, top.T, precision=EXACT)
            learned.append(Projection(onto, jnp.zeros_like(x[0])))
        return tuple(learned), self.read(tuple(learned), text, None)

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """Projected."""
        return Layer(
            *(
                (
                    jnp.matmul(rows(x) - to.bias[None], to.onto, precision=EXACT) + to.bias[None]
                ).reshape(x.shape)
                for x, to in zip(text, learned, strict=True)
            )
        )


def _weight(layer: Any, name: str, folds: bool) -> np.ndarray:
    """[E, n] of the norm's output, before its gain where that is folded in."""
    weight = np.asarray(layer[name]["kernel"], np.float64)
    return np.asarray(layer["attention_norm"], np.float64)[:, None] * weight if folds else weight


def _bias(layer: Any, name: str, n: int) -> jax.Array:
    bias = layer[name].get("bias")
    return jnp.zeros(n) if bias is None else jnp.asarray(bias, jnp.float32).reshape(n)


def _onto(vectors: np.ndarray, rank: int) -> jax.Array:
    top = vectors[:, :rank]
    return jnp.asarray(top @ top.T, jnp.float32)
