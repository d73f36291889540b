"""Attention of a whole sequence in XLA, a block at a time; of a prompt by cuDNN where it can."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.shapes import PassKV, Queries, shaped
from quantspec_jax.dtypes import BFLOAT16
from quantspec_jax.models.linear import precision

QUERY_BLOCK = 256
KEY_BLOCK = 512
# On a GPU a block is some ten launches: fewer, and larger, while its scores fit the L2 cache.
GPU_BLOCKS = 2


class Tokens(NamedTuple):
    """Keys after RoPE and values of a whole sequence, [B, S, K, D] each."""

    keys: jax.Array
    values: jax.Array


class State(NamedTuple):
    """What the blocks of queries have read so far, before division."""

    maximum: jax.Array  # [blocks, B, K, R] of the scores
    total: jax.Array  # [blocks, B, K, R] Σ exp(score − maximum)
    output: jax.Array  # [blocks, B, K, R, D] Σ exp(score − maximum) v


@shaped
def prompt_attention(
    q: Queries, k: PassKV, v: PassKV, sm_scale: float, backend: str = "auto"
) -> Queries:
    """`causal_attention`, by the kernel of cuDNN where there is one.

    Prompts are padded on the right: the causal mask alone keeps padding from every valid row.
    """
    if uses_cudnn(q.dtype, q.shape[-1], backend):
        return jax.nn.dot_product_attention(
            q, k, v, scale=sm_scale, is_causal=True, implementation="cudnn"
        )
    return causal_attention(q, k, v, sm_scale)


def part_of_prompt_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sm_scale: float,
    part: jax.Array,
    parts: int,
) -> jax.Array:
    """`causal_attention` of the rows that one of several devices has (`Axes.own_rows`): as many
    products for each of them, merged by log-sum-exp.

    Args:
      q: [B, P/parts, H, D], two runs of rows; k, v: [B, P, K, D], all.
      part: [] int32, which device this is.
    """
    b, s, h, d = q.shape
    run = s // 2
    block = math.gcd(run, QUERY_BLOCK) if run > QUERY_BLOCK else run
    pairs = jnp.asarray(_pairs_of_parts(parts, run // block))[part]
    queries = q.reshape(b, s // block, block, h, d).swapaxes(0, 1)

    def attend(causal: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
        def call(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
            options: dict[str, Any] = {"scale": sm_scale, "is_causal": causal}
            options |= {"implementation": "xla", "return_residual": True}
            wide = (x.astype(jnp.float32) for x in operands)
            with jax.default_matmul_precision("float32" if q.dtype == jnp.float32 else "default"):
                return jax.nn.dot_product_attention(*wide, **options)

        return call

    def visit(state: tuple[jax.Array, jax.Array], pair: jax.Array) -> tuple[Any, None]:
        i, j, own = pair
        keys, values = (jax.lax.dynamic_slice_in_dim(x, j * block, block, 1) for x in (k, v))
        query = jax.lax.dynamic_index_in_dim(queries, i, 0, False)
        found, log_sum = jax.lax.cond(own == 1, attend(True), attend(False), query, keys, values)
        outs, sums = state
        out, before = (jax.lax.dynamic_index_in_dim(x, i, 0, False) for x in (outs, sums))
        after = jnp.logaddexp(before, log_sum)
        out = out * jnp.exp(before - after)[..., None]
        out += found.astype(jnp.float32) * jnp.exp(log_sum - after)[..., None]
        update = jax.lax.dynamic_update_index_in_dim
        return (update(outs, out, i, 0), update(sums, after, i, 0)), None

    nothing = jnp.zeros(queries.shape, jnp.float32), jnp.full(queries.shape[:-1], -jnp.inf)
    (outs, _), _ = jax.lax.scan(visit, nothing, pairs)
    return outs.swapaxes(0, 1).reshape(b, s, h, d).astype(q.dtype)


def _pairs_of_parts(parts: int, blocks: int) -> np.ndarray:
    """Of each device (its block of queries, block of keys, whether that is its own), int32
    [parts, n, 3], a run of rows being so many blocks; each query's own block first."""

    def of(part: int) -> list[tuple[int, int, int]]:
        runs = (part, 2 * parts - 1 - part)
        own = [run * blocks + i for run in runs for i in range(blocks)]
        return [(i, j, j == last) for i, last in enumerate(own) for j in range(last, -1, -1)]

    return np.asarray([of(part) for part in range(parts)], np.int32)


def uses_cudnn(dtype: np.dtype, head_dim: int, backend: str = "auto") -> bool:
    """Whether `prompt_attention` runs in cuDNN: bfloat16 on a CUDA device, unless `backend` names
    XLA."""
    fits = dtype == BFLOAT16 and head_dim <= 128 and head_dim % 8 == 0
    return fits and backend != "xla" and dispatch.device() is not None


@shaped
def causal_attention(q: Queries, k: PassKV, v: PassKV, sm_scale: float) -> Queries:
    """[B, S, H, D] queries, [B, S, K, D] keys and values at positions 0..S−1 → [B, S, H, D].

    In float32 whatever the type.
    """
    wide = Tokens(k.astype(jnp.float32), v.astype(jnp.float32))
    exact = precision(q.dtype)  # of the products
    out = sequence_attention(q.astype(jnp.float32), wide, wide, sm_scale=sm_scale, exact=exact)
    return out.astype(q.dtype)


def sequence_attention(
    q: jax.Array,
    own: Tokens,
    recent: Tokens,
    older: Tokens | None = None,
    older_length: np.ndarray | None = None,
    older_pages: jax.Array | None = None,
    page_size: int = 1,
    *,
    sm_scale: float,
    exact: jax.lax.Precision | None,
) -> jax.Array:
    """Attention of the last S positions of a sequence of T tokens, all at once:

        token      0 ............... older_length[t] ............... t − 1    t
        read of    older             recent                                   own

    Products are in the operands' type, their sums and the softmax in float32. Blocks of keys are
    merged by the online softmax (arXiv 1805.02867), blocks that no query of a block reads are not
    visited, and memory is linear in T.

    Args:
      q: [B, S, H, D].
      own: [B, S, K, D].
      recent, older: [B, T, K, D] each.
      older_length: [S], grows with the position.
      older_pages: [B, S, K, n] bool, which pages of `page_size` tokens a position reads of those;
        None: all.
      exact: precision of products in float32.

    Returns:
      [B, S, H, D] float32.
    """
    b, s, h, d = q.shape
    kv_heads = own.keys.shape[2]
    rep = h // kv_heads
    tokens = recent.keys.shape[1]
    first = tokens - s
    times = GPU_BLOCKS if jax.default_backend() == "gpu" else 1
    block, wide = min(times * QUERY_BLOCK, s), min(times * KEY_BLOCK, tokens)
    tiles, blocks = -(-s // block), -(-tokens // wide)
    limits = np.zeros(tiles * block, np.int32)
    if older_length is not None:
        limits[:s] = older_length
        limits[s:] = limits[s - 1]

    def rows(x: jax.Array) -> jax.Array:  # [B, S, H, D] → [tiles, B, K, H/K · block, D]
        x = jnp.pad(x, ((0, 0), (0, tiles * block - s), (0, 0), (0, 0)))
        x = x.reshape(b, tiles, block, kv_heads, rep, d).transpose(1, 0, 3, 4, 2, 5)
        return x.reshape(tiles, b, kv_heads, rep * block, d)

    def by_head(x: jax.Array) -> jax.Array:  # [B, T, K, D] → [B, K, blocks · wide, D]
        x = jnp.pad(x, ((0, 0), (0, blocks * wide - tokens), (0, 0), (0, 0)))
        return x.transpose(0, 2, 1, 3)

    # The blocks of `recent`, and after them those of `older`.
    sources = [recent] if older is None else [recent, older]
    keys, values = (jnp.concatenate([*map(by_head, x)], 2) for x in zip(*sources, strict=True))
    queries = rows(q)
    at = first + jnp.arange(tiles * block, dtype=jnp.int32).reshape(tiles, block)
    at = jnp.tile(at, (1, rep))
    first_recent = jnp.tile(jnp.asarray(limits).reshape(tiles, block), (1, rep))

    if older_pages is not None:  # [tiles, B, K, block, n]
        n = older_pages.shape[-1]
        padded = jnp.pad(older_pages, ((0, 0), (0, tiles * block - s), (0, 0), (0, 0)))
        by_tile = padded.reshape(b, tiles, block, kv_heads, n).transpose(1, 0, 3, 2, 4)

    def listed(i: jax.Array, j: jax.Array, token: jax.Array) -> jax.Array:
        """[B, K, H/K · block, wide] bool: whether the block's queries read the tokens' pages."""
        page = jnp.minimum(token[0] // page_size, n - 1)
        read = jnp.take(jax.lax.dynamic_index_in_dim(by_tile, i, 0, False), page, -1)
        return jnp.tile(read, (1, 1, rep, 1)) | (j < blocks)

    def visit(state: State, pair: jax.Array) -> tuple[State, None]:
        i, j = pair
        maximum, total, output = (jax.lax.dynamic_index_in_dim(x, i, 0, False) for x in state)
        key, value = (jax.lax.dynamic_slice_in_dim(x, j * wide, wide, 2) for x in (keys, values))
        scores = _einsum("bkrd,bktd->bkrt", queries[i], key, exact) * sm_scale
        token = j % blocks * wide + jnp.arange(wide)[None]
        low = jnp.where(j < blocks, first_recent[i], 0)[:, None]
        high = jnp.where(j < blocks, at[i], first_recent[i])[:, None]
        seen = ((low <= token) & (token < high))[None, None]
        if older_pages is not None:
            seen = seen & listed(i, j, token)
        scores = jnp.where(seen, scores, -jnp.inf)
        higher = jnp.maximum(maximum, scores.max(-1))
        weights = jnp.exp(scores - higher[..., None])
        decay = jnp.exp(maximum - higher)
        added = _einsum("bkrt,bktd->bkrd", weights.astype(value.dtype), value, exact)
        merged = State(higher, total * decay + weights.sum(-1), output * decay[..., None] + added)
        update = jax.lax.dynamic_update_index_in_dim
        return State(*(update(x, y, i, 0) for x, y in zip(state, merged, strict=True))), None

    # Each query begins with its own token, so its maximum is finite whatever it reads first.
    own_key, own_value = (rows(jnp.repeat(x.astype(jnp.float32), rep, 2)) for x in own)
    score = (queries.astype(jnp.float32) * own_key).sum(-1) * sm_scale
    start = State(score, jnp.ones_like(score), own_value)
    pairs = jnp.asarray(_pairs(limits, first, tokens, block, wide, blocks))
    (_, total, output), _ = jax.lax.scan(visit, start, pairs)
    out = (output / total[..., None]).reshape(tiles, b, kv_heads, rep, block, d)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, tiles * block, h, d)[:, :s]


def _einsum(
    equation: str, x: jax.Array, y: jax.Array, exact: jax.lax.Precision | None
) -> jax.Array:
    return jnp.einsum(equation, x, y, precision=exact, preferred_element_type=jnp.float32)


def _pairs(
    limits: np.ndarray, first: int, tokens: int, block: int, wide: int, blocks: int
) -> np.ndarray:
    """(block of queries, block of keys) of every product, int32 [n, 2]; from `blocks` on the blocks
    of keys are those of the older tokens, which reach up to limits [S]. `first`: the first query's
    position."""
    pairs = []
    for i in range(len(limits) // block):
        last = min(first + (i + 1) * block, tokens) - 1
        begin, end = limits[i * block], limits[last - first]
        pairs += [(i, j) for j in range(begin // wide, -(-last // wide))]
        pairs += [(i, blocks + j) for j in range(-(-end // wide))]
    return np.asarray(pairs, np.int32).reshape(-1, 2)
