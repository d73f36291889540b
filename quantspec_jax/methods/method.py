"""What a method is. One class, all of it: what is not said here is as the defaults have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from quantspec_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from quantspec_jax.loading import Model

OBSERVED = 32  # queries of a prompt's end that methods look at


class Layer(NamedTuple):
    """Keys and values of one layer, [T, K, D] float32."""

    keys: jax.Array
    values: jax.Array


class View(NamedTuple):
    """What queries read in place of a layer's keys and values, [T, K, D] each, and what else
    `keep` and `weigh` need, a pytree of arrays."""

    keys: jax.Array
    values: jax.Array
    state: Any = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A constant of a compiled program: what is an array is learned, not a field.

    before_rope   it reads keys before RoPE (after their norm, where the model has one)
    learns        from a text, before it reads another
    weighted      by the gradient of the loss on that text
    of_planes     it reads views of this package's planes
    stacked       what a layer's codes build on is what the layer below came to
    paired        it reads a layer together with the one that `partner` names
    from_prompt   it compresses once, what a prompt has when it ends; what comes later stays
    selects       it does not read all tokens, or changes their scores: `keep` and `weigh` are asked
    sinks         first tokens, which attention rests on, that stay as they are
    """

    before_rope: bool = False
    learns: bool = False
    weighted: bool = False
    of_planes: bool = False
    stacked: bool = False
    paired: bool = False
    from_prompt: bool = False
    selects: bool = False
    sinks: int = 0

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """Bits a value of a cache of `tokens` tokens, keys and values together: codes, scales,
        minima, and what does not grow with the tokens, in 16 bits a number."""
        raise NotImplementedError

    def read_bits(self, model: ModelConfig, tokens: int) -> float:
        """Bits that a pass reads, for each value of the cache."""
        return self.bits(model, tokens)

    def operations(self, model: ModelConfig) -> float:
        """Multiplications and additions, for each token of the cache, that a pass needs to read it,
        beyond those of attention; a few a value, as scales need, are left out."""
        return 0

    def prepare(self, model: Model, chunks: Any) -> Sequence[Any]:
        """What is known of each layer, a pytree of arrays a layer, from the model and from
        `chunks()`, tokens [chunks, length] of the text to learn from."""
        return [()] * model.config.num_layers

    def fit(
        self, text: Layer, below: Layer | None, gradient: Layer | None = None
    ) -> tuple[Any, Layer]:
        """Learn a layer from a text's rows [N, K, D]. `below`: what the layer below came to, where
        the method is stacked, None in the first. `gradient`: of the loss, at these rows. Returns
        what was learned, a pytree of arrays, and what this layer comes to."""
        return (), self.read((), text, below)

    def learner(self) -> Method:
        """The method that learns what this one does: the same of all that differ elsewhere."""
        return self

    def partner(self, known: Any, layer: int, layers: int) -> int:
        """The layer that this one is read with (`paired`)."""
        return layer

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """What later positions read in place of a text's keys and values. `other`: what was read of
        the layer below, where the method is stacked, None in the first; where it is paired, the
        keys and values of the partner."""
        raise NotImplementedError

    def compress(self, learned: Any, text: Layer, queries: jax.Array, prompt: int) -> View:
        """`read`, for methods that select or work from a prompt, `prompt` tokens of the text.
        `queries`: [w, H, D] after RoPE, of the prompt's last positions."""
        return View(*self.read(learned, text, None))

    def keep(self, state: Any, q: jax.Array, bound: jax.Array) -> jax.Array:
        """Which tokens queries [S, H, D] read of those before `bound`: [K, S or 1, T] booleans."""
        return jnp.ones((1, 1, 1), bool)

    def weigh(self, state: Any, scores: jax.Array, read: jax.Array) -> jax.Array:
        """Scores [K, R, S, T] of the tokens that are `read`, before the softmax."""
        return scores


def rows(x: jax.Array) -> jax.Array:
    """[T, K, D] → [T, K·D], a token's heads as one vector."""
    return x.reshape(len(x), -1)


def channels(model: ModelConfig) -> int:
    """Of all heads of a token's keys, or values, in a layer."""
    return model.num_kv_heads * model.head_dim


def shared_bits(numbers: float, model: ModelConfig, tokens: int) -> float:
    """Bits a value of `numbers` numbers a layer, 16 bits each, that all tokens share."""
    return 16 * numbers / (2 * channels(model) * tokens)
