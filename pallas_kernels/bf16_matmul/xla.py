"""Products in XLA: on a GPU, cuBLAS."""

from __future__ import annotations

from typing import Any

import jax


def matmul(
    x: jax.Array,
    weight: jax.Array,
    transposed: bool,
    out_dtype: Any,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """[..., Kin] times a [Kin, N] weight, or a `transposed` one [N, Kin] → [..., N]."""
    axis = 1 if transposed else 0  # contracted where it lies, so that nothing is transposed
    return jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (axis,)), ((), ())),
        precision=precision,
        preferred_element_type=out_dtype,
    )
