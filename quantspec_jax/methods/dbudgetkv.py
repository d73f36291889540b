"""DBudgetKV (arXiv 2502.16886): a window that is as long as a layer and a prompt need.

Tokens go, the oldest after the first `first` ones first, while the norm of the last queries'
attention stays near:

    the shortest window with ‖A of what is left‖_F ≥ (1 − tolerance) ‖A‖_F,        A [w, P]

The authors released no code, and the paper's text was not at hand. That A is the mean over heads of
the last 32 rows, that layers 0 and 1 stay whole and that what comes after the prompt stays is
recalled or inferred, not quoted; the tolerance of 1% is recalled, too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.methods.method import Layer
from quantspec_jax.methods.selection import Selection, observed_attention


def window_start(attention: jax.Array, first: int, tolerance: float) -> jax.Array:
    """Of [w, P] probabilities, where the shortest window begins that, with the first tokens, has
    the norm."""
    energy = (attention * attention).sum(0)
    older = jnp.where(jnp.arange(len(energy)) < first, 0.0, energy)
    lost = jnp.cumsum(older) - older  # of a window that begins here
    enough = energy.sum() - lost >= (1 - tolerance) ** 2 * energy.sum()
    return jnp.where(enough, jnp.arange(len(energy)), 0).max()


@dataclasses.dataclass(frozen=True)
class DBudgetKV(Selection):
    """`share` is what a pass is expected to read, for predictions; the prompt decides."""

    tolerance: float = 0.01
    whole_layers: int = 2
    from_prompt: bool = dataclasses.field(default=True, kw_only=True)

    def index(self, text: Layer, queries: jax.Array, prompt: int) -> Any:
        """Whether each token [T] stays."""
        attention = observed_attention(queries, text.keys[:prompt]).mean((0, 1))
        at = jnp.arange(len(text.keys))
        return (at < self.first) | (at >= window_start(attention, self.first, self.tolerance))

    def chosen(self, index: Any, q: jax.Array, bound: jax.Array) -> jax.Array:
        """Whatever the query."""
        return index[None, None]
