"""Which pages a draft reads at each position of a text, teacher-forced.

Each position is taken as the first proposal of a round: its policy has seen a verification of the
`VERIFIED` positions before it, all of whose proposals were accepted, and the prompt ended where the
positions that are counted begin. What chooses is the policy itself, as in decoding: a position is a
sequence of its batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import ByPage, Pages
from quantspec_jax.cache.schedule import quantized_length
from quantspec_jax.generate.policies import Policy, Sizes
from quantspec_jax.models.attention import Tokens
from quantspec_jax.models.linear import precision

VERIFIED = 5  # rows, as of γ = 4
BLOCK = 128  # positions at a time


@partial(jax.jit, static_argnames=("policy", "first", "group_size", "sm_scale"))
def pages_at_positions(
    q: jax.Array,
    target: Tokens,
    coded: Tokens,
    *,
    policy: Policy,
    first: int,
    group_size: int,
    sm_scale: float,
) -> jax.Array:
    """What a policy reads of one layer.

    Args:
      q: [1, T, H, D], the target's queries after RoPE.
      target, coded: its keys and values, and what its view reads of them once they are coded.
      first: the first position that counts.

    Returns:
      [1, T, K, T/G] bool.
    """
    t, kv_heads = q.shape[1], target.keys.shape[2]
    tiles = -(-t // group_size)
    sizes = Sizes(1, kv_heads, tiles)
    prompt = jnp.full(1, max(first, 1), jnp.int32)
    seen = policy.observe(
        q, target.keys, prompt, sm_scale=sm_scale, group_size=group_size, tiles=tiles
    )
    begun = policy.start([seen], quantized_length(prompt, group_size) // group_size)
    masses = page_masses(q, target, coded, group_size, sm_scale) if policy.votes else None

    def some(position: jax.Array) -> jax.Array:
        number = len(position)
        memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape[1:])), begun)
        if masses is not None:
            rows = position[:, None] - VERIFIED + jnp.arange(VERIFIED)[None]
            verified = masses[jnp.maximum(rows, 0)]  # [positions, rows, H, T/G]
            accepted = jnp.full(number, VERIFIED - 1)
            memory = policy.update(memory, [ByPage.of(verified, kv_heads)], accepted)
        pages = policy.pages(memory, quantized_length(position, group_size) // group_size, sizes)
        assert pages is not None, "a policy that chooses"
        return _named(pages[0], tiles)

    blocks = -(-t // BLOCK)
    positions = jnp.minimum(jnp.arange(blocks * BLOCK), t - 1).reshape(blocks, BLOCK)
    return jax.lax.map(some, positions).reshape(1, -1, kv_heads, tiles)[:, :t]


def _named(pages: Pages, tiles: int) -> jax.Array:
    """[N, K, P] lists → [N, K, tiles] bool."""
    assert pages.tiles is not None, "a policy lists what it chooses"
    place = jnp.arange(pages.tiles.shape[-1])[None, None]
    listed = jnp.where(place < pages.count[:, None, None], pages.tiles, tiles)
    n, k = (x[..., None] for x in jnp.ogrid[: listed.shape[0], : listed.shape[1]])
    nothing = jnp.zeros((*listed.shape[:2], tiles), bool)
    return nothing.at[n, k, listed].set(True, mode="drop")


def page_masses(
    q: jax.Array, target: Tokens, coded: Tokens, group_size: int, sm_scale: float
) -> jax.Array:
    """The share of each query's attention that each coded page has: [T, H, T/G] float32."""
    _, t, h, d = q.shape
    kv_heads = target.keys.shape[2]
    tiles, blocks = -(-t // group_size), -(-t // BLOCK)
    rows = jnp.pad(q[0], ((0, blocks * BLOCK - t), (0, 0), (0, 0)))
    rows = rows.reshape(blocks, BLOCK, kv_heads, h // kv_heads, d)
    token = jnp.arange(t)[None, None, None]

    def scores(queries: jax.Array, keys: jax.Array) -> jax.Array:
        options: Any = {"precision": precision(q.dtype), "preferred_element_type": jnp.float32}
        return jnp.einsum("skrd,tkd->skrt", queries, keys[0], **options) * sm_scale

    def some(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, position = block
        bound = quantized_length(position, group_size)[:, None, None, None]
        both = jnp.where(token < bound, scores(queries, coded.keys), scores(queries, target.keys))
        read = token <= position[:, None, None, None]
        shares = jax.nn.softmax(jnp.where(read, both, -jnp.inf), -1)
        shares = jnp.where(token < bound, shares, 0.0)
        whole = jnp.pad(shares, (*((0, 0),) * 3, (0, tiles * group_size - t)))
        return whole.reshape(BLOCK, h, tiles, group_size).sum(-1)

    positions = jnp.arange(blocks * BLOCK).reshape(blocks, BLOCK)
    return jax.lax.map(some, (rows, positions)).reshape(-1, h, tiles)[:t]
