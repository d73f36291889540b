"""What the views of the two planes read, for whole sequences: evaluation and calibration.

Decoding reads the planes by `pallas_kernels.kv_attention`; here all positions of a text attend at
once, to what the planes would give them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_attention.xla import dequantize_keys, dequantize_values
from pallas_kernels.quantize_pack.xla import quantize_keys, quantize_values
from quantspec_jax.cache.cache import quantized_length
from quantspec_jax.cache.config import View
from quantspec_jax.models.attention import Tokens, sequence_attention
from quantspec_jax.models.decoder import Attend
from quantspec_jax.models.linear import precision

# The views that either reads.
TARGET: View = "int8"
DRAFT: View = "int4"


def decoded(
    keys: jax.Array, values: jax.Array, view: str, group_size: int
) -> tuple[jax.Array, jax.Array]:
    """Full-precision keys after RoPE and values [B, K, T, D] → what `view` reads of them once they
    are in the planes, in their type. Of a last tile that is not full the keys mean nothing."""
    if view == "full":
        return keys, values
    t = keys.shape[2]
    keys, values = (
        jnp.pad(x, ((0, 0), (0, 0), (0, -t % group_size), (0, 0))) for x in (keys, values)
    )
    read = (
        dequantize_keys(quantize_keys(keys, group_size), view),
        dequantize_values(quantize_values(values, group_size), view),
    )
    coded_keys, coded_values = (x[:, :, :t].astype(keys.dtype) for x in read)
    return coded_keys, coded_values


def attend_coded(
    q: jax.Array, own: Tokens, past: Tokens, *, view: str, group_size: int, sm_scale: float
) -> jax.Array:
    """Attention at all positions of a text, each reading what decoding would (`quantized_length`):
    of the tokens before it those in the planes in `view`, the newer ones in full precision, and its
    own.

    Args:
      q: [B, S, H, D] queries after RoPE.
      own: keys and values [B, S, K, D] at the queries' own positions, of the pass that asks.
      past: those that the cache has of all positions, the target's.

    Returns:
      [B, S, H, D] float32.
    """
    exact = precision(q.dtype)
    if view == "full":
        return sequence_attention(q, own, past, sm_scale=sm_scale, exact=exact)
    with jax.ensure_compile_time_eval():
        length = np.asarray(quantized_length(jnp.arange(q.shape[1]), group_size))
    keys, values = (x.swapaxes(1, 2) for x in past)
    older = Tokens(*(x.swapaxes(1, 2) for x in decoded(keys, values, view, group_size)))
    return sequence_attention(q, own, past, older, length, sm_scale=sm_scale, exact=exact)


def attend_text(view: str, group_size: int, sm_scale: float) -> Attend:
    """`attend_coded` for `models.decoder`: the state is what the cache has, None where the pass
    makes it, as the target does."""

    def attend(past: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        own = Tokens(k, v)
        past = own if past is None else past
        out = attend_coded(q, own, past, view=view, group_size=group_size, sm_scale=sm_scale)
        return out, past

    return attend
