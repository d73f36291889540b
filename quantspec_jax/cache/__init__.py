"""The key-value cache: its arrays, its schedule, and the codecs that say how tokens lie in it."""

from pallas_kernels.rope_append.xla import append
from quantspec_jax.cache.cache import (
    cache_bytes,
    create,
    flush,
    flush_due,
    from_prompt,
    logical_axes,
    rollback,
)
from quantspec_jax.cache.schedule import quantized_length
from quantspec_jax.cache.state import KVCache, LayerCache

__all__ = [
    "KVCache",
    "LayerCache",
    "append",
    "cache_bytes",
    "create",
    "flush",
    "flush_due",
    "from_prompt",
    "logical_axes",
    "quantized_length",
    "rollback",
]
