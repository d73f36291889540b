"""HIGGS (arXiv 2411.17525): numbers that a Hadamard rotation made nearly normal, in pairs, each
rounded to the nearest point of a grid that is best for normal pairs.

    y = H x / √h     s = ‖x‖ / √h     z = y / s     i = argmin_j ‖z − g_j‖     x̂ = s H g_i / √h

A block of h channels of a token has one scale. H is Sylvester's matrix, without random signs.

Keys are coded with their bias, where a model has one. Of Qwen2.5's first layers it is up to some
hundred times what the input adds, and the error is a share of both: on Qwen2.5-Coder-0.5B 2 bits
cost 160% perplexity, without the bias 1.5% (benchmarks/key_biases.py). AQUA-KV takes it off.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantspec_jax.checks import require
from quantspec_jax.methods.kmeans import by_chunks, greatest
from quantspec_jax.methods.method import Layer, Method, channels, rows
from quantspec_jax.models.config import ModelConfig

GRIDS = Path(__file__).with_name("grids.json")  # made by benchmarks/grids.py
LARGEST_BLOCK = 1024


@functools.cache
def grid(width: int) -> np.ndarray:
    """[4^width, 2] float32: points whose mean squared distance to normal pairs is least."""
    found = json.loads(GRIDS.read_text(encoding="utf-8"))
    require(str(width) in found, "bits", width, ", ".join(found))
    return np.array(found[str(width)], np.float32)


def hadamard(order: int) -> np.ndarray:
    """Sylvester's matrix [order, order] over √order: orthonormal and symmetric; `order` a power of
    two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(math.sqrt(order))


def block_of(channels: int) -> int:
    """The largest power of two that divides `channels`, 1,024 at most: no padding."""
    return min(channels & -channels, LARGEST_BLOCK)


class Codes(NamedTuple):
    """Of numbers [..., n]: points uint8 [..., n/2], of each pair the number of its point, below
    4^width; scales float32 [..., n/h], of blocks of h."""

    points: jax.Array
    scales: jax.Array


def encode(x: jax.Array, width: int, half: bool = False) -> Codes:
    """[..., n] float32 in `width` bits a value. Section 4.1. `half`: scales are numbers that
    bfloat16 has, 16 bits that reach as far as float32."""
    n, points = x.shape[-1], jnp.asarray(grid(width))
    h = block_of(n)
    turn = jnp.asarray(hadamard(h))
    blocks = x.reshape(-1, h)
    scale = jnp.linalg.norm(blocks, axis=-1, keepdims=True) / math.sqrt(h)
    if half:
        scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    safe = jnp.where(scale > 0, scale, 1.0)  # a block of zeros
    pairs = (_product(blocks, turn) / safe).reshape(-1, 2)
    number = _nearest(pairs, points).astype(jnp.uint8)
    return Codes(number.reshape(*x.shape[:-1], n // 2), scale.reshape(*x.shape[:-1], n // h))


def decode(codes: Codes, width: int) -> jax.Array:
    """What codes say, [..., n] float32."""
    n, points = 2 * codes.points.shape[-1], jnp.asarray(grid(width))
    h = n // codes.scales.shape[-1]
    nearest = points[codes.points.astype(jnp.int32)].reshape(-1, h)
    found = codes.scales.reshape(-1, 1) * _product(nearest, jnp.asarray(hadamard(h)))
    return found.reshape(*codes.points.shape[:-1], n)


def rounded(x: jax.Array, width: int, half: bool = False) -> jax.Array:
    """[..., n] float32, coded and read again."""
    return decode(encode(x, width, half), width)


def pack(points: jax.Array, width: int) -> jax.Array:
    """[..., m] uint8, numbers below 4^width, m a multiple of 4 → [..., m/4 · width] uint8: four
    numbers are `width` bytes, the first one in the lowest bits of the first byte."""
    four = points.reshape(*points.shape[:-1], -1, 4).astype(jnp.uint32)
    word = (four << _bits(2 * width * np.arange(4), four)).sum(-1, keepdims=True, dtype=jnp.uint32)
    found = (word >> _bits(8 * np.arange(width), four)) & np.uint32(255)
    return found.astype(jnp.uint8).reshape(*points.shape[:-1], -1)


def unpack(packed: jax.Array, width: int) -> jax.Array:
    """The inverse of `pack`."""
    some = packed.reshape(*packed.shape[:-1], -1, width).astype(jnp.uint32)
    word = (some << _bits(8 * np.arange(width), some)).sum(-1, keepdims=True, dtype=jnp.uint32)
    found = (word >> _bits(2 * width * np.arange(4), some)) & np.uint32(4**width - 1)
    return found.astype(jnp.uint8).reshape(*packed.shape[:-1], -1)


def _bits(shifts: np.ndarray, like: jax.Array) -> jax.Array:
    """Shifts along the last axis."""
    return jnp.asarray(shifts, jnp.uint32).reshape(*(1,) * (like.ndim - 1), -1)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _nearest(pairs: jax.Array, points: jax.Array) -> jax.Array:
    """The number of the point that is nearest to each pair."""

    def of(some: jax.Array) -> jax.Array:
        first, second = (jnp.square(some[:, i, None] - points[None, :, i]) for i in range(2))
        return greatest(-(first + second))

    return by_chunks(of, pairs, len(points))


def code_bits(width: int, channels: int) -> float:
    """Bits a value: codes, and a scale of 16 bits a block."""
    return width + 16 / block_of(channels)


@dataclasses.dataclass(frozen=True)
class Higgs(Method):
    """Of all heads of a token together, keys before RoPE."""

    width: int
    before_rope: bool = dataclasses.field(default=True, kw_only=True)
    sinks: int = dataclasses.field(default=4, kw_only=True)

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """Codes and scales."""
        return code_bits(self.width, channels(model))

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """A token's heads as one vector."""
        return Layer(*(rounded(rows(x), self.width).reshape(x.shape) for x in text))
