"""Attention of a text over what a method reads, where it chooses tokens or changes scores: a tile
of queries at a time, all their scores at once.

    token      0 .............. q .................. t − 1    t
    read of    the method's view, of the tokens      exact    own
               that `keep` says

q is the schedule's, the same for the queries of a tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantspec_jax.methods import Method, View
from quantspec_jax.methods.selection import heads_of
from quantspec_jax.models.attention import Tokens


def padded(x: jax.Array, group_size: int) -> jax.Array:
    """[T, ...] with zeros up to a whole tile."""
    return jnp.pad(x, ((0, -len(x) % group_size), *((0, 0),) * (x.ndim - 1)))


def attend_by_blocks(
    q: jax.Array,
    own: Tokens,
    recent: Tokens,
    view: View,
    method: Method,
    *,
    prompt: int,
    group_size: int,
    sm_scale: float,
    exact: jax.lax.Precision | None,
) -> jax.Array:
    """[S, H, D] queries of the last positions, from a tile's first on, with `own` keys and values
    [S, K, D]; `recent` ones [T, K, D] of all; the view of whole tiles. `prompt`: tokens before
    which a method that compresses a prompt has done nothing, whole tiles. Returns [S, H, D]
    float32."""
    s, h, d = q.shape
    g, k = group_size, recent.keys.shape[1]
    first = len(recent.keys) - s
    q, own_keys, own_values = (padded(x.astype(jnp.float32), g) for x in (q, *own))
    recent = Tokens(*(padded(x.astype(jnp.float32), g) for x in recent))
    tokens = jnp.arange(len(recent.keys))

    def einsum(equation: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(equation, *operands, precision=exact)

    def block(i: jax.Array) -> jax.Array:
        def at(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size)

        mine = at(q, i * g - first, g)
        queries = heads_of(mine, k)  # [K, R, G, D]
        bound = g * jnp.maximum(0, i - 1)
        before = (i * g < prompt) & method.from_prompt
        keys, values = (
            jnp.where(before, *both) for both in zip(recent, (view.keys, view.values), strict=True)
        )
        read = before | method.keep(view.state, mine, bound)
        read = (read & (tokens < bound)[None, None])[:, None]  # [K, 1, G or 1, T]
        older = einsum("krgd,tkd->krgt", queries, keys) * sm_scale
        older = jnp.where(before, older, method.weigh(view.state, older, read))
        older = jnp.where(read, older, -jnp.inf)
        near = Tokens(*(at(padded_more, bound, 2 * g) for padded_more in longer))
        newer = einsum("krgd,tkd->krgt", queries, near.keys) * sm_scale
        place = i * g + jnp.arange(g)
        seen = (bound + jnp.arange(2 * g))[None] < place[:, None]
        newer = jnp.where(seen[None, None], newer, -jnp.inf)
        self_keys, self_values = (at(x, i * g - first, g) for x in (own_keys, own_values))
        alone = einsum("krgd,gkd->krg", queries, self_keys)[..., None] * sm_scale
        weights = jax.nn.softmax(jnp.concatenate([older, newer, alone], -1), -1)
        n = older.shape[-1]
        out = einsum("krgt,tkd->krgd", weights[..., :n], values)
        out += einsum("krgt,tkd->krgd", weights[..., n:-1], near.values)
        out += weights[..., -1:] * self_values.swapaxes(0, 1)[:, None]
        return out.transpose(2, 0, 1, 3).reshape(g, h, d)

    longer = Tokens(*(jnp.pad(x, ((0, g), (0, 0), (0, 0))) for x in recent))
    tiles = jnp.arange(first // g, len(tokens) // g)
    return jax.lax.map(block, tiles).reshape(-1, h, d)[:s]
