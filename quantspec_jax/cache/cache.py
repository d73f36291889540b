"""The hierarchical key-value cache (QuantSpec, arXiv 2502.10424, section 4.2), a plain pytree.

Each token of a sequence is in one of two places, by its position alone. With `length` = n cached
tokens and q = `quantized_length` = G·max(0, ⌊n/G⌋ − 1):

    position   0 ........................ q ......... q + G ....... n ... q + 2G
               │ planes, two 4-bit codes  │ buffer F1 │ buffer F2         │
               │ a value: int8 or int4    │ full, older│ being filled     │

The buffer is a ring of 2G slots, position p in slot p mod 2G. When F2 is full, F1 is quantized into
the planes (`flush`) and its slots are the new F2: planes are written once and never change, and
nothing is moved. A rejection is a shorter `length`. Draft and verify write the same slots, verify
last.

The `full` view has no planes: its buffer holds every token, and `quantized_length` stays 0.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layout import LayerCache, Planes
from pallas_kernels.quantize_pack.api import quantize_keys, quantize_values
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.models.config import ModelConfig

CACHE_VERSION = 1


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "length", "quantized_length"],
    meta_fields=["group_size", "version"],
)
@dataclasses.dataclass(frozen=True)
class HierarchicalKVCache:
    """All layers, and per sequence how far they are filled.

    length            [B] int32, valid tokens
    quantized_length  [B] int32, tokens in the planes, a multiple of G
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array
    quantized_length: jax.Array
    group_size: int
    version: int = CACHE_VERSION


def create(model: ModelConfig, config: CacheConfig, batch: int) -> HierarchicalKVCache:
    """An empty cache for `batch` sequences."""
    shape = (batch, model.num_kv_heads, config.group_size, model.head_dim)
    nothing = jnp.zeros(shape, config.dtype)
    empty = jnp.zeros(batch, jnp.int32)
    layer = partial(from_prompt, nothing, nothing, empty, config)
    # Two arrays of zeros, not one twice: the caller may donate the cache.
    return HierarchicalKVCache(
        tuple(layer() for _ in range(model.num_layers)),
        empty,
        jnp.zeros_like(empty),
        config.group_size,
    )


def quantized_length(length: jax.Array, group_size: int) -> jax.Array:
    """Tokens that a query at position `length` reads from the planes: G·max(0, ⌊length/G⌋ − 1)."""
    return group_size * jnp.maximum(0, length // group_size - 1)


def from_prompt(
    keys: jax.Array,
    values: jax.Array,
    length: jax.Array,
    config: CacheConfig,
    backend: str = "auto",
) -> LayerCache:
    """The cache of one layer after a prompt: planes for what the next position reads from them, the
    rest in the buffer.

    Args:
      keys, values: [B, K, P, D] full precision, padded beyond `length` [B].
    """
    b, _, p, _ = keys.shape
    keys, values = keys.astype(config.dtype), values.astype(config.dtype)
    g = config.group_size
    if config.view == "full":
        return LayerCache(
            None,
            None,
            _fit(keys, config.buffer_length),
            _fit(values, config.buffer_length),
        )
    flushed = quantized_length(length, g)
    whole = -(-p // g) * g

    def planes(x: jax.Array, quantize: Any) -> Planes:
        tiles = quantize(_fit(x, whole), g, backend=backend)
        due = jnp.arange(whole // g) < (flushed // g)[:, None]  # [B, tiles]

        def place(leaf: jax.Array) -> jax.Array:
            mask = due.reshape(b, 1, -1, *[1] * (leaf.ndim - 3))
            return _fit(jnp.where(mask, leaf, jnp.zeros_like(leaf)), config.num_tiles)

        return Planes(*map(place, tiles))

    # Slot j of the ring holds position q + ((j − q) mod 2G), nothing (0) where that is not below n.
    slot = jnp.arange(2 * g)
    position = flushed[:, None] + (slot - flushed[:, None]) % (2 * g)  # [B, 2G]
    filled = (position < length[:, None])[:, None, :, None]
    position = jnp.minimum(position, p - 1)[:, None, :, None]

    def buffer(x: jax.Array) -> jax.Array:
        return jnp.where(filled, jnp.take_along_axis(x, position, 2), 0)

    return LayerCache(
        planes(keys, quantize_keys), planes(values, quantize_values), buffer(keys), buffer(values)
    )


def _fit(x: jax.Array, size: int) -> jax.Array:
    """Cut or zero-pad axis 2 to `size`."""
    x = x[:, :, :size]
    return jnp.pad(x, [(0, size - n if axis == 2 else 0) for axis, n in enumerate(x.shape)])


def append(layer: LayerCache, keys: jax.Array, values: jax.Array, start: jax.Array) -> LayerCache:
    """Write a pass's keys and values [B, K, S, D] for positions start [B] … start + S − 1.

    Rows beyond the end of the half of the ring that `start` lies in do not count (no pass that
    counts crosses a flush boundary) and are dropped: their slots still hold F1.
    """
    slots = layer.key_buffer.shape[2]
    half = slots if layer.keys is None else slots // 2
    slot = start % slots
    write = _write_one if keys.shape[0] == 1 else _write_batch
    return dataclasses.replace(
        layer,
        key_buffer=write(layer.key_buffer, keys, slot, half),
        value_buffer=write(layer.value_buffer, values, slot, half),
    )


def _write_one(buffer: jax.Array, new: jax.Array, slot: jax.Array, half: int) -> jax.Array:
    """Rows of one sequence, as a slice: the last window of S slots inside the half that reaches
    `slot`, in which what precedes it is kept."""
    rows = new.shape[2]
    first = jnp.minimum(slot, (slot // half + 1) * half - rows)[0]
    skip = slot[0] - first
    at = (0, 0, first, 0)
    old = jax.lax.dynamic_slice(buffer, at, new.shape)
    moved = jnp.roll(new.astype(buffer.dtype), skip, 2)
    kept = jnp.arange(rows)[:, None] < skip
    return jax.lax.dynamic_update_slice(buffer, jnp.where(kept, old, moved), at)


def _write_batch(buffer: jax.Array, new: jax.Array, slot: jax.Array, half: int) -> jax.Array:
    """Rows of all sequences, in one scatter however many there are."""
    b, _, rows, _ = new.shape
    index = slot[:, None] + jnp.arange(rows)
    inside = index // half == (slot // half)[:, None]
    index = jnp.where(inside, index, buffer.shape[2] + jnp.arange(rows))  # else beyond: dropped
    at = buffer.at[jnp.arange(b)[:, None], :, index]
    return at.set(new.swapaxes(1, 2).astype(buffer.dtype), mode="drop", unique_indices=True)


def rollback(cache: HierarchicalKVCache, length: jax.Array) -> HierarchicalKVCache:
    """Keep the first `length` [B] tokens, none of which may lie below `quantized_length`."""
    return dataclasses.replace(cache, length=length)


def flush_due(cache: HierarchicalKVCache) -> jax.Array:
    """[B] bool: F2 is full. Never true in the full view."""
    full = cache.length - cache.quantized_length >= 2 * cache.group_size
    return full & (cache.layers[0].keys is not None)


def flush(cache: HierarchicalKVCache, backend: str = "auto") -> HierarchicalKVCache:
    """Quantize F1 of every sequence whose F2 is full; its slots are the next F2. Others stay."""
    if cache.layers[0].keys is None:
        return cache
    g = cache.group_size
    due, tile = flush_due(cache), cache.quantized_length // g
    order = jnp.argsort(~due)  # those that are due come first

    # A loop over them: as much work as there is to do, in as little code for any batch.
    def one(n: jax.Array, layers: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
        b = order[n]
        return tuple(_flush_sequence(layer, b, tile[b], g, backend) for layer in layers)

    layers = jax.lax.fori_loop(0, due.sum(), one, cache.layers)
    moved = cache.quantized_length + jnp.where(due, g, 0)
    return dataclasses.replace(cache, layers=layers, quantized_length=moved)


def _flush_sequence(
    layer: LayerCache, b: jax.Array, tile: jax.Array, group_size: int, backend: str
) -> LayerCache:
    """F1 of sequence b as tile number `tile` of its planes."""

    def write(planes: Planes | None, buffer: jax.Array, quantize: Any) -> Planes:
        assert planes is not None
        _, k, _, d = buffer.shape
        at = (b, 0, tile % 2 * group_size, 0)
        older = jax.lax.dynamic_slice(buffer, at, (1, k, group_size, d))
        new = quantize(older, group_size, backend=backend)
        return Planes(*(_write_tile(*leaves, b, tile) for leaves in zip(planes, new, strict=True)))

    return dataclasses.replace(
        layer,
        keys=write(layer.keys, layer.key_buffer, quantize_keys),
        values=write(layer.values, layer.value_buffer, quantize_values),
    )


def _write_tile(leaf: jax.Array, new: jax.Array, b: jax.Array, tile: jax.Array) -> jax.Array:
    """Write `new` [1, K, 1, ...] as tile number `tile` of sequence b."""
    if leaf.dtype == jnp.bfloat16:  # as integers: XLA's CPU backend would convert the whole array
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16)
        bits = _write_tile(bits, jax.lax.bitcast_convert_type(new, jnp.uint16), b, tile)
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    at: tuple[Any, ...] = (b, 0, tile, *[0] * (leaf.ndim - 3))
    return jax.lax.dynamic_update_slice(leaf, new, at)


def logical_axes(cache: HierarchicalKVCache) -> HierarchicalKVCache:
    """The cache with a tuple of logical axis names in place of each array."""
    tiles = ("batch", "kv_heads", "tiles")

    def planes(x: Planes | None, numbers: tuple[str, ...]) -> Any:
        if x is None:
            return None
        code = (*tiles, *("tile_rows", "head_dim")[-(x.upper.ndim - 3) :])
        return Planes(code, code, (*tiles, *numbers), (*tiles, *numbers))  # type: ignore[arg-type]

    buffer: Any = ("batch", "kv_heads", "slots", "head_dim")
    layers = tuple(
        LayerCache(
            planes(layer.keys, ("head_dim",)),
            planes(layer.values, ("value_groups", "tokens")),
            buffer,
            buffer,
        )
        for layer in cache.layers
    )
    batch: Any = ("batch",)
    return HierarchicalKVCache(layers, batch, batch, cache.group_size, cache.version)


def cache_bytes(cache: HierarchicalKVCache, max_length: int) -> dict[str, int]:
    """Bytes by part: upper, lower, scales (and minima), buffer (and lengths), their total, and what
    a bf16 cache of `max_length` tokens a sequence takes. Works on shapes (`jax.eval_shape`) too."""

    def size(x: Any) -> int:
        return math.prod(x.shape) * x.dtype.itemsize

    planes = [p for layer in cache.layers for p in (layer.keys, layer.values) if p is not None]
    buffers = [b for layer in cache.layers for b in (layer.key_buffer, layer.value_buffer)]
    parts = {
        "upper": sum(size(p.upper) for p in planes),
        "lower": sum(size(p.lower) for p in planes),
        "scales": sum(size(p.scale) + size(p.minimum) for p in planes),
        "buffer": sum(map(size, [*buffers, cache.length, cache.quantized_length])),
    }
    b, k, _, d = cache.layers[0].key_buffer.shape
    equivalent = 2 * len(cache.layers) * b * k * max_length * d * 2
    return {**parts, "total": sum(parts.values()), "bf16_equivalent": equivalent}
