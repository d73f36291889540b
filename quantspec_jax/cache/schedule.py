"""The schedule: what a position reads, and when tokens move. A function of the position alone.

The query at zero-based position t reads the planes for positions below q(t) and full precision for
the rest, in every mode, with G the group size:

    q(t) = G · max(0, ⌊t/G⌋ − 1)

    position   0 ........................ q ......... q + G ....... t ... q + 2G
               │ planes                   │ F1: exact │ F2: exact, being filled

If it depended on more, on how many tokens earlier rounds accepted, say, the target's distribution
would too, and decoding would not be lossless. So no pass crosses a multiple of G: of a round's
proposals those up to the end of F2 count, and when F2 is full F1 moves into the planes (the flush).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def quantized_length(length: jax.Array, group_size: int) -> jax.Array:
    """q, the tokens that a query at position `length` reads from the planes."""
    return group_size * jnp.maximum(0, length // group_size - 1)


def room(position: Any, group_size: int) -> Any:
    """How many proposals after the pending token at `position` (a number or an array of them) can
    count: γ' = min(γ, room)."""
    return group_size - 1 - position % group_size


def last_position(position: jax.Array, group_size: int) -> jax.Array:
    """The last position before the flush that comes next."""
    return position + room(position, group_size)


def flush_due(length: jax.Array, quantized: jax.Array, group_size: int) -> jax.Array:
    """Whether F2 is full: 2G tokens are exact."""
    return length - quantized >= 2 * group_size
