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
from typing import Any

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


def rounded(x: jax.Array, width: int) -> jax.Array:
    """[..., n] float32, coded in `width` bits a value and read again. Section 4.1."""
    n, points = x.shape[-1], jnp.asarray(grid(width))
    h = block_of(n)
    turn = jnp.asarray(hadamard(h))
    blocks = x.reshape(-1, h)
    scale = jnp.linalg.norm(blocks, axis=-1, keepdims=True) / math.sqrt(h)
    safe = jnp.where(scale > 0, scale, 1.0)  # a block of zeros
    pairs = (_product(blocks, turn) / safe).reshape(-1, 2)
    nearest = points[_nearest(pairs, points)].reshape(blocks.shape)
    return (scale * _product(nearest, turn)).reshape(x.shape)


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
