"""Keys and values of the cache: how their codes lie in tiles, and a layer's cache as a whole."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.layout.nibbles import pair, unpair, unsigned_halves

CACHE_VERSION = 2  # 1: scales and minima in bfloat16
LARGEST = 65280.0  # that is coded: what both float16 and bfloat16 have


def pack_keys(codes: jax.Array) -> jax.Array:
    """[..., G, D] int8 codes in −8..7 → [..., G, D/2] uint8."""
    return pair(codes, -1)


def unpack_keys(packed: jax.Array) -> jax.Array:
    """The inverse of `pack_keys`."""
    return unpair(packed, -1)


def pack_values(codes: jax.Array) -> jax.Array:
    """[..., G, D] int8 codes in −8..7 → [..., D, G/2] uint8 (bytes in the order of the table)."""
    *lead, g, d = codes.shape
    width = math.gcd(g, 32)
    # Transposed as bytes: fused with the quantization before it, XLA's CPU code is ten times
    # slower.
    runs = jax.lax.optimization_barrier(pair(codes.reshape(*lead, g // width, width, d), -2))
    return jnp.swapaxes(runs, -1, -2).reshape(*lead, d, g // 2)


def unpack_values(packed: jax.Array) -> jax.Array:
    """The inverse of `pack_values`."""
    *lead, d, half = packed.shape
    width = math.gcd(2 * half, 32)
    runs = packed.reshape(*lead, 2 * half // width, d, width // 2)
    return jnp.swapaxes(unpair(runs, -1), -1, -2).reshape(*lead, 2 * half, d)


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
    scale, minimum f16   keys   [B, K, T/G, D]         one group: G tokens of a channel
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

    @property
    def half(self) -> int:
        """Slots of a half of the ring, in which a pass's rows stay: all, where nothing is coded."""
        slots = self.key_buffer.shape[2]
        return slots if self.keys is None else slots // 2
