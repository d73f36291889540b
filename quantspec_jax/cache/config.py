"""The shape of a key-value cache."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from quantspec_jax.checks import is_int, require
from quantspec_jax.dtypes import FLOAT32, float_type

View = Literal["full", "int8", "int4"]


VIEWS: tuple[View, ...] = ("full", "int8", "int4")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Shape of a key-value cache.

    Args:
      max_length: T, tokens that the cache can hold for each sequence.
      group_size: G, tokens a quantization group of the keys spans; also the size of each half
        of the full-precision buffer.
      view: what the target reads: `int8` both planes, `int4` the upper plane, `full` no planes.
      pass_width: S, the widest pass that will be appended.
      dtype: of the full-precision tokens.
    """

    max_length: int
    group_size: int = 128
    view: View = "int8"
    pass_width: int = 5
    dtype: np.dtype = FLOAT32

    def __post_init__(self) -> None:
        require(
            is_int(self.max_length) and self.max_length >= 1,
            "max_length",
            self.max_length,
            "an integer ≥ 1",
        )
        require(
            is_int(self.group_size) and self.group_size >= 8 and self.group_size % 8 == 0,
            "group_size",
            self.group_size,
            "a multiple of 8",
        )
        require(self.view in VIEWS, "view", self.view, ", ".join(VIEWS))
        object.__setattr__(self, "dtype", float_type(self.dtype))
        require(
            is_int(self.pass_width) and 1 <= self.pass_width <= self.group_size,
            "pass_width",
            self.pass_width,
            f"1 to group_size = {self.group_size}",
        )

    @property
    def num_tiles(self) -> int:
        """Tiles of `group_size` tokens in the planes; 0 for the full view."""
        return 0 if self.view == "full" else -(-self.max_length // self.group_size)

    @property
    def buffer_length(self) -> int:
        """R, slots of the full-precision buffer: F1 and F2, or every token and a pass beyond."""
        if self.view == "full":
            return self.max_length + self.pass_width
        return 2 * self.group_size
