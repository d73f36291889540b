"""q, k and v finished in the launch of their products: bias, RoPE and the write into the buffer.

A channel rotates with the one half a head further. So a block multiplies with some channels of the
first halves of heads and with those that they rotate with, as it does with gate and up: channel j
of all first halves, counted one after the other, is a *pair*,

    pair            0 …… D/2 − 1       D/2 …… D − 1
    output          0 …… D/2 − 1       D …… D + D/2 − 1      of the weight
    rotates with    D/2 … D − 1        D + D/2 … 2 D − 1

A norm of each query and key, which takes whole heads, is `rope_append`'s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.layout import LayerCache
from pallas_kernels.rope_append.heads import Heads
from pallas_kernels.rope_append.xla import rope_append


class AppendForm(NamedTuple):
    """What a kernel is specialized to.

    channels    of a head
    batch       sequences; each has as many rows of activations, consecutive tokens
    table_rows  of angles, a sequence
    slots       of the buffer, a ring; half: in which of its halves a pass's rows stay
    biased      whether there are biases
    ahead       whether positions and angles may be read before the wait
    """

    channels: int
    batch: int
    table_rows: int
    slots: int
    half: int
    biased: bool
    ahead: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["biases", "rope", "cache", "start", "first"],
    meta_fields=["ahead"],
)
@dataclasses.dataclass(frozen=True)
class Append:
    """What is done to the products of q, k and v (`rope_append`).

    biases  of q [H·D], k and v [K·D]; None where there is none
    rope    cos and sin [B, rows, 1, D] float32, both halves of D alike
    cache   the layer's, whose buffer [B, K, R, D] keys and values are written into
    start   [B] int32, position of a sequence's first token
    first   [B] int32, position of the first row of `rope`
    ahead   all but activations and the buffer was so when the attention of another layer, which has
            been launched before this, began
    """

    biases: tuple[jax.Array | None, jax.Array | None, jax.Array | None]
    rope: tuple[jax.Array, jax.Array]
    cache: LayerCache
    start: jax.Array
    first: jax.Array
    ahead: bool = False

    @property
    def channels(self) -> int:
        return self.cache.key_buffer.shape[3]

    @property
    def buffers(self) -> list[jax.Array]:
        return [self.cache.key_buffer, self.cache.value_buffer]

    @property
    def form(self) -> AppendForm:
        return AppendForm(
            self.channels,
            self.start.size,
            self.rope[0].shape[1],
            self.cache.key_buffer.shape[2],
            self.cache.half,
            any(bias is not None for bias in self.biases),
            self.ahead,
        )

    def operands(self, outputs: Sequence[int]) -> list[jax.Array]:
        """A kernel's: positions, tables, and where there are biases all three, of so many outputs
        each."""
        tables = [jnp.broadcast_to(x, (self.start.size, *x.shape[1:])) for x in self.rope]
        biases = []
        if self.form.biased:
            biases = [
                jnp.zeros(n, jnp.bfloat16) if bias is None else bias.astype(jnp.bfloat16)
                for n, bias in zip(outputs, self.biases, strict=True)
            ]
        return [self.start, self.first, *tables, *biases]

    def apart(self, products: Sequence[jax.Array], dtype: jnp.dtype) -> list[jax.Array]:
        """The XLA form, of products [B, S, N] each: queries [B, S, H, D], and the buffers."""
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.channels) for y in products)
        heads = Heads(q, k, v, self.biases, (None, None), self.rope, 0.0, dtype)
        queries, cache = rope_append(heads, self.cache, self.start, self.first)
        return [queries, cache.key_buffer, cache.value_buffer]

    def unsupported(self, step: int) -> str | None:
        """Why kernels that take `step` neighbouring outputs at once cannot do this, or None."""
        if self.cache.key_buffer.dtype != jnp.bfloat16:
            return "the buffer has to be bfloat16"
        if self.channels % (2 * step):
            return f"head_dim is {self.channels}; it takes multiples of {2 * step}"
        return None
