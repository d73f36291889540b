"""Queries, keys and values of a pass on their way from the products to attention."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.add_rms_norm.xla import rms_norm
from pallas_kernels.shapes import Queries, Tables, shaped


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "k", "v", "biases", "norms", "rope"],
    meta_fields=["eps", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Heads:
    """What the products make of a pass, and what is due to it before attention: bias, norm and
    rotation, in that order.

    q        [B, S, H, D], k, v [B, S, K, D]; in `dtype`, or in float32
    biases   of q [H·D], k and v [K·D]; None where there is none
    norms    RMS norm's weights [D] of each query and of each key; None where there are none
    rope     cos and sin [B, S, 1, D] float32, both halves of D alike
    eps      added to a norm's mean square
    dtype    of the activations; what is due is rounded to it step by step
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    biases: tuple[jax.Array | None, jax.Array | None, jax.Array | None]
    norms: tuple[jax.Array | None, jax.Array | None]
    rope: tuple[jax.Array, jax.Array]
    eps: float
    dtype: np.dtype

    def finished(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v as attention takes them, in `dtype`."""
        q, k, v = map(self._biased, (self.q, self.k, self.v), self.biases)
        q, k = map(self._normed, (q, k), self.norms)
        return rotate(q, *self.rope), rotate(k, *self.rope), v

    def _biased(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        if bias is not None:
            bias = bias.astype(x.dtype).reshape(x.shape[-2:])
            x = x + jnp.broadcast_to(bias, x.shape)
        return x.astype(self.dtype)

    def _normed(self, x: jax.Array, weight: jax.Array | None) -> jax.Array:
        return x if weight is None else rms_norm(x, weight, self.eps)


@shaped
def rotate(x: Queries, cos: Tables, sin: Tables) -> Queries:
    """Rotate [B, S, H, D] in the planes (i, i + D/2) by RoPE (arXiv 2104.09864); computed in
    float32, returned in x's type."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([-second, first], -1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


@shaped
def unrotated(x: Queries, cos: Tables, sin: Tables) -> Queries:
    """The inverse of `rotate`; tables may carry an attention factor f (YaRN), which is divided by:
    (cos, −sin) alone would give f² x."""
    return rotate(x, cos, -sin) / (cos * cos + sin * sin)
