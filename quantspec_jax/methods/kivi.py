"""KIVI (arXiv 2402.02750): rounding to nearest, keys in groups of tokens of a channel, values in
groups of channels of a token, because keys have channels of their own size."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.methods.method import Layer, Method
from quantspec_jax.models.config import ModelConfig


def rounded(x: jax.Array, bits: int, group: int, axis: int) -> jax.Array:
    """x, quantized in groups of `group` neighbours along `axis` between their least and their
    greatest (float16 both) and read again; a last group may be smaller. Section 3.1."""
    x = jnp.moveaxis(x, axis, -1)
    length = x.shape[-1]
    whole = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -length % group)], mode="edge")
    groups = whole.reshape(*x.shape[:-1], -1, group)
    low = groups.min(-1, keepdims=True).astype(jnp.float16).astype(jnp.float32)
    step = (groups.max(-1, keepdims=True) - low) / (2**bits - 1)
    step = step.astype(jnp.float16).astype(jnp.float32)
    safe = jnp.where(step > 0, step, 1.0)  # a group of equal numbers
    codes = jnp.clip(jnp.round((groups - low) / safe), 0, 2**bits - 1)
    read = (low + step * codes).reshape(*x.shape[:-1], -1)[..., :length]
    return jnp.moveaxis(read, -1, axis)


@dataclasses.dataclass(frozen=True)
class Kivi(Method):
    """Keys after RoPE. `group`: 32 in the authors' code."""

    width: int
    group: int = 32

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """With a least and a step in float16 a group."""
        return self.width + 32 / self.group

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """Of [T, K, D] keys along T, values along D."""
        return Layer(
            rounded(text.keys, self.width, self.group, 0),
            rounded(text.values, self.width, self.group, 2),
        )
