"""Tokens of all layers coded and read again where they lie, by what a method of
`quantspec_jax.methods` has learned: the flush of a codec that says `recodes`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.rope_append.heads import rotate, unrotated
from quantspec_jax.cache import KVCache, LayerCache, flush_due
from quantspec_jax.generate.state import Program, PromptProgram
from quantspec_jax.methods import METHODS, Layer
from quantspec_jax.models.rope import rope_frequencies, rope_tables


def recode(
    learned: Any,
    layer: LayerCache,
    below: Layer | None,
    position: jax.Array,
    due: jax.Array,
    program: PromptProgram | Program,
) -> tuple[LayerCache, Layer]:
    """A layer whose tokens at `position` [B, S], where `due` [B, S], are what their codes say; and
    what the layer above is coded from, as `below` is of the layer below."""
    config, cache = program.model, program.cache
    method = METHODS[cache.view]
    frequencies = rope_frequencies(config.rope, config.head_dim, cache.max_length)
    cos, sin = rope_tables(*frequencies, position)
    at = position[:, None, :, None]
    old = [
        jnp.take_along_axis(x, at, 2).swapaxes(1, 2).astype(jnp.float32)
        for x in (layer.key_buffer, layer.value_buffer)
    ]  # [B, S, K, D]
    plain = unrotated(old[0], cos, sin)
    shape = plain.shape
    text = Layer(*(x.reshape(-1, *shape[2:]) for x in (plain, old[1])))
    made = method.read(learned, text, below)
    new = rotate(made.keys.reshape(shape), cos, sin), made.values.reshape(shape)
    due = (due & (position >= method.sinks))[:, :, None, None]

    def put(buffer: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        rows = jnp.where(due, new, old).astype(buffer.dtype)
        return buffer.at[jnp.arange(len(rows))[:, None], :, position].set(rows)

    keys, values = put(layer.key_buffer, old[0], new[0]), put(layer.value_buffer, old[1], new[1])
    return dataclasses.replace(layer, key_buffer=keys, value_buffer=values), made


def recode_prompt(
    learned: Any,
    layer: LayerCache,
    below: Layer | None,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    program: PromptProgram,
) -> tuple[LayerCache, Layer]:
    """Of prompts [B, P], what the next position reads coded."""
    position = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    coded = program.cache.codec.quantized_length(lengths, program.cache.group_size)
    return recode(learned, layer, below, position, position < coded[:, None], program)


def flush(learned: Any, cache: KVCache, program: Program) -> KVCache:
    """As `quantspec_jax.cache.flush`."""
    g, due = cache.group_size, flush_due(cache)
    position = cache.quantized_length[:, None] + jnp.arange(g)[None]
    mask = jnp.broadcast_to(due[:, None], position.shape)
    layers, below = [], None
    for known, layer in zip(learned, cache.layers, strict=True):
        layer, below = recode(known, layer, below, position, mask, program)
        layers.append(layer)
    moved = cache.quantized_length + jnp.where(due, g, 0)
    return dataclasses.replace(cache, layers=tuple(layers), quantized_length=moved)
