"""L2 norm (arXiv 2406.11430): of each head the tokens whose keys are shortest, since attention
tends to go there. RoPE keeps norms. No query is asked; the authors leave layers 0 and 1 whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.methods.method import Layer
from quantspec_jax.methods.selection import Selection


@dataclasses.dataclass(frozen=True)
class L2Norm(Selection):
    """No token is kept for being the first: sinks' keys are the shortest of all."""

    first: int = 0
    whole_layers: int = 2

    def index(self, text: Layer, queries: jax.Array, prompt: int) -> Any:
        """‖k‖ of each head and token."""
        return jnp.linalg.norm(text.keys, axis=-1).T  # [K, T]

    def chosen(self, index: Any, q: jax.Array, bound: jax.Array) -> jax.Array:
        """The shortest."""
        return self.within_budget(-index[:, None], bound)
