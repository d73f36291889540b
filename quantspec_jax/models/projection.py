"""Queries, keys and values of a pass on their way from the stream to attention."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from pallas_kernels.layout import LayerCache
from pallas_kernels.products.append import Append
from pallas_kernels.rope_append.api import rope_append
from pallas_kernels.rope_append.heads import Heads
from quantspec_jax.models.linear import Activations, one_launch, products
from quantspec_jax.models.parameters import Params


@dataclasses.dataclass(frozen=True)
class Projection:
    """q, k and v of a pass that nothing has computed yet: what reads them says where they go.

    x        [B, S, E] the normed stream
    layers   of q, k and v
    norms    RMS norm's weights [D] of each query and of each key; None where there are none
    rope     cos and sin [B, S, 1, D] float32
    """

    x: Activations
    layers: tuple[Params, Params, Params]
    norms: tuple[jax.Array | None, jax.Array | None]
    rope: tuple[jax.Array, jax.Array]
    head_dim: int
    eps: float
    backend: str

    @property
    def dtype(self) -> np.dtype:
        return self.x.dtype

    @functools.cached_property
    def _biases(self) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
        q, k, v = (each.get("bias") for each in self.layers)
        return q, k, v

    def _heads(self) -> Heads:
        b, s = self.x.shape[:2]
        found = products(self.x, self.layers, self.backend, self.dtype)
        q, k, v = (y.reshape(b, s, -1, self.head_dim) for y in found)
        return Heads(q, k, v, self._biases, self.norms, self.rope, self.eps, self.dtype)

    def finished(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, S, H, D], k and v [B, S, K, D] as attention takes them."""
        return self._heads().finished()

    def appended(
        self,
        cache: LayerCache,
        start: jax.Array,
        first: jax.Array | None = None,
        *,
        ahead: bool = False,
    ) -> tuple[jax.Array, LayerCache]:
        """q, and the layer's cache with k and v in its buffer (`rope_append`, which says what
        `start`, `first` and `ahead` are): in the launch of the products where there is one that
        does that."""
        if self.norms == (None, None):
            known = start if first is None else first
            append = Append(self._biases, self.rope, cache, start, known, ahead)
            found = one_launch(self.x, self.layers, self.backend, self.dtype, append=append)
            if found is not None:
                q, keys, values = found
                return q, dataclasses.replace(cache, key_buffer=keys, value_buffer=values)
        return rope_append(self._heads(), cache, start, first, ahead=ahead, backend=self.backend)
