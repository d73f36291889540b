"""Reductions of long rows: in two steps, of which the second is short.

On a GPU the first is a launch, and the second is part of whatever reads it.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 8192  # numbers of a row that one block of a GPU's threads goes through


def largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., N] float32 → [...] the largest number of each row, and int32 where it is first; NaN,
    and some place, where the row has one."""
    x = _in_parts(x, -jnp.inf)
    parts, chunk = x.shape[-2:]
    places = jnp.arange(parts * chunk, dtype=jnp.int32).reshape(parts, chunk)
    start = (np.float32(-np.inf), np.int32(0))
    found = jax.lax.reduce((x, jnp.broadcast_to(places, x.shape)), start, _larger, (x.ndim - 1,))
    most, place = (each[..., 0] for each in found)
    for i in range(1, parts):
        other, its_place = (each[..., i] for each in found)
        larger = (other > most) | (other != other)
        most, place = jnp.where(larger, other, most), jnp.where(larger, its_place, place)
    return most, place


def _larger(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> Any:
    """Of two numbers and their places the larger number, of equal ones the one that is first."""
    first = (a[0] > b[0]) | (a[0] != a[0])
    place = jnp.where(first | ((a[0] == b[0]) & (a[1] < b[1])), a[1], b[1])
    return jnp.where(first, a[0], b[0]), place


def total(x: jax.Array) -> jax.Array:
    """[..., N] → [...] sums."""
    parts = jnp.sum(_in_parts(x, 0), -1)
    return functools.reduce(operator.add, [parts[..., i] for i in range(parts.shape[-1])])


def _in_parts(x: jax.Array, filler: float) -> jax.Array:
    """[..., N] → [..., parts, chunk], filled up at its end."""
    n = x.shape[-1]
    parts = -(-n // CHUNK)
    chunk = -(-n // parts)
    beyond = [(0, 0)] * (x.ndim - 1) + [(0, parts * chunk - n)]
    return jnp.pad(x, beyond, constant_values=filler).reshape(*x.shape[:-1], parts, chunk)
