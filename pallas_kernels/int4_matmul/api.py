"""Products of a few activation rows with packed 4-bit weights.

The Pallas kernel reads *tiled* weights (`layout.tile`, once, when a model comes to its device), and
no others: tiling one in each call would be a pass over the weight, far more than the product takes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul import xla
from pallas_kernels.layout import PackedWeight, TiledWeight, untile
from pallas_kernels.products.around import NOTHING, PLAIN, Around, apart, check
from pallas_kernels.shapes import Inputs, Outputs, shaped


@shaped
def int4_matmul(
    x: Inputs, weight: PackedWeight, *, out_dtype: Any = jnp.float32, backend: str = "auto"
) -> Outputs:
    """[..., Kin] activations times a packed [Kin, N] weight → [..., N]."""
    return int4_matmuls(x, [weight], out_dtype=out_dtype, backend=backend)[0]


@shaped
def int4_matmuls(
    x: Inputs,
    weights: Sequence[PackedWeight],
    around: Around = NOTHING,
    *,
    out_dtype: Any = jnp.float32,
    backend: str = "auto",
) -> list[jax.Array]:
    """[..., Kin] activations times several packed [Kin, N] weights: a [..., N] each.

    Weights that are alike (`_form`) are one launch, one pass over memory, with what stands around
    them in it. Sums are float32 and become `out_dtype`, float32 or bfloat16, in the end; of a gated
    pair, and of a product that is added to something, there is one result in x's type.
    """
    if jnp.dtype(out_dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"out_dtype is {out_dtype}; it can be float32 or bfloat16")
    check(around, [weight.outputs for weight in weights])
    if around.form != PLAIN and not takes(x, weights, around, backend):
        plain = functools.partial(
            int4_matmuls, weights=weights, out_dtype=out_dtype, backend=backend
        )
        return apart(x, around, plain)
    products: dict[int, jax.Array] = {}
    for form in dict.fromkeys(map(_form, weights)):
        alike = [i for i, weight in enumerate(weights) if _form(weight) == form]
        found = _launch(x, [weights[i] for i in alike], around, out_dtype, backend)
        products.update(zip(alike, found, strict=False))
    return [products[i] for i in sorted(products)]


def takes(x: Any, weights: Sequence[PackedWeight], around: Around, backend: str = "auto") -> bool:
    """Whether one launch of the Pallas kernel does a call with all that stands around it."""
    if backend == "xla" or dispatch.device() is None or len({*map(_form, weights)}) > 1:
        return False
    from pallas_kernels.int4_matmul import configs, mosaic_gpu

    if mosaic_gpu.unsupported(x, weights, around) is not None:
        return False
    return around.form == PLAIN or bool(configs.candidates(mosaic_gpu.shape_of(x, weights, around)))


def _form(weight: PackedWeight) -> tuple[Any, ...]:
    """What weights of one launch have in common: whether they are tiled, groups, the groups' size,
    whether there are minima."""
    return (type(weight), weight.groups, weight.group_size, weight.symmetric)


def _launch(
    x: jax.Array, weights: Sequence[PackedWeight], around: Around, out_dtype: Any, backend: str
) -> list[jax.Array]:
    if _mosaic_gpu(x, weights, backend):
        from pallas_kernels.int4_matmul import configs, mosaic_gpu

        around = around.launched()
        config = configs.choose(mosaic_gpu.shape_of(x, weights, around))
        kernel = dispatch.shared(mosaic_gpu.int4_matmuls, ("config", "out_dtype", "bulk"))
        bulk = dispatch.target().generation.bulk_copies
        dtype = jnp.dtype(out_dtype)
        return kernel(x, weights, around, config=config, out_dtype=dtype, bulk=bulk)
    plain = [untile(w) if isinstance(w, TiledWeight) else w for w in weights]
    product = dispatch.shared(xla.int4_matmul, ())
    return [product(x, weight).astype(out_dtype) for weight in plain]


def _mosaic_gpu(x: jax.Array, weights: Sequence[PackedWeight], backend: str) -> bool:
    """Whether the Pallas kernel takes the call. CUDA code is imported only where it can."""
    if backend == "xla" or dispatch.device() is None:
        return dispatch.use_mosaic_gpu(backend, "int4_matmul", None)
    from pallas_kernels.int4_matmul import mosaic_gpu

    return dispatch.use_mosaic_gpu(backend, "int4_matmul", mosaic_gpu.unsupported(x, weights))
