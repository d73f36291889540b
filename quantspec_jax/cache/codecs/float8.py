"""Every token in 8-bit floats (e4m3: Micikevicius et al., arXiv 2209.05433), as they come, without
scales: the cache that several servers offer. For comparison with codes that have scales; read in
XLA."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Read
from pallas_kernels.layout import LayerCache
from pallas_kernels.rope_append.xla import narrowed
from quantspec_jax.cache.codecs.codec import values_per_token
from quantspec_jax.cache.codecs.full import Full
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.models.config import ModelConfig

E4M3 = jnp.float8_e4m3fn
FLOAT8 = Read("float8")


@dataclasses.dataclass(frozen=True)
class Float8(Full):
    """As `Full`, a byte a number; one view, `float8`. Values beyond ±448 become that."""

    views: tuple[str, ...] = ("float8",)
    draft: Read = FLOAT8

    def from_prompt(
        self,
        keys: jax.Array,
        values: jax.Array,
        length: jax.Array,
        config: CacheConfig,
        backend: str,
    ) -> LayerCache:
        """The prompt's keys and values, rounded, in the buffer."""
        keys, values = narrowed(keys, E4M3), narrowed(values, E4M3)
        return super().from_prompt(keys, values, length, config, backend)

    def decoded(
        self, keys: jax.Array, values: jax.Array, read: Read, group_size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Rounded and back."""
        return narrowed(keys, E4M3).astype(keys.dtype), narrowed(values, E4M3).astype(values.dtype)

    def read_bytes(
        self, model: ModelConfig, view: str, context: float, itemsize: int, group_size: int
    ) -> int:
        """A byte a number."""
        return int(values_per_token(model) * context)
