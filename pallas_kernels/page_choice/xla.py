"""Votes for pages and the choice among them in XLA: for devices without kernels, and as their
reference."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import ByPage


def page_votes(seen: Sequence[ByPage], last: jax.Array) -> jax.Array:
    """See `pallas_kernels.page_choice.api.page_votes`."""

    def votes(each: ByPage) -> jax.Array:  # of a layer: summed before they are joined
        b, k, tiles = each.log_sums.parts.shape[:3]
        masses = each.masses  # [B, S, H, T/G]
        voting = jnp.arange(masses.shape[1])[None] <= last[:, None]
        by_head = jnp.where(voting[:, :, None, None], masses, 0.0).sum(1)
        return by_head.reshape(b, k, -1, tiles).sum(2)

    return jnp.stack([votes(each) for each in seen], 1)


def most_voted(
    votes: jax.Array, coded: jax.Array, count: jax.Array, *, places: int, ends: tuple[int, int]
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.page_choice.api.most_voted`."""
    first, last = ends
    tile, bound = jnp.arange(votes.shape[-1])[None, None, None], coded[:, None, None, None]
    always = (tile < first) | (tile >= bound - last)
    votes = jnp.where(tile < bound, jnp.where(always, jnp.inf, votes), -jnp.inf)
    _, tiles = jax.lax.top_k(votes, places)
    chosen = jnp.arange(places)[None, None, None] < count[:, None, None, None]
    listed = jnp.sort(jnp.where(chosen, tiles, votes.shape[-1]), -1)
    return tuple(listed[:, i] for i in range(listed.shape[1]))
