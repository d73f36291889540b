"""What is left of a row of scores."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kept(NamedTuple):
    """Of each row the tokens that are left: those above a score, and the first of those at it.

    most   [B, S] float32, the largest score
    least  [B, S] float32: what is above it is left; it need not be a score
    last   [B, S] int32, the last place whose score may equal `least`
    mass   [B, S] float32, Σ exp((score − most) / temperature) of what is left
    """

    most: jax.Array
    least: jax.Array
    last: jax.Array
    mass: jax.Array

    def of(self, scores: jax.Array) -> jax.Array:
        """[B, S, N] bool: which of the scores are left."""
        place = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None]
        least = self.least[..., None]
        return (scores > least) | ((scores == least) & (place <= self.last[..., None]))

    def probabilities(self, scores: jax.Array, temperature: jax.Array) -> jax.Array:
        """[B, S, N] float32, 0 for what is not left."""
        shares = weights(scores, self.most, temperature) / self.mass[..., None]
        return jnp.where(self.of(scores), shares, 0.0)


def weights(scores: jax.Array, most: jax.Array, temperature: jax.Array) -> jax.Array:
    """[B, S, N] exp((score − most) / temperature); temperature 0 counts as 1."""
    # Subtracting first keeps the smallest temperatures from overflowing.
    divisor = jnp.where(temperature > 0, temperature, 1.0)[:, None, None]
    return jnp.exp((scores - most[..., None]) / divisor)
