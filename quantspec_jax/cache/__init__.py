"""The hierarchical key-value cache."""

from quantspec_jax.cache.cache import (
    CACHE_VERSION,
    HierarchicalKVCache,
    LayerCache,
    append,
    cache_bytes,
    create,
    flush,
    flush_due,
    from_prompt,
    logical_axes,
    quantized_length,
    rollback,
)

__all__ = [
    "CACHE_VERSION",
    "HierarchicalKVCache",
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
