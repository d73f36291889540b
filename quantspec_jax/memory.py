"""Memory: whether what a call needs fits into the device's, asked before anything is allocated."""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Mapping
from typing import Any

import jax

_ANALYSES: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree, on one device."""
    return sum(math.prod(_own_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _own_shape(x: Any) -> tuple[int, ...]:
    """Of a device's part."""
    where = getattr(x, "sharding", None)
    return x.shape if where is None else where.shard_shape(x.shape)


def temporary_bytes(executable: Any) -> int:
    """Bytes that a compiled program allocates while it runs, besides arguments and results."""
    return _analysis(executable)[0]


def code_bytes(executable: Any) -> int:
    """Bytes of a compiled program's code; 0 where the backend does not say, as XLA's for CPUs."""
    return _analysis(executable)[1]


def _analysis(executable: Any) -> tuple[int, int]:
    """Temporary bytes and those of code, found once: a large program takes up to a second."""
    if executable not in _ANALYSES:
        found = executable.memory_analysis()
        sizes = (found.temp_size_in_bytes, found.generated_code_size_in_bytes) if found else (0, 0)
        _ANALYSES[executable] = sizes
    return _ANALYSES[executable]


def give_back() -> None:
    """Freed memory of the host to the system, where its allocator keeps it (glibc): compilers free
    hundreds of megabytes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def device() -> Any:
    """The device that arrays are made on."""
    return jax.local_devices()[0]


def free_bytes() -> int | None:
    """Bytes that can still be allocated; None where the device does not say (a CPU)."""
    found = device().memory_stats() or {}
    if "bytes_limit" not in found:
        return None
    return found["bytes_limit"] - found.get("bytes_in_use", 0)


def require_memory(what: str, parts: Mapping[str, int], present: int = 0) -> None:
    """ValueError unless the device can hold `parts` (name → bytes), `present` bytes of which lie on
    it already. Where the device does not say what it has, nothing is checked."""
    free = free_bytes()
    if free is None:
        return
    needed, there = sum(parts.values()), free + present
    if needed > there:
        words = ", ".join(f"{name} {size:,}" for name, size in parts.items() if size)
        raise ValueError(
            f"{what} needs {needed:,} bytes ({words}); {device().device_kind} has {there:,} bytes"
        )
