"""Products of a few activation rows with packed 4-bit weights."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul import reference
from pallas_kernels.layout import QuantizedWeight


def int4_matmul(x: jax.Array, weight: QuantizedWeight, *, backend: str = "auto") -> jax.Array:
    """[..., Kin] activations times a packed [Kin, N] weight → [..., N] float32."""
    return int4_matmuls(x, [weight], backend=backend)[0]


def int4_matmuls(
    x: jax.Array, weights: Sequence[QuantizedWeight], *, backend: str = "auto"
) -> list[jax.Array]:
    """[..., Kin] activations times several packed [Kin, N] weights: a [..., N] float32 each.

    Weights whose groups are alike (`_form`) are one launch, one pass over memory.
    """
    products: dict[int, jax.Array] = {}
    for form in dict.fromkeys(map(_form, weights)):
        alike = [i for i, weight in enumerate(weights) if _form(weight) == form]
        found = _launch(x, [weights[i] for i in alike], backend)
        products.update(zip(alike, found, strict=True))
    return [products[i] for i in range(len(weights))]


def _form(weight: QuantizedWeight) -> tuple[int, ...]:
    """What weights of one launch have in common: groups, their size, whether there are minima."""
    return (*weight.packed.shape[:2], weight.minimum is None)


def _launch(x: jax.Array, weights: Sequence[QuantizedWeight], backend: str) -> list[jax.Array]:
    if _mosaic_gpu(x, weights, backend):
        from pallas_kernels.int4_matmul import configs, mosaic_gpu

        config = configs.choose(mosaic_gpu.shape_of(x, weights))
        kernel = dispatch.shared(mosaic_gpu.int4_matmuls, ("config",))
        return kernel(x, weights, config=config)
    return [reference.int4_matmul(x, weight) for weight in weights]


def int4_gated(
    x: jax.Array, gate: QuantizedWeight, up: QuantizedWeight, *, backend: str = "auto"
) -> jax.Array:
    """silu(x·gate) · (x·up), [..., Kin] → [..., N] float32, in one pass over both weights."""
    a, b = int4_matmuls(x, [gate, up], backend=backend)
    return jax.nn.silu(a) * b


def _mosaic_gpu(x: jax.Array, weights: Sequence[QuantizedWeight], backend: str) -> bool:
    """Whether the Pallas kernel takes the call. CUDA code is imported only where it can."""
    if backend == "xla" or dispatch.device() is None:
        return dispatch.use_mosaic_gpu(backend, "int4_matmul", None)
    from pallas_kernels.int4_matmul import mosaic_gpu

    return dispatch.use_mosaic_gpu(backend, "int4_matmul", mosaic_gpu.unsupported(x, weights))
