"""No planes: every token in full precision, in a buffer that holds the longest sequence."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Read
from pallas_kernels.layout import LayerCache
from quantspec_jax.cache.codecs.codec import fit, values_per_token
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.models.config import ModelConfig

FULL = Read("full")
POSITIONS: Any = ("batch", "kv_heads", "positions", "head_dim")


@dataclasses.dataclass(frozen=True)
class Full:
    """Keys and values as they are; one view, `full`."""

    views: tuple[str, ...] = ("full",)
    draft: Read = FULL
    recodes: bool = False

    def num_tiles(self, max_length: int, group_size: int) -> int:
        """None."""
        return 0

    def buffer_length(self, max_length: int, group_size: int, pass_width: int) -> int:
        """Every token and a pass beyond."""
        return max_length + pass_width

    def quantized_length(self, length: jax.Array, group_size: int) -> jax.Array:
        """Always 0."""
        return jnp.zeros_like(length)

    def from_prompt(
        self,
        keys: jax.Array,
        values: jax.Array,
        length: jax.Array,
        config: CacheConfig,
        backend: str,
    ) -> LayerCache:
        """The prompt's keys and values in the buffer."""
        slots = config.buffer_length
        return LayerCache(None, None, fit(keys, slots), fit(values, slots))

    def encode_tile(
        self,
        layer: LayerCache,
        sequence: jax.Array,
        tile: jax.Array,
        place: jax.Array,
        group_size: int,
        backend: str,
    ) -> LayerCache:
        """Nothing ever moves."""
        return layer

    def decoded(
        self, keys: jax.Array, values: jax.Array, read: Read, group_size: int
    ) -> tuple[jax.Array, jax.Array]:
        """As they are."""
        return keys, values

    def read_bytes(
        self, model: ModelConfig, view: str, context: float, itemsize: int, group_size: int
    ) -> int:
        """All tokens."""
        return int(values_per_token(model) * context * itemsize)

    def logical_axes(self, layer: LayerCache) -> LayerCache:
        """Of the buffer, whose slots are positions."""
        return LayerCache(None, None, POSITIONS, POSITIONS)
