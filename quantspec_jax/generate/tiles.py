"""The prefill a tile at a time: G tokens of one prompt, beside sequences that decode.

A token at position t of the prompt reads the tiles before its own as the target's view has them,
and its own tile in full precision:

    position   0 ...................................... G ⌊t/G⌋ ......... t
               │ the target's view of the cache          │ full precision │

So what a tile becomes depends on the tokens up to its end and on nothing else: not on how long the
prompt is, on what lies in other slots, or on how many tiles were read before it or were kept from
another request. (A prefill of the whole prompt, `generate.prefill`, attends in full precision to
all of it and is faster on a GPU; a prompt of at most G tokens is read alike by both.)

Over a mesh each device has its heads of a tile, and reads its own of the tiles before it; the one
whose turn it is codes the tile. Sequences are not split.

The rows go straight into the sequence's slot of the running cache. While they do, the slot's
sequence counts as finished, and its length is a multiple of G: what rounds write there for nobody
lies in the tile that is written next.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Read
from pallas_kernels.layout import LayerCache
from pallas_kernels.rope_append.xla import narrowed
from quantspec_jax.axes import ONE, Axes
from quantspec_jax.cache import KVCache
from quantspec_jax.cache.tiles import get_tile, put_tiles
from quantspec_jax.generate.cache_pass import attention
from quantspec_jax.generate.prefill import first_state
from quantspec_jax.generate.requests import Requests
from quantspec_jax.generate.split import split
from quantspec_jax.generate.state import DecodeState, PromptProgram
from quantspec_jax.models.decoder import embed, run_block, unembed
from quantspec_jax.models.parameters import Params
from quantspec_jax.models.projection import Projection
from quantspec_jax.models.rope import rope_frequencies, rope_tables


@split("params whole", "whole whole")
def tile_begin(
    params: Params, tokens: jax.Array, *, program: PromptProgram
) -> tuple[jax.Array, jax.Array]:
    """[1, G] tokens → the residual stream and its norm before the first block, [1, G, E]."""
    return embed(params, program.model, tokens, program.axes)


@split("block whole whole whole layer whole whole whole", "whole whole layer")
def tile_layer(
    block: Params,
    next_norm: jax.Array,
    x: jax.Array,
    h: jax.Array,
    layer: LayerCache,
    slot: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    program: PromptProgram,
) -> tuple[jax.Array, jax.Array, LayerCache]:
    """One block on a tile: the stream and its norm after it, and the layer with the tile in it.

    Args:
      layer: of all slots; slot: [] int32.
      start: [] int32, position of the tile's first token, a multiple of G.
      length: [] int32, of the prompt; rows from there on are padding.
    """
    config, cache = program.model, program.cache
    g = cache.group_size
    positions = (start + jnp.arange(g))[None]

    def attend(layer: LayerCache, heads: Projection) -> tuple[jax.Array, LayerCache]:
        q, k, v = heads.finished()
        valid = (positions < length)[..., None, None]
        keys, values = (jnp.where(valid, part, jnp.zeros_like(part)) for part in (k, v))
        layer = _write(layer, keys[0], values[0], slot, start)
        row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, 0), layer)
        before = KVCache((), start[None] + g, start[None], g, cache.codec)
        found = attention(q, row, before, start[None], None, Read(cache.view), program, False)
        return found.out, _coded(layer, slot, start // g, program)

    frequencies = rope_frequencies(config.rope, config.head_dim, cache.max_length)
    rope = rope_tables(*frequencies, positions)
    options: dict[str, Any] = {"backend": program.backend, "axes": program.axes}
    return run_block(block, next_norm, config, x, h, rope, layer, attend, **options)


def _coded(
    layer: LayerCache, slot: jax.Array, tile: jax.Array, program: PromptProgram
) -> LayerCache:
    """The layer with a tile of the sequence's ring in the planes of the device that has it. One
    that is not whole is coded, too, and not read: its last code comes later."""
    axes, g = program.axes, program.cache.group_size

    def code(layer: LayerCache) -> LayerCache:
        call = (slot, tile, axes.tiles_before(tile), g, program.backend)
        return program.cache.codec.encode_tile(layer, *call)

    if axes.cp == 1:
        return code(layer)
    here = jnp.asarray(axes.has_tile(tile), jnp.int32)
    return jax.lax.fori_loop(0, here, lambda _, layer: code(layer), layer)  # in place


def _write(
    layer: LayerCache, keys: jax.Array, values: jax.Array, slot: jax.Array, start: jax.Array
) -> LayerCache:
    """Rows [G, K, D] from position `start` on into one sequence's ring; what would lie beyond a
    buffer without planes is padding."""
    slots = layer.key_buffer.shape[2]
    index = start % slots + jnp.arange(keys.shape[0])

    def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
        at = buffer.at[slot, :, index]
        return at.set(narrowed(new, buffer.dtype), mode="drop", unique_indices=True)

    return dataclasses.replace(
        layer,
        key_buffer=write(layer.key_buffer, keys),
        value_buffer=write(layer.value_buffer, values),
    )


@split("params whole whole batch batch batch batch", "state")
def tile_end(
    params: Params,
    hidden: jax.Array,
    row: jax.Array,
    seen: jax.Array,
    prompt: jax.Array,
    length: jax.Array,
    requests: Requests,
    *,
    program: PromptProgram,
    capacity: int,
    logprobs: int | None = None,
    lookup: int = 0,
) -> DecodeState:
    """The state of one sequence before its first round, the cache's layers left out, from the last
    tile's hidden states [1, G, E] after the final norm.

    Args:
      row: [] int32, the last token's in the tile.
      seen: [1, N] bool, which tokens the prompt has; prompt: [1, P] int32, padded on the right;
        length: [1] int32, how many.
    """
    logits = unembed(params, hidden[:, row], program.backend, program.axes)
    options: dict[str, Any] = {"capacity": capacity, "logprobs": logprobs, "lookup": lookup}
    state = first_state(logits, seen, prompt, length, requests, program=program, **options)
    return dataclasses.replace(state, memory=memory_of_unseen(program, 1, program.axes))


def memory_of_unseen(program: PromptProgram, batch: int, axes: Axes = ONE) -> Any:
    """What a draft policy remembers of prompts that it did not look at: no page has a vote. One
    that lets verifications vote knows the pages after the first of them. `axes`: where it is a
    device's part."""
    model = program.model
    tiles = -(-program.cache.num_tiles // program.axes.cp)
    tiles *= program.axes.cp // axes.cp
    nothing = jnp.zeros((batch, model.num_kv_heads // axes.tp, tiles))
    return program.policy.start([nothing] * model.num_layers, jnp.zeros(batch, jnp.int32))


def stand_still(state: DecodeState, slot: jax.Array, length: jax.Array) -> DecodeState:
    """The state with a slot whose sequence has ended and `length` tokens, a multiple of G, of
    another in its cache; the cache's layers are left out."""
    cache = state.cache
    coded = cache.codec.quantized_length(length, cache.group_size)
    cache = dataclasses.replace(
        cache,
        length=cache.length.at[slot].set(length),
        quantized_length=cache.quantized_length.at[slot].set(coded),
    )
    return dataclasses.replace(
        state,
        cache=cache,
        finished=state.finished.at[slot].set(True),
        broken=state.broken.at[slot].set(False),
    )


# As programs of their own.
TILE_STAGES: dict[Any, Any] = {
    tile_begin: jax.jit(tile_begin, static_argnames="program"),
    tile_layer: jax.jit(tile_layer, static_argnames="program", donate_argnames=("x", "h", "layer")),
    tile_end: jax.jit(tile_end, static_argnames=("program", "capacity", "logprobs", "lookup")),
    stand_still: jax.jit(stand_still, donate_argnames="state"),
    get_tile: jax.jit(get_tile, static_argnames=("group_size", "devices")),
    put_tiles: jax.jit(
        put_tiles, static_argnames=("group_size", "devices"), donate_argnames="layer"
    ),
}
