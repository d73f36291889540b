"""The hierarchical key-value cache (QuantSpec, arXiv 2502.10424, section 4.2), a plain pytree.

Each token of a sequence is in one of two places, by its position alone. With `length` = n cached
tokens and q = `quantized_length` = G·max(0, ⌊n/G⌋ − 1):

    position   0 ........................ q ......... q + G ....... n
               │ planes, two 4-bit codes  │ buffer F1 │ buffer F2   │ slack
               │ a value: int8 or int4    │ full, older│ being filled│ rows that do not count

When F2 is full it becomes F1, and the old F1 is quantized into the planes (`flush`): planes are
written once and never change. A rejection is a shorter `length`. Draft and verify write the same
slots, verify last.

The `full` view has no planes: its buffer holds every token, and `quantized_length` stays 0.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layout import Planes
from pallas_kernels.quantize_pack.api import quantize_keys, quantize_values
from quantspec_jax.config import CacheConfig, ModelConfig

CACHE_VERSION = 1


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "key_buffer", "value_buffer"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys (after RoPE) and values.

    keys, values              planes of T/G tiles, or None in the full view
    key_buffer, value_buffer  [B, K, R, D] full precision; slot j holds position q + j
    """

    keys: Planes | None
    values: Planes | None
    key_buffer: jax.Array
    value_buffer: jax.Array


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
    shape = (batch, model.num_kv_heads, 0, model.head_dim)
    nothing = jnp.zeros(shape, config.dtype)
    empty = jnp.zeros(batch, jnp.int32)
    layer = partial(from_prompt, nothing, nothing, empty, config)
    return HierarchicalKVCache(
        tuple(layer() for _ in range(model.num_layers)), empty, empty, config.group_size
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

    def buffer(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, config.buffer_length), (0, 0)))
        rows = [
            jax.lax.dynamic_slice_in_dim(x[i : i + 1], flushed[i], config.buffer_length, 2)
            for i in range(b)
        ]
        filled = jnp.arange(config.buffer_length) < (length - flushed)[:, None]
        return jnp.where(filled[:, None, :, None], jnp.concatenate(rows), 0)

    return LayerCache(
        planes(keys, quantize_keys), planes(values, quantize_values), buffer(keys), buffer(values)
    )


def _fit(x: jax.Array, size: int) -> jax.Array:
    """Cut or zero-pad axis 2 to `size`."""
    x = x[:, :, :size]
    return jnp.pad(x, [(0, size - n if axis == 2 else 0) for axis, n in enumerate(x.shape)])


def append(layer: LayerCache, keys: jax.Array, values: jax.Array, slot: jax.Array) -> LayerCache:
    """Write a pass's keys and values [B, K, S, D] to the buffer at `slot` [B] (position − q).

    One `dynamic_update_slice` a sequence: in place, where a scatter would not be.
    """
    key_buffer, value_buffer = layer.key_buffer, layer.value_buffer
    for i in range(keys.shape[0]):
        at = (i, 0, slot[i], 0)
        key_buffer = jax.lax.dynamic_update_slice(
            key_buffer, keys[i : i + 1].astype(key_buffer.dtype), at
        )
        value_buffer = jax.lax.dynamic_update_slice(
            value_buffer, values[i : i + 1].astype(value_buffer.dtype), at
        )
    return dataclasses.replace(layer, key_buffer=key_buffer, value_buffer=value_buffer)


def rollback(cache: HierarchicalKVCache, length: jax.Array) -> HierarchicalKVCache:
    """Keep the first `length` [B] tokens, none of which may lie below `quantized_length`."""
    return dataclasses.replace(cache, length=length)


def flush(cache: HierarchicalKVCache, backend: str = "auto") -> HierarchicalKVCache:
    """Quantize F1 of every sequence whose F2 is full, and make F2 its F1."""
    if cache.layers[0].keys is None:
        return cache
    g = cache.group_size
    due = cache.length - cache.quantized_length >= 2 * g

    def run(layers: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
        tile = cache.quantized_length // g
        return tuple(_flush_layer(layer, due, tile, g, backend) for layer in layers)

    layers = jax.lax.cond(jnp.any(due), run, lambda layers: layers, cache.layers)
    moved = cache.quantized_length + jnp.where(due, g, 0)
    return dataclasses.replace(cache, layers=layers, quantized_length=moved)


def _flush_layer(
    layer: LayerCache, due: jax.Array, tile: jax.Array, group_size: int, backend: str
) -> LayerCache:
    def write(planes: Planes, buffer: jax.Array, quantize: Any) -> Planes:
        return Planes(
            *(
                _write_tile(leaf, new, due, tile)
                for leaf, new in zip(
                    planes, quantize(buffer[:, :, :group_size], group_size, backend=backend),
                    strict=True,
                )
            )
        )

    def shift(buffer: jax.Array) -> jax.Array:
        older = buffer[:, :, :group_size]
        newer = buffer[:, :, group_size : 2 * group_size]
        kept = jnp.where(due[:, None, None, None], newer, older)
        return jax.lax.dynamic_update_slice(buffer, kept, (0, 0, 0, 0))

    assert layer.keys is not None
    assert layer.values is not None
    return LayerCache(
        write(layer.keys, layer.key_buffer, quantize_keys),
        write(layer.values, layer.value_buffer, quantize_values),
        shift(layer.key_buffer),
        shift(layer.value_buffer),
    )


def _write_tile(
    leaf: jax.Array, new: jax.Array, due: jax.Array, tile: jax.Array
) -> jax.Array:
    """Write `new` [B, K, 1, ...] as tile number `tile` [B] of each sequence that is due."""
    for i in range(leaf.shape[0]):
        at = (i, 0, tile[i], *[0] * (leaf.ndim - 3))
        old = jax.lax.dynamic_slice(leaf, at, (1, *new.shape[1:]))
        leaf = jax.lax.dynamic_update_slice(leaf, jnp.where(due[i], new[i : i + 1], old), at)
    return leaf


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
