"""Full-precision keys and values to the two 4-bit planes."""

from __future__ import annotations

import jax

from pallas_kernels.layout import Planes
from pallas_kernels.quantize_pack import reference


def quantize_keys(keys: jax.Array, group_size: int, *, backend: str = "auto") -> Planes:
    """[B, K, T, D] keys after RoPE, T a multiple of G → planes. Groups: G tokens of a channel."""
    del backend  # The XLA form is the only one so far.
    return reference.quantize_keys(keys, group_size)


def quantize_values(values: jax.Array, group_size: int, *, backend: str = "auto") -> Planes:
    """[B, K, T, D] values, T a multiple of G → planes. Groups: min(G, D) channels of a token."""
    del backend  # The XLA form is the only one so far.
    return reference.quantize_values(values, group_size)
