"""Coupled Quantization (arXiv 2405.03917): one code for a few channels together, because channels
depend on each other; "CQ-4c8b" is 8 bits for 4.

    C = argmin Σ_t (gᵀg)_t ‖x_t − nearest of C to x_t‖²      of each group of c neighbours of a head

g is the loss's gradient at the group, so that a codebook of 2^b points in R^c is best where it
matters (equation 6). No scales: bits a value are b/c exactly.

The authors released no code. Formulas and defaults are from summaries of the paper; that the first
tokens stay out of the fit, since their gradients would own the codebook, and are read as they are,
is this package's choice (`sinks`).

With that choice weights hardly matter: of SmolLM2's greedy proposals over 2,048 tokens of Moby-Dick
0.930 are accepted with them and 0.931 without. Where the first tokens are coded as well
(`sinks=0`), 0.885 are without weights (benchmarks/codecs-cq-unweighted-smollm2-*.json).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.methods.kmeans import kmeans, nearest
from quantspec_jax.methods.method import Layer, Method, channels, shared_bits
from quantspec_jax.models.config import ModelConfig

AT_ONCE = 16  # groups


def groups_of(x: jax.Array, size: int) -> jax.Array:
    """[N, K, D] → [K·D/size, N, size]: neighbours of a head."""
    return x.reshape(len(x), -1, size).swapaxes(0, 1)


def codebooks(x: jax.Array, weight: jax.Array, width: int, steps: int) -> jax.Array:
    """Of groups [groups, N, c] with weights [groups, N]: [groups, 2^width, c]."""
    keys = jax.random.split(jax.random.key(0), len(x))

    def learn(group: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return kmeans(*group, 2**width, steps)

    return jax.lax.map(learn, (keys, x, weight), batch_size=AT_ONCE)


@dataclasses.dataclass(frozen=True)
class Coupled(Method):
    """group: channels with one code; width: bits of its code; steps: of k-means. `weighted`: by the
    gradient, else every token counts alike."""

    group: int
    width: int = 8
    steps: int = 12
    before_rope: bool = dataclasses.field(default=True, kw_only=True)
    learns: bool = dataclasses.field(default=True, kw_only=True)
    weighted: bool = dataclasses.field(default=True, kw_only=True)
    sinks: int = dataclasses.field(default=4, kw_only=True)

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """Codes and codebooks."""
        books = shared_bits(2 * channels(model) * 2**self.width, model, tokens)
        return self.width / self.group + books

    def fit(
        self, text: Layer, below: Layer | None, gradient: Layer | None = None
    ) -> tuple[Any, Layer]:
        """A codebook of each group of keys and of values."""
        learned = []
        for i, x in enumerate(text):
            groups = groups_of(x, self.group)
            weight = jnp.ones(groups.shape[:2])
            if gradient is not None:
                slopes = groups_of(gradient[i], self.group)
                weight = (slopes * slopes).sum(-1)
            learned.append(codebooks(groups, weight, self.width, self.steps))
        return tuple(learned), self.read(tuple(learned), text, None)

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """The nearest point of each group."""

        def read(x: jax.Array, books: jax.Array) -> jax.Array:
            def of(group: tuple[jax.Array, jax.Array]) -> jax.Array:
                numbers, book = group
                return book[nearest(numbers, book)]

            found = jax.lax.map(of, (groups_of(x, self.group), books))
            return found.swapaxes(0, 1).reshape(x.shape)

        return Layer(*(read(*both) for both in zip(text, learned, strict=True)))
