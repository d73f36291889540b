"""What kernels may count on: a record for each generation of GPUs, and a device as they see it.

Whatever depends on the hardware asks here. A further generation is a row of `GENERATIONS`, and a
file of measured configurations (`tuned`).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax

Capability = tuple[int, int]  # CUDA compute capability: major, minor


@dataclasses.dataclass(frozen=True)
class Generation:
    """Devices from one compute capability on, up to the next record's.

    shared_bytes    shared memory that a block can have, in bytes
    threads         a multiprocessor runs at once
    least_jax       the first version of JAX that compiles kernels for it
    bf16_mma        matrix products of one warp take bfloat16 (m16n8k16)
    bulk_copies     a copy engine brings pieces of memory into shared memory, and barriers count
                    bytes
    clusters        blocks reach each other's shared memory
    early_launches  a launch may begin before the one before it has ended
    wgmma           matrix products of four warps, with an operand in shared memory
    """

    name: str
    capability: Capability
    shared_bytes: int
    threads: int
    least_jax: tuple[int, int] = (0, 10)
    bf16_mma: bool = True
    bulk_copies: bool = True
    clusters: bool = True
    early_launches: bool = True
    wgmma: bool = False

    @property
    def unsupported(self) -> str | None:
        """Why the kernels do not run on it, or None."""
        if not self.bf16_mma:
            return "they multiply bfloat16, which takes compute capability 8.0 or later"
        if jax.__version_info__ < self.least_jax:
            least = ".".join(map(str, self.least_jax))
            return f"it takes JAX {least} or later to compile them, and this is {jax.__version__}"
        return None


def _generation(
    name: str, capability: Capability, shared_kib: int, threads: int, **more: Any
) -> Generation:
    return Generation(name, capability, shared_kib << 10, threads, **more)


# JAX 0.10 aborts the process when it compiles a kernel for them.
_OLDER: dict[str, Any] = {
    "least_jax": (0, 11),
    "bulk_copies": False,
    "clusters": False,
    "early_launches": False,
}
# NVIDIA's CUDA programming guide, "Compute Capabilities": technical specifications.
GENERATIONS = (
    _generation("before Ampere", (0, 0), 48, 1024, bf16_mma=False, **_OLDER),
    _generation("Ampere", (8, 0), 163, 2048, **_OLDER),
    _generation("Ampere", (8, 6), 99, 1536, **_OLDER),
    _generation("Ada", (8, 9), 99, 1536, **_OLDER),
    _generation("Hopper", (9, 0), 227, 2048, wgmma=True),
    _generation("Blackwell", (10, 0), 227, 2048),
    _generation("Blackwell", (12, 0), 99, 1536),
)
REGISTERS = 65536  # of 32 bits, a multiprocessor has, in all of them
# Of a block's shared memory, what Mosaic GPU keeps for itself.
RESERVED_BYTES = 2048


def generation(capability: Capability) -> Generation:
    """The record of a compute capability: the last that does not come after it."""
    return next(g for g in reversed(GENERATIONS) if g.capability <= capability)


@dataclasses.dataclass(frozen=True)
class Device:
    """A CUDA device as kernels are configured for it.

    name             what its file of measured configurations is called after
    capability       compute capability
    multiprocessors  that it has
    shared_bytes     shared memory that a block can have, in bytes
    """

    name: str
    capability: Capability
    multiprocessors: int
    shared_bytes: int

    @property
    def generation(self) -> Generation:
        return generation(self.capability)

    @property
    def usable_bytes(self) -> int:
        """Shared memory that a kernel can ask for."""
        return self.shared_bytes - RESERVED_BYTES

    def described(self) -> dict[str, Any]:
        """For people and programs that ask."""
        return {
            "name": self.name,
            "compute_capability": ".".join(map(str, self.capability)),
            "multiprocessors": self.multiprocessors,
            "shared_bytes": self.shared_bytes,
            "copies": "in bulk" if self.generation.bulk_copies else "by the threads",
            "clusters": self.generation.clusters,
        }

    def __str__(self) -> str:
        return f"{self.name} (compute capability {'.'.join(map(str, self.capability))})"


# What a kernel is lowered for where no device is at hand.
DEFAULT = Device("NVIDIA H200", (9, 0), 132, generation((9, 0)).shared_bytes)


def capability(device: Any) -> Capability | None:
    """A JAX device's compute capability; None where it is no CUDA device."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else None


def of(device: Any) -> Device:
    """A JAX device's record: what the device says of itself, else what its generation has."""
    known = capability(device)
    if known is None:
        raise ValueError(f"device is {device!r}; allowed: CUDA devices")
    shared_bytes = getattr(device, "shared_memory_per_block_optin", None)
    return Device(
        device.device_kind,
        known,
        int(getattr(device, "core_count", 0) or DEFAULT.multiprocessors),
        int(shared_bytes or generation(known).shared_bytes),
    )
