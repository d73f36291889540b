"""Products of a few activation rows with packed 4-bit weights."""

from __future__ import annotations

import jax

from pallas_kernels.int4_matmul import reference
from pallas_kernels.layout import QuantizedWeight


def int4_matmul(x: jax.Array, weight: QuantizedWeight, *, backend: str = "auto") -> jax.Array:
    """[..., Kin] activations times a packed [Kin, N] weight → [..., N] float32."""
    del backend  # The XLA form is the only one so far.
    return reference.int4_matmul(x, weight)
