"""What decoding does to a cache: make it, flush it, roll it back. Bytes and axes of all of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import CacheKV, Each, EachDue, shaped
from quantspec_jax.axes import ONE, Axes
from quantspec_jax.cache import schedule
from quantspec_jax.cache.codecs.codec import planes_of
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.cache.state import KVCache, LayerCache
from quantspec_jax.models.config import ModelConfig


def create(model: ModelConfig, config: CacheConfig, batch: int) -> KVCache:
    """An empty cache for `batch` sequences."""
    shape = (batch, model.num_kv_heads, config.group_size, model.head_dim)
    empty = jnp.zeros(batch, jnp.int32)
    # Two arrays of zeros, not one twice: the caller may donate the cache.
    return KVCache(
        tuple(_empty_layer(shape, config) for _ in range(model.num_layers)),
        empty,
        jnp.zeros_like(empty),
        config.group_size,
        config.codec,
    )


# Op by op, a hundred programs would be compiled.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty_layer(shape: tuple[int, ...], config: CacheConfig) -> LayerCache:
    nothing = jnp.zeros(shape, config.dtype)
    return from_prompt(nothing, nothing, jnp.zeros(shape[0], jnp.int32), config)


@shaped
def from_prompt(
    keys: CacheKV,
    values: CacheKV,
    length: Each,
    config: CacheConfig,
    backend: str = "auto",
) -> LayerCache:
    """The cache of one layer after a prompt: what the next position reads coded is coded, the rest
    is in the buffer.

    Args:
      keys, values: [B, K, P, D] full precision, padded beyond `length` [B].
    """
    keys, values = keys.astype(config.dtype), values.astype(config.dtype)
    return config.codec.from_prompt(keys, values, length, config, backend)


@shaped
def rollback(cache: KVCache, length: Each) -> KVCache:
    """Keep the first `length` [B] tokens, none of which may lie below `quantized_length`."""
    return dataclasses.replace(cache, length=length)


@shaped
def flush_due(cache: KVCache) -> EachDue:
    """[B] bool: F2 is full. Never true where nothing is coded."""
    full = schedule.flush_due(cache.length, cache.quantized_length, cache.group_size)
    return full & (cache.codec.recodes or bool(planes_of(cache.layers[0])))


def flush(cache: KVCache, backend: str = "auto", axes: Axes = ONE) -> KVCache:
    """Code F1 of every sequence whose F2 is full; its slots are the next F2. Others stay. The
    device codes the tile that has it."""
    if not planes_of(cache.layers[0]):
        return cache
    g = cache.group_size
    due, tile = flush_due(cache), cache.quantized_length // g
    here, place = due & axes.has_tile(tile), axes.tiles_before(tile)
    order = jnp.argsort(~here)  # those that are due come first

    # A loop over them: as much work as there is to do, in as little code for any batch.
    def one(n: jax.Array, layers: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
        b = order[n]
        call = (b, tile[b], place[b], g, backend)
        return tuple(cache.codec.encode_tile(layer, *call) for layer in layers)

    layers = jax.lax.fori_loop(0, here.sum(), one, cache.layers)
    moved = cache.quantized_length + jnp.where(due, g, 0)
    return dataclasses.replace(cache, layers=layers, quantized_length=moved)


def logical_axes(cache: KVCache) -> KVCache:
    """The cache with a tuple of logical axis names in place of each array."""
    batch: Any = ("batch",)
    layers = tuple(cache.codec.logical_axes(layer) for layer in cache.layers)
    return KVCache(layers, batch, batch, cache.group_size, cache.codec)


def cache_bytes(cache: KVCache, max_length: int) -> dict[str, int]:
    """Bytes by part: upper, lower, scales (and minima), buffer (and lengths), their total, and what
    a bf16 cache of `max_length` tokens a sequence takes. Works on shapes (`jax.eval_shape`) too."""

    def size(x: Any) -> int:
        return math.prod(x.shape) * x.dtype.itemsize

    planes = [p for layer in cache.layers for p in planes_of(layer)]
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
