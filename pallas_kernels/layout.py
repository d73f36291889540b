"""The packed layout: how 4-bit codes lie in bytes. Defined here and nowhere else.

A *tile* is the smallest thing that is written at once: G tokens of one head for the cache, one
group of input channels for a weight. Codes are signed 4-bit integers, −8..7, stored plus 8, two to
a byte. Everything outside this package treats the bytes of a tile as opaque and moves whole tiles.

    keys     byte [token, e]               low nibble: channel e    high: channel e + D/2
    values   byte [i, channel, e]          low nibble: token W i + e   high: token W i + W/2 + e
             in runs of W = 32 tokens (gcd(G, 32))
    weights  byte [r, c]                   low nibble: input r      high: input r + group/2

A word of 32 bits then holds eight codes along the dimension that the product with it sums over, in
pairs 16 bits apart: one `and` turns it into two float16 numbers that a matrix instruction takes.
`LAYOUT_VERSION` is stored with checkpoints and changes with the layout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

LAYOUT_VERSION = 1


def _pair(codes: jax.Array, axis: int) -> jax.Array:
    """int8 codes −8..7 → uint8, first and second half along `axis` as low and high nibbles."""
    low, high = jnp.split((codes + 8).astype(jnp.uint8), 2, axis)
    return low | (high << 4)


def _unpair(packed: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_pair`."""
    nibbles = [packed & 0xF, packed >> 4]
    return jnp.concatenate([x.astype(jnp.int8) - 8 for x in nibbles], axis)


def pack(codes: jax.Array) -> jax.Array:
    """Weights: [..., group, N] int8 codes in −8..7 → [..., group/2, N] uint8."""
    return _pair(codes, -2)


def unpack(packed: jax.Array) -> jax.Array:
    """The inverse of `pack`."""
    return _unpair(packed, -2)


def unsigned_halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes + 8 (0..15) of the first and of the second half of each group, uint8."""
    return packed & 0xF, packed >> 4


def pack_keys(codes: jax.Array) -> jax.Array:
    """[..., G, D] int8 codes in −8..7 → [..., G, D/2] uint8."""
    return _pair(codes, -1)


def unpack_keys(packed: jax.Array) -> jax.Array:
    """The inverse of `pack_keys`."""
    return _unpair(packed, -1)


def pack_values(codes: jax.Array) -> jax.Array:
    """[..., G, D] int8 codes in −8..7 → [..., D, G/2] uint8 (bytes in the order of the table)."""
    *lead, g, d = codes.shape
    width = math.gcd(g, 32)
    # Transposed as bytes: fused with the quantization before it, XLA's CPU code is ten times
    # slower.
    runs = jax.lax.optimization_barrier(_pair(codes.reshape(*lead, g // width, width, d), -2))
    return jnp.swapaxes(runs, -1, -2).reshape(*lead, d, g // 2)


def unpack_values(packed: jax.Array) -> jax.Array:
    """The inverse of `pack_values`."""
    *lead, d, half = packed.shape
    width = math.gcd(2 * half, 32)
    runs = packed.reshape(*lead, 2 * half // width, d, width // 2)
    return jnp.swapaxes(_unpair(runs, -1), -1, -2).reshape(*lead, 2 * half, d)


def key_halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes + 8 (0..15) of channels below D/2 and from D/2 on, each uint8 [..., G, D/2]."""
    return unsigned_halves(packed)


def value_halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes + 8 (0..15), each uint8 [..., G/W, D, W/2]: of each run of W tokens, the first half and
    the second."""
    *lead, d, half = packed.shape
    width = math.gcd(2 * half, 32)
    return unsigned_halves(packed.reshape(*lead, 2 * half // width, d, width // 2))


class Planes(NamedTuple):
    """Keys or values of one layer in two 4-bit planes (QuantSpec, arXiv 2502.10424, section 4.2).

    upper, lower   uint8 keys   [B, K, T/G, G, D/2]    packed codes u − 8 and l
                         values [B, K, T/G, D, G/2]
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
