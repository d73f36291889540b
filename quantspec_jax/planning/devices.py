"""What devices can do, from their data sheets, and which share of it the kernels reach."""

from __future__ import annotations

import dataclasses

from pallas_kernels.devices import Capability, generation
from quantspec_jax.checks import require

# What is read of the bandwidth in the data sheet: 4,390 of 4,800 GB/s, measured on an H200.
READABLE = 0.915


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device can do.

    Args:
      memory: GiB, None if unknown: then whether a plan fits is not judged.
      bandwidth: GB/s that are read in practice.
      teraflops: bf16 products with sums in float32, dense; None: taken to be no limit.
      capability: CUDA compute capability (major, minor), None if unknown.
    """

    memory: float | None
    bandwidth: float
    teraflops: float | None = None
    capability: Capability | None = None

    def __post_init__(self) -> None:
        for name in ("memory", "bandwidth"):
            value = getattr(self, name)
            positive = value is None or 0 < value < float("inf")
            require(positive, name, value, "a positive number")

    @property
    def without_kernels(self) -> str | None:
        """Why no kernel runs on it, under this version of JAX; None where they do, or may."""
        return None if self.capability is None else generation(self.capability).unsupported

    def milliseconds(self, bytes_read: float, operations: float = 0) -> float:
        """The least time of a pass: what takes longer, reading or arithmetic."""
        arithmetic = operations / (self.teraflops * 1e9) if self.teraflops else 0
        return max(bytes_read / (self.bandwidth * 1e6), arithmetic)


def _data_sheet(
    memory: float, bandwidth: float, teraflops: float, capability: Capability
) -> Device:
    return Device(memory, READABLE * bandwidth, teraflops, capability)


DEVICES = {
    "a100": _data_sheet(79.2, 2039, 312, (8, 0)),
    "a100-40gb": _data_sheet(39.4, 1555, 312, (8, 0)),
    "b200": _data_sheet(178, 8000, 2250, (10, 0)),
    "h100": _data_sheet(79.2, 3350, 989, (9, 0)),
    "h100-pcie": _data_sheet(79.2, 2000, 756, (9, 0)),
    "h200": _data_sheet(139.8, 4800, 989, (9, 0)),
    "l4": _data_sheet(22.5, 300, 121, (8, 9)),
    "l40s": _data_sheet(44.5, 864, 362, (8, 9)),
    "rtx3090": _data_sheet(23.6, 936, 71, (8, 6)),
    "rtx4090": _data_sheet(23.6, 1008, 165, (8, 9)),
    "rtx5090": _data_sheet(31.4, 1792, 209, (12, 0)),
}


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Which share of its limit a pass reaches; 1 is the limit itself."""

    plain: float = 1.0
    draft: float = 1.0
    verify: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(0 < value <= 1, f"{field.name} efficiency", value, "over 0, up to 1")


AT_THE_LIMIT = Efficiency()
