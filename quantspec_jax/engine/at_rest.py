"""AQUA-KV (`quantspec_jax.methods.aqua`) as the format at rest: tiles in 2 to 4 bits a value, made
of what the target reads of them, and decoded once, into what the cache holds.

    a tile of planes            both planes, float32; keys before RoPE
      ⇅                         layer after layer, each predicted by the one below, as it is read
    first   uint8  [1, 2, G n first_width/8]       points of HIGGS' grid: of the first layer's
    codes   uint8  [L − 1, 2, G n width/8]         keys and values, of the others'
    scales  bf16   [L, 2, G, n/h]                  of blocks of h of a token's n = K·D channels
    sinks   f32    [2, L, K, 4, D]                 of tile 0 alone: tokens that stay as they are

What is decoded is coded into planes as a prompt's tiles are, but not rounded to the cache's type
before. Of a session a tile is coded once: what came from a file goes back as it came. (To code what
was decoded would lose a little each time.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.rope_append.heads import rotate, unrotated
from quantspec_jax.cache import create
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.cache.tiles import Tile, tiles_of, values_of
from quantspec_jax.checks import require
from quantspec_jax.engine.prefixes import HostTile
from quantspec_jax.loading import Model
from quantspec_jax.methods import METHODS, Aqua, Layer, higgs
from quantspec_jax.methods.aqua import Coded
from quantspec_jax.methods.method import channels
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.rope import rope_frequencies, rope_tables
from quantspec_jax.sharding import mesh_of
from quantspec_jax.weights.calibrate.programs import program

FORMATS = ("planes", "aqua")
VERSION = "aqua 1"  # of what is above, and of HIGGS' grids
AT_ONCE = 8  # tiles: as much as a GPU's launches want
BFLOAT16 = np.dtype(jnp.bfloat16)


def check_format(name: str, model: Model) -> None:
    """ValueError, or NotImplementedError, where caches of a model are not saved in a format."""
    require(name in FORMATS, "format", name, ", ".join(FORMATS))
    if name == "planes":
        return
    converted = "planes; aqua of what `quantspec convert SOURCE OUT_DIR --kv aqua` wrote"
    require(model.kv is not None, "format", name, converted)
    if mesh_of(model.params).size > 1:
        raise NotImplementedError(f"format '{name}' is not there over several devices")


def method_of(model: Model) -> Aqua:
    """What a model has stored, with scales of 16 bits."""
    assert model.kv is not None
    method = METHODS[model.kv.stored.name]
    assert isinstance(method, Aqua)
    return dataclasses.replace(method, half=True)


def forms(model: Model, cache: CacheConfig, tile: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a coded tile's arrays."""
    config, method, g = model.config, method_of(model), cache.group_size
    n, layers = channels(config), config.num_layers
    sinks = (2, layers, config.num_kv_heads, method.sinks, config.head_dim)
    each = {
        "first": ((1, 2, g * n * method.first_width // 8), np.uint8),
        "codes": ((layers - 1, 2, g * n * method.width // 8), np.uint8),
        "scales": ((layers, 2, g, n // higgs.block_of(n)), BFLOAT16),
        "sinks": (sinks, np.float32),
    }
    return {
        name: jax.ShapeDtypeStruct(*form)
        for name, form in each.items()
        if name != "sinks" or tile == 0
    }


class Coder:
    """Codes and decodes the tiles of one session.

    Attributes:
      kept: the coded tiles of the text that was saved or loaded last, by their names: in the
        host's memory, beside the tiles.
    """

    def __init__(self, model: Model, cache: CacheConfig):
        assert model.kv is not None
        self.kept: dict[bytes, HostTile] = {}
        self._config, self._cache = model.config, cache
        self._method, self._learned = method_of(model), model.kv.learned
        layer = jax.eval_shape(lambda: create(model.config, cache.arrays, 1)).layers[0]
        self._dtype = layer.key_buffer.dtype if layer.keys is None else None

    def encode(self, names: Sequence[bytes], tiles: Sequence[HostTile]) -> list[HostTile]:
        """The first tiles of a text, coded; `names` are those of all of its tiles."""
        self.kept = {name: self.kept[name] for name in names if name in self.kept}
        new = [i for i in range(len(tiles)) if names[i] not in self.kept]
        for some in _batches(new):
            found = self._encode([tiles[i] for i in some], some)
            self.kept |= {names[i]: tile for i, tile in zip(some, found, strict=True)}
        if 0 in new:
            sinks = np.asarray(_sinks(tiles[0], count=self._method.sinks))
            self.kept[names[0]] = {**self.kept[names[0]], "sinks": sinks}
        return [self.kept[name] for name in names[: len(tiles)]]

    def decode(self, names: Sequence[bytes], coded: Sequence[HostTile]) -> Iterator[HostTile]:
        """What `encode` gave → tiles as the cache has them, one after the other."""
        self.kept = dict(zip(names, coded, strict=False))
        for some in _batches(range(len(coded))):
            yield from self._decode([coded[i] for i in some], some, coded[0]["sinks"])

    def _encode(self, tiles: Sequence[HostTile], numbers: Sequence[int]) -> list[HostTile]:
        joined = {name: np.concatenate([x[name] for x in _filled(tiles)], 2) for name in tiles[0]}
        joined, rope = jax.device_put(joined), self._rope(_filled(numbers))
        below, made = None, []
        sizes = {"method": self._method, "group_size": self._cache.group_size}
        for i, learned in enumerate(self._learned):
            call = (learned, joined, np.int32(i), below, rope)
            one, below = _encode_layer(*call, **sizes)
            made.append(one)
        points, scales = zip(*jax.device_get(made), strict=True)  # [2, tiles, ...] each
        parts = {
            "first": np.stack(points[:1]),
            "codes": np.stack(points[1:]),
            "scales": np.stack(scales),
        }
        return [
            {name: np.ascontiguousarray(x[:, :, i]) for name, x in parts.items()}
            for i in range(len(tiles))
        ]

    def _decode(
        self, coded: Sequence[HostTile], numbers: Sequence[int], sinks: np.ndarray
    ) -> Iterator[HostTile]:
        parts = {
            name: np.stack([x[name] for x in _filled(coded)], 2)
            for name in ("first", "codes", "scales")
        }
        parts, sinks = jax.device_put((parts, sinks))
        rope, begins = self._rope(_filled(numbers)), np.bool_(numbers[0] == 0)
        below, made = None, []
        sizes = {"method": self._method, "group_size": self._cache.group_size}
        for i, learned in enumerate(self._learned):
            call = (learned, parts, np.int32(i), below, rope, sinks, begins)
            one, below = _decode_layer(*call, config=self._config, dtype=self._dtype, **sizes)
            made.append(one)
        layers = jax.device_get(made)
        joined = {name: np.concatenate([x[name] for x in layers]) for name in layers[0]}
        for i in range(len(coded)):
            yield {
                name: np.split(x, AT_ONCE, 2)[i].copy()  # alone in memory
                for name, x in joined.items()
            }

    def _rope(self, numbers: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """cos and sin [1, T, 1, D] of the tokens of tiles."""
        g, config = self._cache.group_size, self._config
        frequencies = rope_frequencies(config.rope, config.head_dim, self._cache.max_length)
        at = np.asarray(numbers, np.int32)[:, None] * g + np.arange(g, dtype=np.int32)[None]
        return rope_tables(*frequencies, jnp.asarray(at.reshape(1, -1)))


def _batches(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for i in range(0, len(numbers), AT_ONCE):
        yield numbers[i : i + AT_ONCE]


def _filled(some: Sequence[Any]) -> list[Any]:
    """As many as the programs take: the last one again and again."""
    return [*some, *[some[-1]] * (AT_ONCE - len(some))]


@program("method", "group_size")
def _encode_layer(
    learned: Any,
    tiles: Mapping[str, jax.Array],
    number: jax.Array,
    below: Layer | None,
    rope: tuple[jax.Array, jax.Array],
    *,
    method: Aqua,
    group_size: int,
) -> tuple[tuple[jax.Array, jax.Array], Layer]:
    """Layer `number` of joined tiles: packed points and scales, [2, tiles, ...] each, and what the
    layer above builds on."""
    keys, values = (
        x.swapaxes(1, 2) for x in values_of({k: _at(x, number) for k, x in tiles.items()})
    )  # [1, T, K, D]
    coded, made = method.encode(learned, Layer(unrotated(keys, *rope)[0], values[0]), below)
    count = len(made.keys) // group_size
    points = jnp.stack([x.points for x in coded]).reshape(2, count, -1)
    scales = jnp.stack([x.scales for x in coded]).reshape(2, count, group_size, -1)
    return (higgs.pack(points, method.width_of(below)), scales.astype(jnp.bfloat16)), made


@program("config", "method", "group_size", "dtype")
def _decode_layer(
    learned: Any,
    parts: Mapping[str, jax.Array],
    number: jax.Array,
    below: Layer | None,
    rope: tuple[jax.Array, jax.Array],
    sinks: jax.Array,
    begins: jax.Array,
    *,
    config: ModelConfig,
    method: Aqua,
    group_size: int,
    dtype: np.dtype | None,
) -> tuple[Tile, Layer]:
    """Layer `number` of joined tiles, from their parts, and what the layer above builds on.
    `begins`: whether they are the first tokens, which `sinks` are put in the place of."""
    packed = _at(parts["first"], number) if below is None else _at(parts["codes"], number - 1)
    points = higgs.unpack(packed[0], method.width_of(below)).reshape(2, -1, channels(config) // 2)
    scales = _at(parts["scales"], number).astype(jnp.float32).reshape(*points.shape[:2], -1)
    coded = Coded(*(higgs.Codes(points[i], scales[i]) for i in range(2)))
    made = method.decode(learned, coded, below)
    shape = (1, -1, config.num_kv_heads, config.head_dim)
    keys, values = rotate(made.keys.reshape(shape), *rope), made.values.reshape(shape)

    def whole(x: jax.Array, sinks: jax.Array) -> jax.Array:
        """[1, T, K, D], [1, K, 4, D] → [1, K, T, D]."""
        x, few = x.swapaxes(1, 2), sinks.shape[2]
        return x.at[:, :, :few].set(jnp.where(begins, sinks, x[:, :, :few]))

    keys, values = (whole(x, _at(sinks[i], number)) for i, x in enumerate((keys, values)))
    return tiles_of(keys, values, group_size, dtype), made


@program("count")
def _sinks(tile: Mapping[str, jax.Array], *, count: int) -> jax.Array:
    """[2, L, K, count, D]: the first tokens of a tile."""
    return jnp.stack([x[:, :, :count] for x in values_of(dict(tile))])


def _at(x: jax.Array, number: jax.Array) -> jax.Array:
    """[1, ...]: entry `number`."""
    return jax.lax.dynamic_index_in_dim(x, number, 0)
