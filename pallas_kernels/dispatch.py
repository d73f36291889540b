"""Which backend runs a kernel: the same rule for all of them.

`xla` and `mosaic_gpu` run what they name or raise; `auto` takes the Pallas kernel where the default
device is one that kernels run on and the kernel can do the shape, and says once what it leaves to
XLA. On a CUDA device that no kernel runs on it says so once, for all of them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import devices, tuned

BACKENDS = ("auto", "mosaic_gpu", "xla")
# Those that stand for XLA's wherever they can; bf16_matmul does where it was measured to be faster.
# logit_filter says nothing where it cannot.
KERNELS = (
    "add_rms_norm",
    "int4_matmul",
    "kv_attention",
    "logit_filter",
    "page_choice",
    "quantize_pack",
    "rope_append",
)


@functools.cache
def cuda_device() -> Any:
    """The default device, where it is a CUDA device; else None."""
    if jax.default_backend() != "gpu":
        return None
    first = jax.devices()[0]
    return None if devices.capability(first) is None else first


def device() -> Any:
    """The default device, where it is a CUDA device that the kernels run on; else None."""
    found = cuda_device()
    return found if found is not None and _unsupported(found) is None else None


def target() -> devices.Device:
    """The device that kernels are configured for: the default one, else `devices.DEFAULT`."""
    found = device()
    return devices.DEFAULT if found is None else devices.of(found)


def _unsupported(cuda_device: Any) -> str | None:
    return devices.of(cuda_device).generation.unsupported


@functools.cache
def _notice(kernel: str, reason: str) -> None:
    warnings.warn(f"{kernel} runs in XLA: {reason}", stacklevel=4)


@functools.cache
def _notice_of_device(found: devices.Device) -> None:
    warnings.warn(
        f"no kernel runs on {found}: {found.generation.unsupported}. In XLA, slower: "
        f"{', '.join(KERNELS)}",
        stacklevel=4,
    )


def use_mosaic_gpu(backend: str, kernel: str, unsupported: str | None) -> bool:
    """Whether the Pallas kernel runs. `unsupported`: why it cannot do this call, or None."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "xla":
        return False
    known = device() is not None
    if known and unsupported is None:
        return True
    if backend == "mosaic_gpu":
        reason = unsupported if known else _without_device()
        raise NotImplementedError(f"mosaic_gpu cannot run {kernel} here: {reason}")
    if known and unsupported is not None:
        _notice(kernel, unsupported)
    elif cuda_device() is not None:
        _notice_of_device(devices.of(cuda_device()))
    return False


def described() -> dict[str, Any]:
    """The default device as kernels see it, and for each kernel None where it runs, else why not
    (`devices.Device.described`)."""
    found = cuda_device()
    if found is None:
        first = jax.devices()[0]
        return {"name": first.device_kind, "kernels": dict.fromkeys(KERNELS, _without_device())}
    known = devices.of(found)
    return {
        **known.described(),
        "configurations": "measured" if tuned.path(known.name).exists() else "by rule",
        "kernels": dict.fromkeys(KERNELS, known.generation.unsupported),
    }


def _without_device() -> str:
    """Why no kernel runs on the default device."""
    found = cuda_device()
    if found is None:
        return "it needs a CUDA device of compute capability 8.0 or later"
    return f"on {devices.of(found)}, {_unsupported(found)}"


@functools.cache
def shared(kernel: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
    """A kernel, or XLA's way of it, as a jitted function; `static` names its arguments that are no
    arrays.

    All calls of one form in a program are then one function of it. Called directly, it would be
    traced, lowered and written into the program again for each layer: of SmolLM2's thirty on two
    cores, seconds before its first token.
    """
    function: Any = jax.jit(kernel, static_argnames=static)
    _SHARED.append(function)
    return function


_SHARED: list[Any] = []


def forget_traces() -> None:
    """Those of `shared` functions, which JAX would keep for the life of the process."""
    for function in _SHARED:
        function.clear_cache()
