"""Which backend runs a kernel: the same rule for all of them.

`xla` and `mosaic_gpu` run what they name or raise; `auto` takes the Pallas kernel where the default
device is a CUDA device and the kernel can do the shape, and says once what it leaves to XLA.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax

BACKENDS = ("auto", "mosaic_gpu", "xla")
# Multiprocessors of the device that a kernel is lowered for where none is at hand (H100, H200).
DEFAULT_MULTIPROCESSORS = 132
# Shared memory that a block can have on Hopper, less what Mosaic GPU keeps for itself.
SHARED_BYTES = 232448 - 2048


@functools.cache
def device() -> Any:
    """The default device, where it is a CUDA device of compute capability 9 or more; else None."""
    if jax.default_backend() != "gpu":
        return None
    first = jax.devices()[0]
    capability = str(getattr(first, "compute_capability", "0"))
    return first if capability.split(".")[0].isdigit() and float(capability) >= 9 else None


def device_name() -> str:
    """Name of the device that kernels are configured for."""
    found = device()
    return found.device_kind if found is not None else "NVIDIA H200"


def multiprocessors() -> int:
    """Multiprocessors of the default device."""
    return int(getattr(device(), "core_count", 0) or DEFAULT_MULTIPROCESSORS)


@functools.cache
def _notice(kernel: str, reason: str) -> None:
    warnings.warn(f"{kernel} runs in XLA: {reason}", stacklevel=4)


def use_mosaic_gpu(backend: str, kernel: str, unsupported: str | None) -> bool:
    """Whether the Pallas kernel runs. `unsupported`: why it cannot do this call, or None."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "xla":
        return False
    if device() is None:
        unsupported = "it needs a CUDA device of compute capability 9.0 or later"
    if unsupported is None:
        return True
    if backend == "mosaic_gpu":
        raise NotImplementedError(f"mosaic_gpu cannot run {kernel} here: {unsupported}")
    if device() is not None:
        _notice(kernel, unsupported)
    return False


@functools.cache
def shared(kernel: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
    """The kernel as a jitted function; `static` names its arguments that are no arrays.

    All calls of one form in a program are then one function of it. Called directly, the kernel
    would be traced, lowered and written into the program again for each layer.
    """
    return jax.jit(kernel, static_argnames=static)
