"""Whole tiles of a cache, taken out and put back: G tokens of one sequence, of all layers, as a
mapping from the name of an array to the array, [L, K, ...]:

    keys.upper, keys.lower, keys.scale, keys.minimum, values. ...   where the codec codes tokens
    keys, values                                                    where it keeps them as they are

A tile holds both views, the draft's and the target's. `values_of` reads a layer of tiles that are
joined along axis 2, `tiles_of` makes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_attention.xla import dequantize_keys, dequantize_values
from pallas_kernels.layout import LayerCache, Planes
from pallas_kernels.quantize_pack.xla import quantize_keys, quantize_values
from pallas_kernels.rope_append.xla import narrowed

Tile = dict[str, jax.Array]


def _arrays(layer: LayerCache) -> Tile:
    """What holds the tokens that stay, by name; axis 2 runs over tiles, or over tokens."""
    if layer.keys is None or layer.values is None:
        return {"keys": layer.key_buffer, "values": layer.value_buffer}
    return _named(layer.keys, layer.values)


def _named(keys: Planes, values: Planes) -> Tile:
    planes = {"keys": keys, "values": values}
    return {f"{part}.{name}": x for part in planes for name, x in planes[part]._asdict().items()}


def _planes(arrays: Tile) -> Iterator[Planes]:
    """Those of keys and of values."""
    for part in ("keys", "values"):
        yield Planes(*(arrays[f"{part}.{name}"] for name in Planes._fields))


def _with_arrays(layer: LayerCache, arrays: Tile) -> LayerCache:
    if layer.keys is None:
        return dataclasses.replace(layer, key_buffer=arrays["keys"], value_buffer=arrays["values"])
    keys, values = _planes(arrays)
    return dataclasses.replace(layer, keys=keys, values=values)


def _begin(x: jax.Array, sequence: jax.Array, tile: jax.Array, wide: int, devices: int) -> Any:
    """Where a tile begins in an array. Tiles that are dealt to devices in turn lie in their order,
    all those of the first device before those of the second."""
    at = tile % devices * (x.shape[2] // devices) + tile // devices * wide
    return sequence, 0, at, *[0] * (x.ndim - 3)


def get_tile(
    layers: Sequence[LayerCache],
    sequence: jax.Array,
    tile: jax.Array,
    group_size: int,
    devices: int = 1,
) -> Tile:
    """Tile number `tile` of one sequence. A tile of planes is one entry of axis 2. `devices`: that
    tiles are dealt to."""
    wide = 1 if layers[0].keys is not None else group_size

    def cut(x: jax.Array) -> jax.Array:
        at = _begin(x, sequence, tile, wide, devices)
        found = jax.lax.dynamic_slice(x, at, (1, x.shape[1], wide, *x.shape[3:]))
        return found[0]

    each = [{name: cut(x) for name, x in _arrays(layer).items()} for layer in layers]
    return {name: jnp.stack([tile[name] for tile in each]) for name in each[0]}


def put_tiles(
    layer: LayerCache,
    new: Tile,
    number: jax.Array,
    sequence: jax.Array,
    first: jax.Array,
    group_size: int,
    devices: int = 1,
) -> LayerCache:
    """Layer number `number` with what `get_tile` gave in the place of tile `first`; donate it.
    Where tiles are not dealt to devices, `new` may be several of them, joined along axis 2."""
    wide = 1 if layer.keys is not None else group_size

    def write(x: jax.Array, every: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_index_in_dim(every, number, 0)
        return jax.lax.dynamic_update_slice(x, own, _begin(x, sequence, first, wide, devices))

    return _with_arrays(layer, {name: write(x, new[name]) for name, x in _arrays(layer).items()})


def values_of(tiles: Tile) -> tuple[jax.Array, jax.Array]:
    """Keys after RoPE and values [L, K, T, D] float32 of T/G tiles, as both planes have them."""
    if "keys" in tiles:
        return tiles["keys"].astype(jnp.float32), tiles["values"].astype(jnp.float32)
    keys, values = _planes(tiles)
    return dequantize_keys(keys, "int8"), dequantize_values(values, "int8")


def tiles_of(keys: jax.Array, values: jax.Array, group_size: int, dtype: np.dtype | None) -> Tile:
    """T/G tiles of keys and values [L, K, T, D] float32, in planes as a prompt's are, or, where
    there are none, in type `dtype`."""
    if dtype is not None:
        return {"keys": narrowed(keys, dtype), "values": narrowed(values, dtype)}
    return _named(quantize_keys(keys, group_size), quantize_values(values, group_size))
