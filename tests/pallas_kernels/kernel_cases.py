"""Inputs of kernel tests."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import LayerCache, Planes, QuantizedWeight, pack
from pallas_kernels.quantize_pack import xla as quantize


def attention_call(
    view: str,
    *,
    kv_heads: int,
    group: int,
    tokens: int,
    head_dim: int,
    group_size: int,
    tiles: int,
    positions: list[int],
    dtype=jnp.bfloat16,
    seed: int = 0,
):
    """Arguments of kv_attention for passes that start at `positions`, one a sequence.

    What the pass may not read is poisoned: slots of the buffer that hold no position up to the
    pass's last are NaN, and tiles past the quantized ones have NaN scales.
    """
    batch, full = len(positions), view == "full"
    start = np.array(positions)
    before = np.maximum(0, start // group_size - 1) * group_size
    quantized = np.zeros_like(start) if full else before
    slots = max(positions) + tokens + 3 if full else 2 * group_size
    keys = jax.random.split(jax.random.key(seed), 5)
    q = jax.random.normal(keys[0], (batch, tokens, kv_heads * group, head_dim)).astype(dtype)
    held = quantized[:, None] + (np.arange(slots) - quantized[:, None]) % slots
    readable = (held < start[:, None] + tokens)[:, None, :, None]
    buffers = [
        jnp.where(
            readable, jax.random.normal(k, (batch, kv_heads, slots, head_dim)), jnp.nan
        ).astype(dtype)
        for k in keys[1:3]
    ]
    planes: list[Planes | None] = [None, None]
    if not full:
        shape = (batch, kv_heads, tiles * group_size, head_dim)
        made = [quantize.quantize_keys, quantize.quantize_values]
        planes = [
            f(jax.random.normal(k, shape), group_size) for f, k in zip(made, keys[3:], strict=True)
        ]
        past = np.arange(tiles) >= (quantized // group_size)[:, None]
        planes = [
            p._replace(scale=jnp.where(_over_tiles(past, p.scale), jnp.nan, p.scale))
            for p in planes
            if p is not None
        ]
    as_int32 = [jnp.asarray(x, jnp.int32) for x in (quantized, start)]
    return (q, LayerCache(*planes, *buffers), *as_int32)


def _over_tiles(past: np.ndarray, numbers: jax.Array) -> np.ndarray:
    """[B, tiles] → broadcast over [B, K, tiles, ...]."""
    return past.reshape(past.shape[0], 1, past.shape[1], *[1] * (numbers.ndim - 3))


def without_poison(call):
    """The same call with zeros in place of NaN, for a reference that multiplies what it masks."""
    return jax.tree.map(
        lambda x: jnp.nan_to_num(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, call
    )


def with_other_lower_planes(cache: LayerCache) -> LayerCache:
    """The same cache with every bit of its lower planes changed."""
    keys, values = (p._replace(lower=~p.lower) for p in (cache.keys, cache.values) if p is not None)
    return dataclasses.replace(cache, keys=keys, values=values)


def random_weight(
    inputs: int, outputs: int, group: int, symmetric: bool, seed: int = 0
) -> QuantizedWeight:
    """A weight of random codes."""
    groups = -(-inputs // group)
    keys = jax.random.split(jax.random.key(seed), 3)
    codes = jax.random.randint(keys[0], (groups, group, outputs), -8, 8, jnp.int8)
    numbers = [
        (0.01 * jax.random.normal(k, (groups, outputs))).astype(jnp.bfloat16) for k in keys[1:]
    ]
    return QuantizedWeight(pack(codes), numbers[0], None if symmetric else numbers[1])


def relative_error(found, expected) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; NaN if anything found is."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
