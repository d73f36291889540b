"""The shape of a key-value cache."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from quantspec_jax.checks import is_int, require
from quantspec_jax.dtypes import FLOAT32, float_type

if TYPE_CHECKING:
    from quantspec_jax.cache.codecs import Codec


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Shape of a key-value cache.

    Args:
      max_length: T, tokens that the cache can hold for each sequence.
      group_size: G, tokens a quantization group of the keys spans; also the size of each half
        of the full-precision buffer.
      view: what the target reads, one of a codec's views: `int8` both planes, `int4` the upper
        plane, `full` no planes.
      pass_width: S, the widest pass that will be appended.
      dtype: of the full-precision tokens.
    """

    max_length: int
    group_size: int = 128
    view: str = "int8"
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
        from quantspec_jax.cache.codecs import LEARNED_VIEWS, VIEWS  # made of what is here

        views = (*VIEWS, *LEARNED_VIEWS)
        require(self.view in views, "view", self.view, ", ".join(views))
        object.__setattr__(self, "dtype", float_type(self.dtype))
        require(
            is_int(self.pass_width) and 1 <= self.pass_width <= self.group_size,
            "pass_width",
            self.pass_width,
            f"1 to group_size = {self.group_size}",
        )

    @property
    def codec(self) -> Codec:
        """The codec that offers the view."""
        from quantspec_jax.cache.codecs import codec_of

        return codec_of(self.view)

    @property
    def num_tiles(self) -> int:
        """Tiles of `group_size` tokens that are coded; 0 where the codec codes none."""
        return self.codec.num_tiles(self.max_length, self.group_size)

    @property
    def buffer_length(self) -> int:
        """R, slots of the full-precision buffer."""
        return self.codec.buffer_length(self.max_length, self.group_size, self.pass_width)

    @property
    def arrays(self) -> CacheConfig:
        """What the arrays depend on: one configuration for all passes that append to them."""
        narrow = dataclasses.replace(self, pass_width=1)
        return narrow if narrow.buffer_length == self.buffer_length else self
