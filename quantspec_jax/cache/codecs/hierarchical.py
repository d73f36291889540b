"""Two 4-bit planes of one cache (QuantSpec, arXiv 2502.10424, section 4.2).

Each token of a sequence is in one of two places, by its position alone (`cache.schedule`):

    position   0 ........................ q ......... q + G ....... n ... q + 2G
               │ planes, two 4-bit codes  │ buffer F1 │ buffer F2         │
               │ a value: int8 or int4    │ full, older│ being filled     │

The buffer is a ring of 2G slots. When F2 is full, F1 is quantized into the planes (the flush) and
its slots are the new F2: planes are written once and never change, and nothing is moved. A
rejection is a shorter `length`. Draft and verify write the same slots, verify last.

View `int8` reads both planes, `int4` the upper one alone. A draft reads the upper plane, and of
the first tile both: its tokens are the attention sinks, whose large keys make that tile's steps
coarse, and half of what a 4-bit cache has rejected comes from them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Read
from pallas_kernels.kv_attention.xla import dequantize_keys, dequantize_values
from pallas_kernels.layout import LayerCache, Planes
from pallas_kernels.quantize_pack import xla
from pallas_kernels.quantize_pack.api import quantize_keys, quantize_values
from quantspec_jax.cache.codecs.codec import BUFFER_AXES, fit, values_per_token
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.cache.schedule import quantized_length
from quantspec_jax.models.config import ModelConfig

EXACT_TILES = 1  # at the beginning, that a draft reads with both planes
DRAFT = Read("int4", EXACT_TILES)


@dataclasses.dataclass(frozen=True)
class Hierarchical:
    """The upper plane is the draft's, both planes together are the target's."""

    views: tuple[str, ...] = ("int8", "int4")
    draft: Read = DRAFT
    recodes: bool = False

    def num_tiles(self, max_length: int, group_size: int) -> int:
        """Enough for every token."""
        return -(-max_length // group_size)

    def buffer_length(self, max_length: int, group_size: int, pass_width: int) -> int:
        """F1 and F2."""
        return 2 * group_size

    def quantized_length(self, length: jax.Array, group_size: int) -> jax.Array:
        """The schedule's q."""
        return quantized_length(length, group_size)

    def from_prompt(
        self,
        keys: jax.Array,
        values: jax.Array,
        length: jax.Array,
        config: CacheConfig,
        backend: str,
    ) -> LayerCache:
        """Planes for what the next position reads from them, the rest in the buffer."""
        b, _, p, _ = keys.shape
        g = config.group_size
        flushed = quantized_length(length, g)
        whole = -(-p // g) * g

        def planes(x: jax.Array, quantize: Any) -> Planes:
            tiles = quantize(fit(x, whole), g, backend=backend)
            due = jnp.arange(whole // g)[None] < (flushed // g)[:, None]  # [B, tiles]

            def place(leaf: jax.Array) -> jax.Array:
                mask = due.reshape(b, 1, -1, *[1] * (leaf.ndim - 3))
                return fit(jnp.where(mask, leaf, jnp.zeros_like(leaf)), config.num_tiles)

            return Planes(*map(place, tiles))

        # Slot j of the ring holds position q + ((j − q) mod 2G), nothing (0) where that is not
        # below n.
        slot = jnp.arange(2 * g)[None]
        position = flushed[:, None] + (slot - flushed[:, None]) % (2 * g)  # [B, 2G]
        filled = (position < length[:, None])[:, None, :, None]
        position = jnp.minimum(position, p - 1)[:, None, :, None]

        def buffer(x: jax.Array) -> jax.Array:
            return jnp.where(filled, jnp.take_along_axis(x, position, 2), 0)

        return LayerCache(
            planes(keys, quantize_keys),
            planes(values, quantize_values),
            buffer(keys),
            buffer(values),
        )

    def encode_tile(
        self,
        layer: LayerCache,
        sequence: jax.Array,
        tile: jax.Array,
        place: jax.Array,
        group_size: int,
        backend: str,
    ) -> LayerCache:
        """F1 of one sequence into its planes."""

        def write(planes: Planes | None, buffer: jax.Array, quantize: Any) -> Planes:
            assert planes is not None
            _, k, _, d = buffer.shape
            at = (sequence, 0, tile % 2 * group_size, 0)
            older = jax.lax.dynamic_slice(buffer, at, (1, k, group_size, d))
            new = quantize(older, group_size, backend=backend)
            return Planes(
                *(_write_tile(*leaves, sequence, place) for leaves in zip(planes, new, strict=True))
            )

        return dataclasses.replace(
            layer,
            keys=write(layer.keys, layer.key_buffer, quantize_keys),
            values=write(layer.values, layer.value_buffer, quantize_values),
        )

    def decoded(
        self, keys: jax.Array, values: jax.Array, read: Read, group_size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Coded and read again. Of a last tile that is not full the keys mean nothing."""
        t = keys.shape[2]
        whole = -(-t // group_size) * group_size
        exact = min(read.exact_tiles, whole // group_size)

        def again(planes: Planes, dequantize: Any) -> jax.Array:
            found = dequantize(planes, read.view)
            if exact:
                first = Planes(*(x[:, :, :exact] for x in planes))
                found = found.at[:, :, : exact * group_size].set(dequantize(first, "int8"))
            return found[:, :, :t].astype(keys.dtype)

        return (
            again(xla.quantize_keys(fit(keys, whole), group_size), dequantize_keys),
            again(xla.quantize_values(fit(values, whole), group_size), dequantize_values),
        )

    def read_bytes(
        self, model: ModelConfig, view: str, context: float, itemsize: int, group_size: int
    ) -> int:
        """The planes of a view with scales and minima, and the buffer, which holds G to 2G tokens:
        1.5 G are counted."""
        exact = min(context, 1.5 * group_size)
        value_groups = -(-model.head_dim // min(group_size, model.head_dim))
        numbers = (32 / group_size + 32 * value_groups / model.head_dim) / 2  # bits a value
        bits = {"int8": 8, "int4": 4}[view] + numbers
        return int(values_per_token(model) * ((context - exact) * bits / 8 + exact * itemsize))

    def logical_axes(self, layer: LayerCache) -> LayerCache:
        """Tiles of planes and slots of the buffer."""
        tiles = ("batch", "kv_heads", "tiles")

        def planes(x: Planes | None, numbers: tuple[str, ...]) -> Any:
            assert x is not None
            code = (*tiles, *("tile_rows", "head_dim")[-(x.upper.ndim - 3) :])
            return Planes(code, code, (*tiles, *numbers), (*tiles, *numbers))  # type: ignore[arg-type]

        return LayerCache(
            planes(layer.keys, ("head_dim",)),
            planes(layer.values, ("value_groups", "tokens")),
            BUFFER_AXES,
            BUFFER_AXES,
        )


def _write_tile(leaf: jax.Array, new: jax.Array, b: jax.Array, tile: jax.Array) -> jax.Array:
    """Write `new` [1, K, 1, ...] as tile number `tile` of sequence b."""
    if leaf.dtype == jnp.float16:  # as integers: XLA's CPU backend would convert the whole array
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16)
        bits = _write_tile(bits, jax.lax.bitcast_convert_type(new, jnp.uint16), b, tile)
        return jax.lax.bitcast_convert_type(bits, jnp.float16)
    at: tuple[Any, ...] = (b, 0, tile, *[0] * (leaf.ndim - 3))
    return jax.lax.dynamic_update_slice(leaf, new, at)
