"""SKVQ (arXiv 2405.06219): a token's channels in groups that have about the same range, each
rounded between bounds that clip a little; scales and minima in 8-bit floats.

    low = α min   high = α max   step = (high − low)/levels   code = round((x − low)/step), clipped

Which channels form a group is learned: k-means of (min, max) of each channel over a text, of all
heads together, so that groups have unequal sizes. Step and low are rounded to e4m3 after the codes
were made, and keys are coded before RoPE, as in the authors' code. There α, which the paper
searches for each group, is one number.

With two or three groups (64 channels each, few heads) a perplexity hangs on where they part: on
SmolLM2, 2 bits, it is 67 to 83 by the tokens that are learned from (full: 46; 4 × 1,024 or 16 ×
1,024 tokens of one novel, the first of each chunk among them or not), and two solutions whose
objective differs by 0.07% differ by 2%. Large biases of keys (Qwen2.5's first layers) cost most of
what is lost there (benchmarks/key_biases.py; see `higgs`, too).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.methods.kmeans import kmeans, nearest
from quantspec_jax.methods.method import Layer, Method, channels, rows, shared_bits
from quantspec_jax.models.config import ModelConfig

STARTS = 10  # of k-means; the best counts
STEPS = 30
LEAST_STEP = 1e-5
E4M3, LARGEST = jnp.float8_e4m3fn, 448.0


def grouping(x: jax.Array, groups: int) -> jax.Array:
    """[N, n] → the group of each channel [n]. Section 3.2."""
    ends = jnp.stack([x.min(0), x.max(0)], 1)
    ones = jnp.ones(len(ends))

    def start(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        centers = kmeans(key, ends, ones, groups, STEPS)
        label = nearest(ends, centers)
        off = ends - centers[label]
        return label, (off * off).sum()

    labels, errors = jax.vmap(start)(jax.random.split(jax.random.key(0), STARTS))
    return labels[jnp.argmin(errors)]


def rounded(
    x: jax.Array,
    label: jax.Array,
    groups: int,
    levels: int,
    clip: float,
    centred: bool = False,
    e4m3: bool = True,
) -> jax.Array:
    """[N, n] in `levels` + 1 codes and read again; bounds of each token and group. `centred`: they
    are drawn to the middle of the group, in place of to 0. `e4m3`: low and step are rounded."""
    own = label[None] == jnp.arange(groups)[:, None]  # [groups, n]

    def bound(reduce: Any, nothing: float) -> jax.Array:
        return reduce(jnp.where(own[None], x[:, None], nothing), -1)  # [N, groups]

    low, high = bound(jnp.min, jnp.inf), bound(jnp.max, -jnp.inf)
    middle = (low + high) / 2 if centred else jnp.zeros_like(low)
    low, high = (middle + clip * (end - middle) for end in (low, high))
    step = jnp.maximum((high - low) / levels, LEAST_STEP)
    codes = jnp.clip(jnp.round((x - low[:, label]) / step[:, label]), 0, levels)
    low, step = (_eight_bits(end) if e4m3 else end for end in (low, step))
    return low[:, label] + step[:, label] * codes


def _eight_bits(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -LARGEST, LARGEST).astype(E4M3).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Skvq(Method):
    """key_levels, value_levels: steps between bounds, 3 of them in 2 bits; 2, which the paper calls
    1.5 bits, are three codes. group: channels, in the mean. sorts: groups are learned, else they
    are neighbours."""

    key_levels: int = 3
    value_levels: int = 3
    group: int = 64
    clip: float = 0.92
    centred: bool = False
    sorts: bool = True
    before_rope: bool = dataclasses.field(default=True, kw_only=True)
    learns: bool = dataclasses.field(default=True, kw_only=True)
    sinks: int = dataclasses.field(default=5, kw_only=True)

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """Three codes are log₂ 3 bits here; a step and a low of 8 bits each a group; a channel's
        place."""
        n = channels(model)
        codes = (math.log2(self.key_levels + 1) + math.log2(self.value_levels + 1)) / 2
        return codes + 16 * self._groups(n) / n + shared_bits(2 * n, model, tokens)

    def learner(self) -> Skvq:
        """A group's channels, whatever its levels and bounds; of all tokens, the first ones too, as
        in the authors' code."""
        learnt = ("group", "sorts", "before_rope")
        return Skvq(**{name: getattr(self, name) for name in learnt}, sinks=0)

    def fit(
        self, text: Layer, below: Layer | None, gradient: Layer | None = None
    ) -> tuple[Any, Layer]:
        """The groups of keys' and of values' channels."""
        learned = tuple(self._labels(rows(x)) for x in text)
        return learned, self.read(learned, text, None)

    def _labels(self, x: jax.Array) -> jax.Array:
        n, groups = x.shape[1], self._groups(x.shape[1])
        return grouping(x, groups) if self.sorts else jnp.arange(n) * groups // n

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """Of all heads of a token together."""
        levels = (self.key_levels, self.value_levels)
        return Layer(
            *(
                rounded(
                    rows(x), label, self._groups(len(label)), level, self.clip, self.centred
                ).reshape(x.shape)
                for x, label, level in zip(text, learned, levels, strict=True)
            )
        )

    def _groups(self, n: int) -> int:
        return max(1, n // self.group)
