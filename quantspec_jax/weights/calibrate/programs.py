"""How the programs of a calibration are compiled.

Each runs a few dozen times, so on a GPU the time goes into compiling them: most of it into trying
kernels for products in full float32, Triton's among them, which are slow to compile and never the
fastest. cuBLAS as it is does as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

GPU_OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def program(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function as a program of its own; `static` names its arguments that are no arrays."""

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def compiled() -> Callable[..., Any]:
            return jax.jit(function, static_argnames=static, compiler_options=_options())

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return compiled()(*args, **options)

        return call

    return made


@functools.cache
def _options() -> dict[str, Any] | None:
    """Those of `GPU_OPTIONS` that this version of XLA knows, on a GPU."""
    if jax.default_backend() != "gpu":
        return None
    return {name: value for name, value in GPU_OPTIONS.items() if knows(name, value)}


def knows(name: str, value: Any) -> bool:
    """Whether XLA takes an option of the compiler."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
