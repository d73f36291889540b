"""One pass over the cache: the target's, and with another view and other weights the draft's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
    pages: Sequence[Pages] | None = None,
) -> tuple[Logits, KVCache]:
    """Run S consecutive tokens of each sequence over the cache and append their keys and values.

    Args:
      tokens: [B, S] int32; start: [B] int32, position of the first.
      read: what to read of the coded tokens.
      pages: which tiles of them in each layer; None: all.

    Returns:
      [B, S, N] float32 logits, and the cache with S more tokens in its buffers; its lengths are as
      they were.
    """
    return observed_pass(params, program, cache, tokens, start, read, pages)[:2]


Layer = tuple[LayerCache, Pages | None]
Attended = tuple[LayerCache, jax.Array | None]


def observed_pass(
    params: Params,
    program: Program,
    cache: KVCache,
    tokens: Ids,
    start: Each,
    read: Read,
    pages: Sequence[Pages] | None = None,
    *,
    masses: bool = False,
) -> tuple[jax.Array, KVCache, list[jax.Array] | None]:
    """`cache_pass`, which with `masses` gives of each layer [B, S, H, T/G] float32, the share of a
    row's attention that each page has."""

    def attend(state: Layer, heads: Heads) -> tuple[jax.Array, Attended]:
        layer, listed = state
        q, layer = rope_append(heads, layer, start, backend=program.backend)
        found = kv_attention(
            q,
            layer,
            cache.quantized_length,
            start,
            read=read,
            sm_scale=program.model.head_dim**-0.5,
            pages=listed,
            page_log_sums=masses,
            out_dtype=q.dtype,
            backend=program.backend,
        )
        mass = None
        if found.page_log_sums is not None:
            mass = jnp.exp(found.page_log_sums - found.log_sum_exp[..., None])
        return found.out, (layer, mass)

    lists = [None] * len(cache.layers) if pages is None else pages
    hidden, made = forward(
        params,
        program.model,
        tokens,
        start[:, None] + jnp.arange(tokens.shape[1])[None],
        list(zip(cache.layers, lists, strict=True)),
        attend,
        rope_length=program.cache.max_length,
        backend=program.backend,
    )
    logits = unembed(params, hidden, program.backend)
    layers = tuple(layer for layer, _ in made)
    seen = [mass for _, mass in made] if masses else None
    return logits, dataclasses.replace(cache, layers=layers), seen
