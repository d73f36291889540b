"""The packed layout: how 4-bit codes lie in bytes. Defined here and nowhere else.

A *tile* is the smallest thing that is written at once: G tokens of one head for the cache, one
group of input channels for a weight. Codes are signed 4-bit integers, −8..7 (the upper plane
stores u − 8: signed integers have the faster conversion on the GPU), two to a byte:

    tile [R, C]   rows R = tokens (cache) or input channels (weights)
    byte [r, c]   low nibble: code [r, c]     high nibble: code [r + R/2, c]      r < R/2

Everything outside this file treats the bytes of a tile as opaque: it moves whole tiles, and reads
codes through `unpack`. `LAYOUT_VERSION` is stored with checkpoints and changes with the layout.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LAYOUT_VERSION = 1


def pack(codes: jax.Array) -> jax.Array:
    """[..., R, C] int8 codes in −8..7 → [..., R/2, C] uint8. R is even."""
    half = codes.shape[-2] // 2
    bits = codes.astype(jnp.uint8) & 0xF
    return bits[..., :half, :] | (bits[..., half:, :] << 4)


def unpack(packed: jax.Array) -> jax.Array:
    """[..., R/2, C] uint8 → [..., R, C] int8 codes in −8..7; the inverse of `pack`."""
    low = jnp.left_shift(packed, 4).astype(jnp.int8) >> 4
    high = packed.astype(jnp.int8) >> 4
    return jnp.concatenate([low, high], axis=-2)


class Planes(NamedTuple):
    """Keys or values of one layer in two 4-bit planes (QuantSpec, arXiv 2502.10424, section 4.2).

    upper, lower   uint8 [B, K, T/G, G/2, D]     packed codes u − 8 and l
    scale, minimum bf16  keys   [B, K, T/G, D]         one group: G tokens of a channel
                         values [B, K, T/G, V, G]      one group: min(G, D) channels of a token,
                                                       V = ⌈D / min(G, D)⌉ groups a token
    """

    upper: jax.Array
    lower: jax.Array
    scale: jax.Array
    minimum: jax.Array


class QuantizedWeight(NamedTuple):
    """A [Kin, N] weight in groups of `group` input channels: w = minimum + scale (code + 8), or
    w = scale · code where `minimum` is None (symmetric).

    packed  uint8 [Kin/group, group/2, N]   the last group is filled up where Kin is no multiple
    scale   bf16  [Kin/group, N]
    minimum bf16  [Kin/group, N] or None
    """

    packed: jax.Array
    scale: jax.Array
    minimum: jax.Array | None

    @property
    def group_size(self) -> int:
        """Input channels a group."""
        return 2 * self.packed.shape[-2]
