"""CalibQuant (arXiv 2502.14882): 1 bit a number, channel by channel over a whole prompt, scores
mended before the softmax.

    low = a min     high = a max     step = (high − low)/(2^b − 1)     code = round((x − low)/step)

    q·k̂ = (q ⊙ step)·code + q·low       the last term once a query ("post-scaling", section 3.2)
    o   = step ⊙ Σ p code + low Σ p
    scores in [lo, hi], a query's and head's own, are stretched to [lo + β₁, hi + β₂]

It was made for the many tokens of an image; here the prompt of a text takes their place, which is
not what its authors claim anything for. The mending (section 3.3) turns the order of scores round
where hi − lo < β₁ − β₂ = 3: as the authors', and said here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.methods.method import Layer, Method, View
from quantspec_jax.models.config import ModelConfig

BETAS = (0.0, -3.0)


def codes(x: jax.Array, bits: int, factor: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, and step and low of each channel, over the first axis; a constant channel is all 0."""
    low, high = (factor * end for end in (x.min(0, keepdims=True), x.max(0, keepdims=True)))
    step = (high - low) / (2**bits - 1)
    safe = jnp.where(step > 0, step, 1.0)
    return jnp.clip(jnp.round((x - low) / safe), 0, 2**bits - 1), step, low


def rounded(x: jax.Array, bits: int, factor: float) -> jax.Array:
    """Coded and read again."""
    code, step, low = codes(x, bits, factor)
    return low + step * code


def post_scaled_scores(q: jax.Array, code: jax.Array, step: jax.Array, low: jax.Array) -> jax.Array:
    """q [S, D] by keys' codes [T, D], step and low [1, D] → [S, T], without keys in between."""
    exact = jax.lax.Precision.HIGHEST
    scaled = jnp.matmul(q * step, code.T, precision=exact)
    return scaled + jnp.matmul(q, low.T, precision=exact)


def mended(scores: jax.Array, read: jax.Array) -> jax.Array:
    """Scores [..., T], where they are read, mapped affinely to a range of their own."""
    low = jnp.where(read, scores, jnp.inf).min(-1, keepdims=True)
    high = jnp.where(read, scores, -jnp.inf).max(-1, keepdims=True)
    wide = jnp.where(high > low, high - low, 1.0)
    stretched = low + BETAS[0] + (scores - low) * ((wide + BETAS[1] - BETAS[0]) / wide)
    return jnp.where(read & (high > low), stretched, scores)


@dataclasses.dataclass(frozen=True)
class CalibQuant(Method):
    """key_factor, value_factor: a; 1 bit needs ranges far narrower than the numbers'."""

    width: int = 1
    key_factor: float = 0.5
    value_factor: float = 0.3
    from_prompt: bool = dataclasses.field(default=True, kw_only=True)
    selects: bool = dataclasses.field(default=True, kw_only=True)
    sinks: int = dataclasses.field(default=4, kw_only=True)

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """With a step and a low a channel, for all tokens."""
        return self.width + 32 / tokens

    def compress(self, learned: Any, text: Layer, queries: jax.Array, prompt: int) -> View:
        """The prompt but its first tokens in codes; state: whether a token is of the prompt."""
        span = slice(self.sinks, prompt)
        factors = (self.key_factor, self.value_factor)
        read = (
            x.at[span].set(rounded(x[span], self.width, factor))
            for x, factor in zip(text, factors, strict=True)
        )
        return View(*Layer(*read), jnp.arange(len(text.keys)) < prompt)

    def weigh(self, state: Any, scores: jax.Array, read: jax.Array) -> jax.Array:
        """Of coded tokens, from 1 and 2 bits."""
        if self.width > 2:
            return scores
        at = jnp.arange(scores.shape[-1])
        coded = state & (at >= self.sinks)
        return mended(scores, read & coded[None, None, None])
