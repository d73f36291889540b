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

A GPU multiplies with a weight that is *tiled* (`TiledWeight`): the same codes and numbers in the
order in which a warp reads them. Tiling is done on the device; nothing stores it.
"""

from __future__ import annotations

import dataclasses
import functools
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "key_buffer", "value_buffer"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys (after RoPE) and values.

    keys, values              planes of T/G tiles, or None in the full view
    key_buffer, value_buffer  [B, K, R, D] full precision, position p in slot p mod R; R = 2G,
                              or beyond the longest sequence in the full view
    """

    keys: Planes | None
    values: Planes | None
    key_buffer: jax.Array
    value_buffer: jax.Array


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
    def groups(self) -> int:
        """Groups of input channels."""
        return self.packed.shape[0]

    @property
    def group_size(self) -> int:
        """Input channels a group."""
        return 2 * self.packed.shape[-2]

    @property
    def outputs(self) -> int:
        """N."""
        return self.packed.shape[-1]

    @property
    def symmetric(self) -> bool:
        """Whether there are no minima."""
        return self.minimum is None


STRIP = 16  # outputs


class TiledWeight(NamedTuple):
    """A [Kin, N] weight in *strips* of 16 outputs and a group of input channels, a piece of memory
    each, so that a warp reads whole pieces, and what it reads is what m16n8k16 products take.

    strips  uint8 [Kin/group, N/16, B]   B = 8 group + 64, or 8 group + 32 where symmetric
        codes    chunks of 4 steps (2 for groups of 32), [chunk][lane][step]: a word of 32 bits
        numbers  [g] of 8: bf16 scale of outputs 2g and 2g + 1; unless symmetric, their minima

    Lane 4 g + q has in the word of step i the codes of outputs 2g and 2g + 1 and of 4 channels from
    c = 32 (i // 2) + 8 q + 4 (i % 2) on, so that the four lanes of a g read 64 bytes of activations
    at once; a pair of channels is 16 bits apart, as one `and` leaves it in a word of two bf16:

        nibble   0         1            2         3            4         5            6, 7
        output   2g        2g + 1       2g        2g + 1       2g        2g + 1       2g, 2g + 1
        channel  c         c            c + 2     c + 2        c + 1     c + 1        c + 3
    """

    strips: jax.Array

    @property
    def groups(self) -> int:
        """Groups of input channels."""
        return self.strips.shape[0]

    @property
    def group_size(self) -> int:
        """Input channels a group."""
        return (self.strips.shape[-1] - 32) // 256 * 32

    @property
    def outputs(self) -> int:
        """N."""
        return STRIP * self.strips.shape[1]

    @property
    def symmetric(self) -> bool:
        """Whether there are no minima."""
        return self.strips.shape[-1] % 64 == 32


PackedWeight = QuantizedWeight | TiledWeight


def can_tile(weight: QuantizedWeight) -> bool:
    """Whether `tile` takes the weight."""
    return weight.outputs % STRIP == 0 and weight.group_size in (32, 64, 128)


def _chunks(group: int) -> tuple[int, int]:
    """(chunks, pairs of steps of a chunk): a step is 16 input channels."""
    pairs = math.gcd(group // 32, 2)
    return group // 32 // pairs, pairs


def tile(weight: QuantizedWeight) -> TiledWeight:
    """The weight in strips; N a multiple of 16, groups of 32, 64 or 128."""
    groups, group, n = weight.groups, weight.group_size, weight.outputs
    if not can_tile(weight):
        raise ValueError(
            f"the weight has {n} outputs and groups of {group}; "
            f"multiples of {STRIP} and groups of 32, 64 and 128 can be tiled"
        )
    codes = jnp.concatenate(unsigned_halves(weight.packed), -2)
    # group, chunk, pair of steps, q, step of the two, pair of channels, channel of the two, strip,
    # g, output of the two
    split = codes.reshape(groups, *_chunks(group), 4, 2, 2, 2, n // STRIP, 8, 2)
    pairs = split[..., 0] | (split[..., 1] << 4)
    packed = pairs.transpose(0, 7, 1, 8, 3, 2, 4, 6, 5).reshape(groups, n // STRIP, 8 * group)
    numbers = [weight.scale] + ([] if weight.minimum is None else [weight.minimum])
    both = jnp.stack([x.astype(jnp.bfloat16).reshape(groups, -1, 8, 2) for x in numbers], -2)
    tail = jax.lax.bitcast_convert_type(both, jnp.uint8).reshape(groups, n // STRIP, -1)
    return TiledWeight(jnp.concatenate([packed, tail], -1))


def untile(weight: TiledWeight) -> QuantizedWeight:
    """The inverse of `tile`."""
    groups, group, n = weight.groups, weight.group_size, weight.outputs
    chunks, steps = _chunks(group)
    packed, tail = jnp.split(weight.strips, [8 * group], -1)
    pairs = packed.reshape(groups, n // STRIP, chunks, 8, 4, steps, 2, 2, 2)
    split = jnp.stack(unsigned_halves(pairs.transpose(0, 2, 5, 4, 6, 8, 7, 1, 3)), -1)
    codes = split.reshape(groups, group, n)
    halves = codes[:, : group // 2] | (codes[:, group // 2 :] << 4)
    numbers = jax.lax.bitcast_convert_type(
        tail.reshape(groups, n // STRIP, 8, -1, 2, 2), jnp.bfloat16
    )
    scale, *minimum = [x.reshape(groups, n) for x in jnp.moveaxis(numbers, 3, 0)]
    return QuantizedWeight(halves, scale, minimum[0] if minimum else None)
