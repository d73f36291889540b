"""Causal attention of a whole prompt in full precision: cuDNN's, or one a block at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from quantspec_jax.dtypes import BFLOAT16
from quantspec_jax.models.linear import precision

QUERY_BLOCK = 256
KEY_BLOCK = 512


def prompt_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, sm_scale: float, backend: str = "auto"
) -> jax.Array:
    """`causal_attention`, by the kernel of cuDNN where there is one.

    Prompts are padded on the right: the causal mask alone keeps padding from every valid row.
    """
    if uses_cudnn(q.dtype, q.shape[-1], backend):
        return jax.nn.dot_product_attention(
            q, k, v, scale=sm_scale, is_causal=True, implementation="cudnn"
        )
    return causal_attention(q, k, v, sm_scale)


def uses_cudnn(dtype: np.dtype, head_dim: int, backend: str = "auto") -> bool:
    """Whether `prompt_attention` runs in cuDNN: bfloat16 on a CUDA device, unless `backend` names
    XLA."""
    fits = dtype == BFLOAT16 and head_dim <= 128 and head_dim % 8 == 0
    return fits and backend != "xla" and dispatch.device() is not None


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, sm_scale: float) -> jax.Array:
    """[B, S, H, D] queries, [B, S, K, D] keys and values at positions 0..S−1 → [B, S, H, D].

    Blocks of keys are merged by the online softmax (arXiv 1805.02867), in float32, and blocks after
    the diagonal are not visited: memory is linear in S.
    """
    b, s, h, d = q.shape
    kv_heads = k.shape[2]
    rep = h // kv_heads
    block = min(QUERY_BLOCK, s)
    wide = min(KEY_BLOCK, s)
    blocks = -(-s // block)
    exact = precision(q.dtype)  # of the products
    padded = -(-max(blocks * block, s) // wide) * wide

    def by_head(x: jax.Array, length: int) -> jax.Array:  # [B, S, N, D] → [B, N, length, D]
        x = jnp.pad(x, ((0, 0), (0, length - s), (0, 0), (0, 0)))
        return x.astype(jnp.float32).transpose(0, 2, 1, 3)

    queries = by_head(q, blocks * block).reshape(b, kv_heads, rep, blocks, block, d) * sm_scale
    queries = queries.transpose(3, 0, 1, 2, 4, 5).reshape(blocks, b, kv_heads, rep * block, d)
    keys, values = by_head(k, padded), by_head(v, padded)

    def attend_block(carry: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        i, rows = inputs
        position = jnp.tile(i * block + jnp.arange(block), rep)[:, None]

        def over_keys(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
            maximum, total, output = state
            key = jax.lax.dynamic_slice_in_dim(keys, j * wide, wide, 2)
            value = jax.lax.dynamic_slice_in_dim(values, j * wide, wide, 2)
            scores = jnp.einsum("bkrd,bktd->bkrt", rows, key, precision=exact)
            scores = jnp.where(j * wide + jnp.arange(wide) <= position, scores, -jnp.inf)
            # Key 0 is visible to every query, so from the first block on the maximum is finite.
            higher = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            decay = jnp.exp(maximum - higher)
            added = jnp.einsum("bkrt,bktd->bkrd", weights, value, precision=exact)
            return (
                higher,
                total * decay + weights.sum(-1),
                output * decay[..., None] + added,
            )

        start = (
            jnp.full(rows.shape[:-1], -jnp.inf, jnp.float32),
            jnp.zeros(rows.shape[:-1], jnp.float32),
            jnp.zeros(rows.shape, jnp.float32),
        )
        visible = ((i + 1) * block + wide - 1) // wide
        _, total, output = jax.lax.fori_loop(0, visible, over_keys, start)
        return carry, output / total[..., None]

    _, out = jax.lax.scan(attend_block, None, (jnp.arange(blocks), queries))
    out = out.reshape(blocks, b, kv_heads, rep, block, d).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(b, blocks * block, h, d)[:, :s].astype(q.dtype)
