"""What is decoded where: what a pass reads there, its least time, and the memory that it takes."""

from __future__ import annotations

import dataclasses
import functools

from quantspec_jax.axes import ONE, Axes
from quantspec_jax.checks import require
from quantspec_jax.cost import BF16, cache_read_bytes, meetings, operations
from quantspec_jax.info import cache_sizes
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import parameter_count
from quantspec_jax.planning.devices import AT_THE_LIMIT, Device, Efficiency

GIB = 2**30
# Some kilobytes over the two H200 of a host, in kernels that write into each other's memory: what
# passes take over one device's percentage of the floor is 5 to 9 a meeting. By NCCL, over four, 13
# in a trace of plain decoding.
MEETING_MICROSECONDS = 7.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """The arguments of `plan` besides the candidates.

    Args:
      device: one of those of `axes`, all alike. Bytes and times are a device's.
      axes: over which devices arrays are split; the model has as many key-value heads as `tp` needs
        (`sharding.heads_over`).
      meeting_microseconds: what a meeting of the devices takes, whatever its few kilobytes.
    """

    model: ModelConfig
    context: int
    device: Device
    batch: int = 1
    efficiency: Efficiency = AT_THE_LIMIT
    axes: Axes = ONE
    meeting_microseconds: float = MEETING_MICROSECONDS

    def __post_init__(self) -> None:
        require(self.batch >= 1, "batch", self.batch, "an integer ≥ 1")
        limit = self.model.max_context
        require(1 <= self.context <= limit, "context", self.context, f"1 to {limit}, the model's")
        dp, taken = self.axes.dp, self.meeting_microseconds
        require(self.batch % dp == 0, "batch", self.batch, f"multiples of {dp}, the mesh's dp")
        require(0 <= taken < float("inf"), "meeting microseconds", taken, "0 or more")

    def read_bytes(self, weights: int, view: str, share: float = 1.0) -> int:
        """Of a pass over these weights and a view of the cache, or a share of what it codes."""
        cache = cache_read_bytes(self.model, view, self.context, share=share)
        return weights // self.axes.tp + self.batch * cache // self.axes.size

    def floor(self, read: int, rows: int = 1) -> float:
        """Least milliseconds of a pass of `rows` tokens a sequence."""
        work = operations(self.model, self.context, rows, self.batch, self.axes)
        return self.device.milliseconds(read, work)

    @property
    def meeting_milliseconds(self) -> float:
        """What the devices' meetings add to every pass."""
        return meetings(self.model, self.axes) * self.meeting_microseconds / 1e3

    @functools.cached_property
    def _planes_and_buffer(self) -> int:
        """A device's tiles, and its buffer, which all of `cp` have."""
        found = cache_sizes(self.model, self.context)
        tiles = found["total"] - found["buffer"]
        return (tiles // self.axes.cp + found["buffer"]) // self.axes.tp

    def needed_bytes(self, draft: int = 0, view: str = "int8") -> int:
        """Weights, a draft of so many bytes, and the cache that holds this view."""
        tp, cp, dp = self.axes.tp, self.axes.cp, self.axes.dp
        cache = cache_read_bytes(self.model, "full", self.context) // (tp * cp)
        if view != "full":
            cache = self._planes_and_buffer
        weights = BF16 * parameter_count(self.model) + draft
        return weights // tp + self.batch // dp * cache

    def fits(self, needed: int) -> bool | None:
        """Whether the device has as many bytes; None where that is not known."""
        there = self.device.memory
        return None if there is None else needed <= there * GIB
