"""StreamingLLM (arXiv 2309.17453): the first tokens and the newest. Keys keep the positions that
they were rotated by, where the authors rotate by places in what is kept: the cache is shared."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.methods.method import Layer
from quantspec_jax.methods.selection import Selection


@dataclasses.dataclass(frozen=True)
class Streaming(Selection):
    """`first` sinks and a window that together are `share` of the coded tokens."""

    def index(self, text: Layer, queries: jax.Array, prompt: int) -> Any:
        """Positions: later ones come first."""
        return jnp.arange(len(text.keys), dtype=jnp.float32)

    def chosen(self, index: Any, q: jax.Array, bound: jax.Array) -> jax.Array:
        """By position."""
        return self.within_budget(index[None, None], bound)
