"""What a codec is: how tokens lie in the cache. Everything else asks it and knows none by name."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from pallas_kernels.kv_attention.read import Read
from pallas_kernels.layout import LayerCache, Planes
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.models.config import ModelConfig


class Codec(Protocol):
    """One way to store keys and values.

    views    what a pass may read of it, by name, the finest first
    draft    what a draft reads (its view may be the target's)
    recodes  tokens are coded, all layers of them together, and lie in the buffer as they are read
    """

    @property
    def views(self) -> tuple[str, ...]: ...

    @property
    def draft(self) -> Read: ...

    @property
    def recodes(self) -> bool: ...

    def num_tiles(self, max_length: int, group_size: int) -> int:
        """Tiles of G tokens for `max_length` tokens."""
        ...

    def buffer_length(self, max_length: int, group_size: int, pass_width: int) -> int:
        """R, slots of the full-precision buffer."""
        ...

    def quantized_length(self, length: jax.Array, group_size: int) -> jax.Array:
        """Tokens that a query at position `length` does not read in full precision."""
        ...

    def from_prompt(
        self,
        keys: jax.Array,
        values: jax.Array,
        length: jax.Array,
        config: CacheConfig,
        backend: str,
    ) -> LayerCache:
        """One layer's cache after a prompt: [B, K, P, D] in full precision, valid below `length`
        [B], as the next position reads it."""
        ...

    def encode_tile(
        self,
        layer: LayerCache,
        sequence: jax.Array,
        tile: jax.Array,
        place: jax.Array,
        group_size: int,
        backend: str,
    ) -> LayerCache:
        """The G tokens of tile number `tile` of one sequence, from the buffer to `place` among the
        tiles that are here."""
        ...

    def decoded(
        self, keys: jax.Array, values: jax.Array, read: Read, group_size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Keys after RoPE and values [B, K, T, D] in full precision → what `read` reads of them
        once they are coded, in their type: for evaluation and calibration."""
        ...

    def read_bytes(
        self, model: ModelConfig, view: str, context: float, itemsize: int, group_size: int
    ) -> int:
        """Bytes that a pass over a view reads of one sequence's `context` tokens, `itemsize` bytes
        a value in full precision."""
        ...

    def logical_axes(self, layer: LayerCache) -> LayerCache:
        """A tuple of logical axis names in place of each array."""
        ...


def planes_of(layer: LayerCache) -> list[Planes]:
    """The planes that a layer has."""
    return [planes for planes in (layer.keys, layer.values) if planes is not None]


BUFFER_AXES: Any = ("batch", "kv_heads", "slots", "head_dim")


def values_per_token(model: ModelConfig) -> int:
    """Numbers of all layers' keys and values."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim


def fit(x: jax.Array, size: int) -> jax.Array:
    """Cut or zero-pad axis 2 to `size`."""
    import jax.numpy as jnp

    x = x[:, :, :size]
    return jnp.pad(x, [(0, size - n if axis == 2 else 0) for axis, n in enumerate(x.shape)])
