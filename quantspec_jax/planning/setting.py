"""What is decoded where: what a pass reads there, its least time, and the memory that it takes."""

from __future__ import annotations

import dataclasses
import functools

from quantspec_jax.checks import require
from quantspec_jax.cost import BF16, cache_read_bytes, operations
from quantspec_jax.info import cache_sizes
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import parameter_count
from quantspec_jax.planning.devices import AT_THE_LIMIT, Device, Efficiency

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Setting:
    """The arguments of `plan` besides the candidates."""

    model: ModelConfig
    context: int
    device: Device
    batch: int = 1
    efficiency: Efficiency = AT_THE_LIMIT

    def __post_init__(self) -> None:
        require(self.batch >= 1, "batch", self.batch, "an integer ≥ 1")
        limit = self.model.max_context
        require(1 <= self.context <= limit, "context", self.context, f"1 to {limit}, the model's")

    def read_bytes(self, weights: int, view: str, share: float = 1.0) -> int:
        """Of a pass over these weights and a view of the cache, or a share of what it codes."""
        cache = cache_read_bytes(self.model, view, self.context, share=share)
        return weights + self.batch * cache

    def floor(self, read: int, rows: int = 1) -> float:
        """Least milliseconds of a pass of `rows` tokens a sequence."""
        return self.device.milliseconds(
            read, operations(self.model, self.context, rows, self.batch)
        )

    @functools.cached_property
    def _planes_and_buffer(self) -> int:
        return cache_sizes(self.model, self.context)["total"]

    def needed_bytes(self, draft: int = 0, view: str = "int8") -> int:
        """Weights, a draft of so many bytes, and the cache that holds this view."""
        cache = cache_read_bytes(self.model, "full", self.context)
        if view != "full":
            cache = self._planes_and_buffer
        return BF16 * parameter_count(self.model) + draft + self.batch * cache

    def fits(self, needed: int) -> bool | None:
        """Whether the device has as many bytes; None where that is not known."""
        there = self.device.memory
        return None if there is None else needed <= there * GIB
