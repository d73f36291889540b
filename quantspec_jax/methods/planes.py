"""The two 4-bit planes (QuantSpec, arXiv 2502.10424), and the cache in full precision."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.kv_attention.read import Read
from quantspec_jax.cache.codecs import EXACT_TILES, codec_of
from quantspec_jax.cache.codecs.codec import values_per_token
from quantspec_jax.methods.method import Layer, Method
from quantspec_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Planes(Method):
    """A view of the cache that decoding uses, and how many tiles at the beginning it reads with
    both planes: as a draft does (`cache.codecs.EXACT_TILES`)."""

    view: str
    exact_tiles: int = 0
    group_size: int = 128
    of_planes: bool = dataclasses.field(default=True, kw_only=True)

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """What a pass reads, as the codec counts it: the buffer, too."""
        read = codec_of(self.view).read_bytes(model, self.view, tokens, 2, self.group_size)
        return 8 * read / (values_per_token(model) * tokens)

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """Coded and read again."""
        keys, values = (x.swapaxes(0, 1)[None] for x in text)
        read = Read(self.view, self.exact_tiles)
        decoded = codec_of(self.view).decoded(keys, values, read, self.group_size)
        return Layer(*(x[0].swapaxes(0, 1) for x in decoded))


def as_read(view: str, group_size: int) -> Planes:
    """A view as decoding reads it: a draft's, int4, with its first tiles in both planes."""
    return Planes(view, EXACT_TILES if view == "int4" else 0, group_size)
