"""Products of a few activation rows with bfloat16 weights, and what stands around them.

Weights are read where they lie. The Pallas kernel takes up to 16 rows, where it is known to be
faster than XLA (`configs.faster`); all else is XLA's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.bf16_matmul import xla
from pallas_kernels.products.around import NOTHING, Around, apart, check
from pallas_kernels.shapes import Inputs, shaped


@shaped
def bf16_matmuls(
    x: Inputs,
    weights: Sequence[jax.Array],
    around: Around = NOTHING,
    *,
    transposed: bool = False,
    out_dtype: Any = jnp.float32,
    backend: str = "auto",
) -> list[jax.Array]:
    """[..., Kin] activations times several [Kin, N] weights, a [..., N] each; one launch.

    Args:
      x, weights: bfloat16.
      around: what is done before and after the products; of a gated pair, and of a product that is
        added to something, one result in bfloat16.
      transposed: weights are [N, Kin].
      out_dtype: of the results, float32 or bfloat16; sums are float32.
      backend: `auto`, `mosaic_gpu` or `xla`.
    """
    check(around, [w.shape[0 if transposed else 1] for w in weights])
    if backend == "mosaic_gpu" or takes(x, weights, around, transposed, backend):
        return _launch(x, weights, around, transposed, out_dtype, backend)

    def multiply(h: jax.Array) -> list[jax.Array]:
        return [xla.matmul(h, w, transposed, out_dtype) for w in weights]

    return apart(x, around, multiply)


def takes(
    x: Any, weights: Sequence[Any], around: Around, transposed: bool = False, backend: str = "auto"
) -> bool:
    """Whether the Pallas kernel does a call where the backend may be chosen: where it is known to
    be faster. Elsewhere products are XLA's, and nothing is said of it."""
    if backend == "xla" or dispatch.device() is None or _reason(x, weights, around, transposed):
        return False
    from pallas_kernels.bf16_matmul import configs, mosaic_gpu

    return configs.faster(mosaic_gpu.shape_of(x, weights, around, transposed))


def _reason(x: Any, weights: Sequence[Any], around: Around, transposed: bool) -> str | None:
    """Why the kernel cannot do a call, or None. CUDA code is imported only where it can run."""
    from pallas_kernels.bf16_matmul import configs, mosaic_gpu

    shape = mosaic_gpu.shape_of(x, weights, around, transposed)
    reason = mosaic_gpu.unsupported(x, weights, around, transposed)
    if reason is None and not configs.candidates(shape):
        return f"{shape.rows} rows of {shape.inputs} channels do not fit into shared memory"
    return reason


def _launch(
    x: jax.Array,
    weights: Sequence[jax.Array],
    around: Around,
    transposed: bool,
    out_dtype: Any,
    backend: str,
) -> list[jax.Array]:
    known = dispatch.device() is not None
    reason = _reason(x, weights, around, transposed) if known else None
    dispatch.use_mosaic_gpu(backend, "bf16_matmul", reason)  # raises where it cannot
    from pallas_kernels.bf16_matmul import configs, mosaic_gpu

    around = around.launched()
    kernel = dispatch.shared(
        mosaic_gpu.bf16_matmuls, ("config", "multiprocessors", "transposed", "out_dtype")
    )
    return kernel(
        x,
        weights,
        around,
        config=configs.choose(mosaic_gpu.shape_of(x, weights, around, transposed)),
        multiprocessors=dispatch.target().multiprocessors,
        transposed=transposed,
        out_dtype=jnp.dtype(out_dtype),
    )
