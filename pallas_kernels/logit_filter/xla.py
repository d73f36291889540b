"""Which tokens are left of a row of logits, in XLA: for devices without kernels, and as their
reference.

Top-k and top-p look for one number a row, the smallest score that stays. It is found by its 32
bits, the highest first: on a CPU one at a time, which reads the row 32 times and is still an order
of magnitude faster than sorting a vocabulary; on a GPU, where launches cost more than comparisons,
four at a time.

A GPU's branch waits for the host to read its condition. There nothing of this is in a branch: the
program is compiled for what its sequences want.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.logit_filter import rows
from pallas_kernels.logit_filter.kept import Kept, weights

Result = TypeVar("Result")


def kept(
    scores: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    wanted: tuple[bool, bool] | None,
) -> Kept:
    """See `pallas_kernels.logit_filter.api.kept`."""
    bits = 1 if wanted is None else 4
    by_k, by_p = wanted or (None, None)
    most, place = rows.largest(scores)
    weight, order = weights(scores, most, temperature), _ordered(scores)
    everything = jnp.full_like(order[..., 0], _ordered(jnp.float32(-jnp.inf)))
    after_all = jnp.full_like(place, scores.shape[-1])

    smallest = _if(by_k, top_k > 0, lambda: _top_k(order, top_k, bits), everything)

    def of_mass() -> tuple[jax.Array, jax.Array]:
        left = jnp.where(order >= smallest[..., None], weight, 0.0)
        return _top_p(order, left, top_p, _ordered(most), bits)

    smallest, last = _if(by_p, top_p < 1, of_mass, (smallest, after_all))
    least = _number(jnp.maximum(smallest, everything))

    heat = temperature[:, None]
    cut = most + heat * jnp.log(min_p)[:, None]
    least, last = jnp.maximum(least, cut), jnp.where(cut > least, after_all, last)
    least, last = jnp.where(heat > 0, least, most), jnp.where(heat > 0, last, place)
    found = Kept(most, least, last, most)
    return found._replace(mass=_sum(jnp.where(found.of(scores), weight, 0.0), bits))


def _if(wanted: bool | None, on: jax.Array, yes: Callable[[], Result], no: Result) -> Result:
    """`yes()` where it is wanted, else `no`; in a branch where that is not known."""
    if wanted is None:
        return jax.lax.cond(jnp.any(on), yes, lambda: no)
    return yes() if wanted else no


def _ordered(x: jax.Array) -> jax.Array:
    """float32 → uint32 that compare as the numbers do."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # −0 is 0
    return jnp.where(x < 0, ~bits, bits | np.uint32(1 << 31))


def _number(order: jax.Array) -> jax.Array:
    """What `_ordered` was given."""
    bits = jnp.where(order >> 31 > 0, order ^ np.uint32(1 << 31), ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _largest(
    holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], bits: int
) -> jax.Array:
    """The largest uint32 of each row for which `holds`, true up to it and false above.

    `holds` takes a candidate a row and answers each; `bits` are found at a time.
    """
    steps = jnp.arange(1, 1 << bits, dtype=jnp.uint32).reshape(-1, *[1] * len(shape))

    def more(i: jax.Array, found: jax.Array) -> jax.Array:
        shift = jnp.uint32(32 - bits) - jnp.uint32(bits) * jnp.uint32(i)
        digit = jnp.sum(jax.vmap(holds)(found[None] | (steps << shift)), 0, dtype=jnp.uint32)
        return found | (digit << shift)

    # On a GPU a turn's counter would be a launch of its own.
    nothing = jnp.zeros(shape, jnp.uint32)
    return jax.lax.fori_loop(0, 32 // bits, more, nothing, unroll=bits > 1)


def _sum(x: jax.Array, bits: int) -> jax.Array:
    """[..., N] → [...] sums; where bits are found several at a time, in two steps."""
    return jnp.sum(x, -1) if bits == 1 else rows.total(x)


def _top_k(order: jax.Array, k: jax.Array, bits: int) -> jax.Array:
    """[B, S]: the smallest of the k largest of each row. k 0: of all."""
    n = order.shape[-1]
    k = jnp.where(k > 0, jnp.minimum(k, n), n)[:, None]
    return _largest(
        lambda key: _sum((order >= key[..., None]).astype(jnp.int32), bits) >= k,
        order.shape[:-1],
        bits,
    )


def _top_p(
    order: jax.Array, weight: jax.Array, top_p: jax.Array, most: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    """[B, S] each: the smallest that is left, and the last place of those that equal it; `most` is
    the largest of each row."""
    budget = (1 - top_p)[:, None] * _sum(weight, bits)

    def mass_below(key: jax.Array) -> jax.Array:
        return _sum(jnp.where(order < key[..., None], weight, 0.0), bits)

    smallest = _largest(lambda key: mass_below(key) <= budget, order.shape[:-1], bits)
    smallest = jnp.minimum(smallest, most)
    # The mass of what is below fits into the budget, that of all that equals `smallest` does not.
    equal = order == smallest[..., None]
    each = rows.largest(jnp.where(equal, weight, 0.0))[0]
    room = jnp.maximum(budget - mass_below(smallest), 0.0)
    count = _sum(equal.astype(jnp.float32), bits)
    number = jnp.maximum(count - jnp.floor(room / each), 1.0)
    rank = jnp.cumsum(equal, -1, dtype=jnp.int32).astype(jnp.float32)
    place = jnp.arange(order.shape[-1], dtype=jnp.int32)[None, None]
    stays = equal & (rank <= number[..., None])
    return smallest, jnp.max(jnp.where(stays, place, 0), -1)
