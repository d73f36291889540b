"""What a method is."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

from quantspec_jax.models.config import ModelConfig


class Layer(NamedTuple):
    """Keys and values of one layer, [T, K, D] float32."""

    keys: jax.Array
    values: jax.Array


class Method(Protocol):
    """A frozen dataclass, so that it is a constant of a compiled program.

    before_rope   it reads keys before RoPE (after their norm, where the model has one)
    learns        from a text, before it reads another
    sinks         first tokens, which attention rests on, that stay as they are
    """

    @property
    def before_rope(self) -> bool: ...
    @property
    def learns(self) -> bool: ...
    @property
    def sinks(self) -> int: ...

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """Bits a value of a cache of `tokens` tokens, keys and values together: codes, scales,
        minima, and what does not grow with the tokens, in 16 bits a number."""
        ...

    def fit(self, text: Layer, below: Layer | None) -> tuple[Any, Layer]:
        """Learn a layer from a text's rows [N, K, D]. `below`: what the layer below came to, None
        in the first. Returns what was learned, a pytree of arrays, and what this layer comes to."""
        ...

    def read(self, learned: Any, text: Layer, below: Layer | None) -> Layer:
        """What later positions read in place of a text's keys and values. `below`: what was read
        of the layer below, None in the first."""
        ...
