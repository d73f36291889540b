"""A whole text's attention, each position reading what decoding would: for evaluation and
calibration. (Decoding itself reads the cache by `pallas_kernels.kv_attention`.)"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_attention.read import Read
from quantspec_jax.cache.codecs import codec_of
from quantspec_jax.models.attention import Tokens, sequence_attention
from quantspec_jax.models.decoder import Attend
from quantspec_jax.models.linear import precision
from quantspec_jax.models.projection import Projection


def attend_coded(
    q: jax.Array,
    own: Tokens,
    past: Tokens,
    *,
    read: Read,
    group_size: int,
    sm_scale: float,
    pages: jax.Array | None = None,
) -> jax.Array:
    """Attention at all positions of a text, by the schedule: of the tokens before it each reads
    those that are coded as `read` says, the newer ones in full precision, and its own.

    Args:
      q: [B, S, H, D] queries after RoPE.
      own: keys and values [B, S, K, D] at the queries' own positions, of the pass that asks.
      past: those that the cache has of all positions, the target's.
      pages: [B, S, K, T/G] bool, which coded pages each position reads; None: all.

    Returns:
      [B, S, H, D] float32.
    """
    exact, codec = precision(q.dtype), codec_of(read.view)
    if not codec.num_tiles(q.shape[1], group_size):
        return sequence_attention(q, own, past, sm_scale=sm_scale, exact=exact)
    with jax.ensure_compile_time_eval():
        length = np.asarray(codec.quantized_length(jnp.arange(q.shape[1]), group_size))
    by_head = (past.keys.swapaxes(1, 2), past.values.swapaxes(1, 2))
    decoded = codec.decoded(*by_head, read, group_size)
    older = Tokens(*(x.swapaxes(1, 2) for x in decoded))
    return sequence_attention(
        q, own, past, older, length, pages, group_size, sm_scale=sm_scale, exact=exact
    )


def attend_text(read: Read, group_size: int, sm_scale: float) -> Attend:
    """`attend_coded` for `models.decoder`: the state is what the cache has, None where the pass
    makes it, as the target does."""

    def attend(past: Any, heads: Projection) -> tuple[jax.Array, Any]:
        q, k, v = heads.finished()
        own = Tokens(k, v)
        past = own if past is None else past
        out = attend_coded(q, own, past, read=read, group_size=group_size, sm_scale=sm_scale)
        return out, past

    return attend
