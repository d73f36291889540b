"""Weights in groups of input channels: as stored, and tiled as a GPU multiplies with them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.layout.nibbles import pair, unpair, unsigned_halves


def pack(codes: jax.Array) -> jax.Array:
    """Weights: [..., group, N] int8 codes in −8..7 → [..., group/2, N] uint8."""
    return pair(codes, -2)


def unpack(packed: jax.Array) -> jax.Array:
    """The inverse of `pack`."""
    return unpair(packed, -2)


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
