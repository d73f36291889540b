"""What the last queries of a prompt attend to."""

from __future__ import annotations

import jax
import jax.numpy as jnp

CHUNK = 4096  # keys at a time


def last_queries_mass(
    q: jax.Array, k: jax.Array, length: jax.Array, queries: int, sm_scale: float
) -> jax.Array:
    """The attention mass of each token, summed over the `queries` last positions of a prompt and
    over the query heads that share its key. In two walks over the keys, for their log-sum-exp and
    for the masses, so that scores exist for a chunk of them at a time.

    Args:
      q: [B, P, H, D] queries after RoPE; k: [B, P, K, D] keys; valid below `length` [B].

    Returns:
      [B, K, P] float32; 0 from `length` on.
    """
    b, p, h, d = q.shape
    heads = k.shape[2]
    position = length[:, None] - queries + jnp.arange(queries)[None]  # [B, W]; < 0: no such query
    last = jnp.take_along_axis(q, jnp.maximum(position, 0)[:, :, None, None], 1)
    rows = last.reshape(b, queries, heads, h // heads, d)
    width = min(CHUNK, p)
    chunks = -(-p // width)

    def begin(i: jax.Array) -> jax.Array:  # the last chunk is moved back to end with the keys
        return jnp.minimum(i * width, p - width)

    def scores(i: jax.Array, first: jax.Array) -> jax.Array:
        """[B, K, R, W, width] of a chunk, without what comes before token number `first`."""
        keys = jax.lax.dynamic_slice_in_dim(k, begin(i), width, 1)
        token = (begin(i) + jnp.arange(width))[None, None]
        found = jnp.einsum("bwkrd,btkd->bkrwt", rows, keys, preferred_element_type=jnp.float32)
        seen = (token >= first) & (token <= position[..., None])  # none where there is no query
        return jnp.where(seen[:, None, None], found * sm_scale, -jnp.inf)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return jnp.logaddexp(total, jax.nn.logsumexp(scores(i, i * width), -1))

    def weigh(i: jax.Array, masses: jax.Array) -> jax.Array:
        mass = jnp.exp(scores(i, begin(i)) - total[..., None]).sum((2, 3))
        return jax.lax.dynamic_update_slice_in_dim(masses, mass, begin(i), 2)

    nothing = jnp.full((b, heads, h // heads, queries), -jnp.inf)
    total = jax.lax.fori_loop(0, chunks, add, nothing)
    total = jnp.where(jnp.isfinite(total), total, 0.0)
    return jax.lax.fori_loop(0, chunks, weigh, jnp.zeros((b, heads, p)))


def by_page(tokens: jax.Array, group_size: int, tiles: int) -> jax.Array:
    """[B, K, P] a number a token → [B, K, tiles], summed by page."""
    b, k, p = tokens.shape
    size = tiles * group_size
    whole = jnp.pad(tokens[..., :size], ((0, 0), (0, 0), (0, max(size - p, 0))))
    return whole.reshape(b, k, tiles, group_size).sum(-1)
