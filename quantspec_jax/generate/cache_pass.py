"""One pass over the cache: the target's, and with another view and other weights the draft's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.api import Pages, Read, kv_attention
from pallas_kernels.rope_append.api import Heads, rope_append
from pallas_kernels.shapes import Each, Ids, Logits, shaped
from quantspec_jax.cache import KVCache, LayerCache
from quantspec_jax.generate.state import Program
from quantspec_jax.models.decoder import forward, unembed
from quantspec_jax.models.parameters import Params


@shaped
def cache_pass(
    params: Params,
    program: Program,
    cache: KVCache,
    tokens: Ids,
    start: Each,
    read: Read,
    pages: Pages | None = None,
) -> tuple[Logits, KVCache]:
    """Run S consecutive tokens of each sequence over the cache and append their keys and values.

    Args:
      tokens: [B, S] int32; start: [B] int32, position of the first.
      read: what to read of the coded tokens.
      pages: which tiles of them; None: all.

    Returns:
      [B, S, N] float32 logits, and the cache with S more tokens in its buffers; its lengths are as
      they were.
    """

    def attend(layer: LayerCache, heads: Heads) -> tuple[jax.Array, LayerCache]:
        q, layer = rope_append(heads, layer, start, backend=program.backend)
        found = kv_attention(
            q,
            layer,
            cache.quantized_length,
            start,
            read=read,
            sm_scale=program.model.head_dim**-0.5,
            pages=pages,
            out_dtype=q.dtype,
            backend=program.backend,
        )
        return found.out, layer

    hidden, layers = forward(
        params,
        program.model,
        tokens,
        start[:, None] + jnp.arange(tokens.shape[1])[None],
        cache.layers,
        attend,
        rope_length=program.cache.max_length,
        backend=program.backend,
    )
    logits = unembed(params, hidden, program.backend)
    return logits, dataclasses.replace(cache, layers=layers)
