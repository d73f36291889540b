"""Weighted k-means: of points (Lloyd's algorithm, begun as k-means++ does) and of numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST
BINS = 1 << 14  # of numbers from −1 to 1
AT_ONCE = 1 << 16  # distances that exist at a time on a CPU: what its cache holds
GPU_TIMES = 1 << 6  # so many more on a GPU


def nearest(x: jax.Array, centers: jax.Array) -> jax.Array:
    """Of each point [N, c] the number of the nearest of centers [k, c]."""

    def of(some: jax.Array) -> jax.Array:
        product = jnp.matmul(some, centers.T, precision=HIGHEST)
        return greatest(2 * product - (centers * centers).sum(-1)[None])

    return by_chunks(of, x, len(centers))


def greatest(x: jax.Array) -> jax.Array:
    """argmax of the last axis: as two reductions, which a CPU does many numbers at a time."""
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    found = jnp.where(x == x.max(-1, keepdims=True), places, x.shape[-1] - 1)
    return found.min(-1)


def by_chunks(of: Callable[[jax.Array], jax.Array], x: jax.Array, distances: int) -> jax.Array:
    """`of` of points [N, c], so many at a time as make few distances, each point `distances`."""
    times = GPU_TIMES if jax.default_backend() == "gpu" else 1
    chunk = max(1, times * AT_ONCE // distances)
    if len(x) <= chunk:
        return of(x)
    whole = jnp.pad(x, ((0, -len(x) % chunk), (0, 0)))
    return jax.lax.map(of, whole.reshape(-1, chunk, x.shape[1])).reshape(-1)[: len(x)]


def means(x: jax.Array, weight: jax.Array, label: jax.Array, centers: jax.Array) -> jax.Array:
    """The weighted mean of each label's points; a center without points stays."""
    total = jax.ops.segment_sum(weight, label, len(centers))[:, None]
    found = jax.ops.segment_sum(weight[:, None] * x, label, len(centers))
    return jnp.where(total > 0, found / jnp.where(total > 0, total, 1.0), centers)


@partial(jax.jit, static_argnames=("k", "steps"))
def kmeans(key: jax.Array, x: jax.Array, weight: jax.Array, k: int, steps: int) -> jax.Array:
    """Centers [k, c] of points [N, c] with weights [N] ≥ 0: argmin Σ weight ‖x − center‖²."""
    uniform = jax.random.uniform(key, (k,))

    def draw(chance: jax.Array, i: jax.Array | int) -> jax.Array:
        total = jnp.cumsum(chance)
        return x[jnp.minimum(jnp.searchsorted(total, uniform[i] * total[-1]), len(x) - 1)]

    start = jnp.full((k, x.shape[1]), jnp.inf).at[0].set(draw(weight, 0))

    def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        centers, off = carry
        last = x - centers[i - 1][None]
        off = jnp.minimum(off, (last * last).sum(-1))
        return centers.at[i].set(draw(weight * off, i)), off

    centers, _ = jax.lax.fori_loop(1, k, add, (start, jnp.full(len(x), jnp.inf)))

    def lloyd(_: jax.Array, centers: jax.Array) -> jax.Array:
        return means(x, weight, nearest(x, centers), centers)

    return jax.lax.fori_loop(0, steps, lloyd, centers)


def lloyd_numbers(x: jax.Array, weight: jax.Array, k: int, steps: int = 50) -> jax.Array:
    """[k] numbers, ascending: k-means of numbers from −1 to 1 with weights, of the same shape,
    begun at even quantiles. Neighbours within 2/16,384 are taken together."""
    edges = jnp.clip(((x.reshape(-1) + 1) * (BINS / 2)).astype(jnp.int32), 0, BINS - 1)
    mass = jax.ops.segment_sum(weight.reshape(-1), edges, BINS)
    moment = jax.ops.segment_sum((weight * x).reshape(-1), edges, BINS)
    total = jnp.cumsum(mass)
    quantiles = (jnp.arange(k, dtype=jnp.float32) + 0.5) / k * total[-1]
    centers = (jnp.searchsorted(total, quantiles).astype(jnp.float32) + 0.5) * (2 / BINS) - 1
    middles = (jnp.arange(BINS, dtype=jnp.float32) + 0.5) * (2 / BINS) - 1

    def lloyd(_: jax.Array, centers: jax.Array) -> jax.Array:
        label = code_of(middles, centers)
        own = jax.ops.segment_sum(mass, label, k)
        found = jax.ops.segment_sum(moment, label, k)
        return jnp.where(own > 0, found / jnp.where(own > 0, own, 1.0), centers)

    return jax.lax.fori_loop(0, steps, lloyd, centers)


def code_of(x: jax.Array, points: jax.Array) -> jax.Array:
    """The number of the nearest of ascending `points` [k]."""
    return jnp.searchsorted((points[1:] + points[:-1]) / 2, x)
