"""One pass over the cache: the target's, and with another view and other weights the draft's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.api import Attended, Pages, Read, kv_attention
from pallas_kernels.kv_attention.read import ByPage
from pallas_kernels.shapes import Each, Ids, Logits, shaped
from quantspec_jax.axes import Axes
from quantspec_jax.cache import KVCache, LayerCache
from quantspec_jax.generate.state import Program, PromptProgram
from quantspec_jax.models.decoder import forward, unembed
from quantspec_jax.models.linear import Activations
from quantspec_jax.models.parameters import Params
from quantspec_jax.models.projection import Projection
from quantspec_jax.models.rope import rope_frequencies, rope_tables

Rope = tuple[jax.Array, jax.Array]


@shaped
def cache_pass(
    params: Params,
    program: Program,
    cache: KVCache,
    tokens: Ids,
    start: Each,
    read: Read,
    pages: Sequence[Pages] | None = None,
    rope: Rope | None = None,
    rope_from: Each | None = None,
) -> tuple[Logits, KVCache]:
    """Run S consecutive tokens of each sequence over the cache and append their keys and values.

    Args:
      tokens: [B, S] int32; start: [B] int32, position of the first.
      read: what to read of the coded tokens.
      pages: which tiles of them in each layer; None: all.
      rope: `rope_at` of the tokens' positions, or with `rope_from` of more of them from that
        position [B] on; None: it is computed.

    Returns:
      [B, S, N] float32 logits, and the cache with S more tokens in its buffers; its lengths are as
      they were.
    """
    return observed_pass(params, program, cache, tokens, start, read, pages, rope, rope_from)[:2]


def rope_at(positions: jax.Array, program: Program) -> Rope:
    """cos and sin [B, S, 1, D] float32 of positions [B, S]."""
    model = program.model
    frequencies = rope_frequencies(model.rope, model.head_dim, program.cache.max_length)
    return rope_tables(*frequencies, positions)


def attention(
    q: jax.Array,
    layer: LayerCache,
    cache: KVCache,
    start: jax.Array,
    pages: Pages | None,
    read: Read,
    program: Program | PromptProgram,
    masses: bool,
    axes: Axes | None = None,
    ahead: bool = False,
) -> Attended:
    """`kv_attention` over the tiles of all devices: each reads its own, the first one the buffer,
    too, and the parts are merged by their log-sum-exp (Flash-Decoding, arXiv 2311.01282). `axes`:
    the program's, with addresses of the others; `ahead`: the planes and the cache's lengths are as
    the attention before read them."""
    axes = axes or program.axes
    # A list of pages, or a device's own lengths, may be made just before the layer that reads them.
    ahead = ahead and pages is None and axes.cp == 1
    coded, start_here, dtype = cache.quantized_length, start, q.dtype
    if layer.keys is None:  # nothing is read from planes
        coded = jnp.zeros_like(coded)
    if axes.cp > 1 and layer.keys is None:
        assert q.shape[1] == 1  # of several rows each would see another number of slots
        start_here, dtype = axes.before(start + 1, cache.group_size) - 1, jnp.float32
    elif axes.cp > 1:
        assert layer.keys is not None
        if pages is None:
            pages = Pages(None, axes.tiles_before(coded // cache.group_size))
        before_buffer = coded - q.shape[1]
        start_here, dtype = jnp.where(axes.part("cp") == 0, start, before_buffer), jnp.float32
    found = kv_attention(
        q,
        layer,
        coded,
        start_here,
        read=read,
        sm_scale=program.model.head_dim**-0.5,
        pages=pages,
        page_log_sums=masses,
        ahead=ahead,
        out_dtype=dtype,
        backend=program.backend,
    )
    out, log_sum_exp = axes.merged(found.out, found.log_sum_exp, q.dtype, program.backend)
    return found._replace(out=out, log_sum_exp=log_sum_exp)


Layer = tuple[LayerCache, Pages | None]
After = tuple[LayerCache, ByPage | None]


def observed_pass(
    params: Params,
    program: Program,
    cache: KVCache,
    tokens: Ids,
    start: Each,
    read: Read,
    pages: Sequence[Pages] | None = None,
    rope: Rope | None = None,
    rope_from: jax.Array | None = None,
    *,
    masses: bool = False,
) -> tuple[jax.Array, KVCache, list[ByPage] | None]:
    """`cache_pass`, which with `masses` gives each layer's attention by page."""
    call = (params, program, cache, tokens, start, read, pages, rope, rope_from)
    hidden, cache, seen = hidden_pass(*call, masses=masses)
    axes = program.axes.reached(params.get("peers"))
    return unembed(params, hidden, program.backend, axes), cache, seen


def hidden_pass(
    params: Params,
    program: Program,
    cache: KVCache,
    tokens: jax.Array,
    start: jax.Array,
    read: Read,
    pages: Sequence[Pages] | None = None,
    rope: Rope | None = None,
    rope_from: jax.Array | None = None,
    *,
    masses: bool = False,
) -> tuple[Activations, KVCache, list[ByPage] | None]:
    """`observed_pass` up to the hidden states [B, S, E] that logits are made of."""

    # Of tokens that are not coded each device has some: the others write to their next free slot,
    # which they do not read before it has been written again.
    axes = program.axes.reached(params.get("peers"))
    slot = start if cache.layers[0].keys else axes.before(start, cache.group_size)
    # A pass writes to the buffer alone, so what else the first layer reads is so for the others.
    later = itertools.chain([False], itertools.repeat(True))

    def attend(state: Layer, heads: Projection) -> tuple[jax.Array, After]:
        (layer, listed), ahead = state, next(later)
        q, layer = heads.appended(layer, slot, rope_from, ahead=ahead)
        found = attention(q, layer, cache, start, listed, read, program, masses, axes, ahead)
        by_page = None
        if found.page_log_sums is not None:
            by_page = ByPage(found.page_log_sums, found.log_sum_exp)
        return found.out, (layer, by_page)

    if rope is None:
        rope = rope_at(start[:, None] + jnp.arange(tokens.shape[1])[None], program)
    lists = [None] * len(cache.layers) if pages is None else pages
    hidden, made = forward(
        params,
        program.model,
        tokens,
        rope,
        list(zip(cache.layers, lists, strict=True)),
        attend,
        backend=program.backend,
        axes=axes,
    )
    layers = tuple(layer for layer, _ in made)
    seen = [by_page for _, by_page in made if by_page is not None] if masses else None
    return hidden, dataclasses.replace(cache, layers=layers), seen
