"""Two 4-bit codes in a byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LAYOUT_VERSION = 1


def pair(codes: jax.Array, axis: int) -> jax.Array:
    """int8 codes −8..7 → uint8, first and second half along `axis` as low and high nibbles."""
    low, high = jnp.split((codes + 8).astype(jnp.uint8), 2, axis)
    return low | (high << 4)


def unpair(packed: jax.Array, axis: int) -> jax.Array:
    """The inverse of `pair`."""
    nibbles = [packed & 0xF, packed >> 4]
    return jnp.concatenate([x.astype(jnp.int8) - 8 for x in nibbles], axis)


def unsigned_halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes + 8 (0..15) of the first and of the second half of each group, uint8."""
    return packed & 0xF, packed >> 4
