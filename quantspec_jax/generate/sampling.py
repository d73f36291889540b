"""From logits to a token: the warped distribution, and draws that depend on position alone.

The order and meaning of the warpers are those of transformers' `generate`:

    repetition penalty on seen tokens → temperature → top-k → top-p → min-p

Top-k and top-p look for one number a row, the smallest logit that stays. It is found by its 32
bits, the highest first: on a CPU one at a time, which reads the row 32 times and is still an order
of magnitude faster than sorting a vocabulary; on a GPU, where launches cost more than comparisons,
four at a time.

A GPU's branch waits for the host to read its condition. There nothing of this is in a branch: the
program is compiled for what its sequences want (`Warpers`).
"""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.shapes import Each, Keys, LastLogits, Logits, Seen, SeenRows, shaped

Result = TypeVar("Result")

CHUNK = 8192  # numbers of a row that one block of a GPU's threads goes through


class Role(enum.IntEnum):
    """What a draw decides: one of three independent streams that each position has."""

    DRAFT = 0  # the proposal
    ACCEPT = 1  # whether the proposal is accepted
    TARGET = 2  # the target's own token: residual, bonus, or autoregressive


class Sampling(NamedTuple):
    """The warpers' parameters, one value a sequence. Arrays: changing them compiles nothing.

    temperature        [B] float32, 0: greedy
    top_k              [B] int32,   0: off
    top_p              [B] float32, 1: off
    min_p              [B] float32, 0: off
    repetition_penalty [B] float32, 1: off
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


class Warpers(NamedTuple):
    """What a program's sequences want beyond the argmax of logits; it is compiled without the rest.

    draws  a draw, or a penalty
    top_k  a draw that is filtered so
    top_p  likewise
    """

    draws: bool = True
    top_k: bool = True
    top_p: bool = True

    def __or__(self, other: Warpers) -> Warpers:
        """What either wants."""
        return Warpers(*map(max, self, other))


GREEDY = Warpers(False, False, False)


def any_sampled(sampling: Sampling) -> jax.Array:
    """[] bool: whether any sequence draws at all; if none does, only argmax is computed."""
    return jnp.any(sampling.temperature > 0)


def penalize(logits: jax.Array, seen: jax.Array, sampling: Sampling) -> jax.Array:
    """[B, S, N] logits, those of `seen` tokens made less likely; float32. Penalty 1 is exact."""
    penalty = sampling.repetition_penalty[:, None, None]
    x = logits.astype(jnp.float32)
    return jnp.where(seen, jnp.where(x < 0, x * penalty, x / penalty), x)


def also_seen(seen: jax.Array, token: jax.Array) -> jax.Array:
    """[B, N] and [B] → [B, N] bool: these tokens have been seen, too. In one launch, or fused with
    what reads it; XLA makes three of a write to one place."""
    return seen | (jnp.arange(seen.shape[-1])[None] == token[:, None])


def largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., N] float32 → [...] the largest number of each row, and int32 where it is first; NaN,
    and some place, where the row has one.

    In two steps, of which the second is short: on a GPU the first is a launch, and the second is
    part of whatever reads it.
    """
    x = _in_parts(x, -jnp.inf)
    parts, chunk = x.shape[-2:]
    places = jnp.arange(parts * chunk, dtype=jnp.int32).reshape(parts, chunk)
    start = (np.float32(-np.inf), np.int32(0))
    found = jax.lax.reduce((x, jnp.broadcast_to(places, x.shape)), start, _larger, (x.ndim - 1,))
    most, place = (each[..., 0] for each in found)
    for i in range(1, parts):
        other, its_place = (each[..., i] for each in found)
        larger = (other > most) | (other != other)
        most, place = jnp.where(larger, other, most), jnp.where(larger, its_place, place)
    return most, place


def _larger(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> Any:
    """Of two numbers and their places the larger number, of equal ones the one that is first."""
    first = (a[0] > b[0]) | (a[0] != a[0])
    place = jnp.where(first | ((a[0] == b[0]) & (a[1] < b[1])), a[1], b[1])
    return jnp.where(first, a[0], b[0]), place


def not_finite(logits: jax.Array) -> jax.Array:
    """[..., N] logits → [...] bool: whether one is NaN or infinite, in one pass. A single −∞ is not
    told from a token that cannot come."""
    return ~jnp.isfinite(largest(logits)[0])  # the maximum of a row with a NaN is NaN


def _ordered(x: jax.Array) -> jax.Array:
    """float32 → uint32 that compare as the numbers do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(x < 0, ~bits, bits | np.uint32(1 << 31))


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
    """[..., N] → [...] sums; where bits are found several at a time, in the two steps of
    `largest`."""
    if bits == 1:
        return jnp.sum(x, -1)
    parts = jnp.sum(_in_parts(x, 0), -1)
    return functools.reduce(operator.add, [parts[..., i] for i in range(parts.shape[-1])])


def _in_parts(x: jax.Array, filler: float) -> jax.Array:
    """[..., N] → [..., parts, chunk], filled up at its end."""
    n = x.shape[-1]
    parts = -(-n // CHUNK)
    chunk = -(-n // parts)
    beyond = [(0, 0)] * (x.ndim - 1) + [(0, parts * chunk - n)]
    return jnp.pad(x, beyond, constant_values=filler).reshape(*x.shape[:-1], parts, chunk)


def _top_k(order: jax.Array, k: jax.Array, bits: int) -> jax.Array:
    """[B, S, N] bool: the k largest of each row, and what equals the last of them. k 0: all."""
    n = order.shape[-1]
    k = jnp.where(k > 0, jnp.minimum(k, n), n)[:, None]
    smallest = _largest(
        lambda key: _sum((order >= key[..., None]).astype(jnp.int32), bits) >= k,
        order.shape[:-1],
        bits,
    )
    return order >= smallest[..., None]


def _top_p(order: jax.Array, weights: jax.Array, top_p: jax.Array, bits: int) -> jax.Array:
    """[B, S, N] bool: what is left once the least likely tokens, 1 − top_p of the mass together
    at most, are removed. Of equal tokens the first stay, as at temperature 0. `order` is that of
    numbers the largest of which is 0.
    """
    budget = (1 - top_p)[:, None] * _sum(weights, bits)

    def mass_below(key: jax.Array) -> jax.Array:
        return _sum(jnp.where(order < key[..., None], weights, 0.0), bits)

    smallest = _largest(lambda key: mass_below(key) <= budget, order.shape[:-1], bits)
    smallest = jnp.minimum(smallest, _ordered(jnp.float32(0)))  # the largest's
    # The mass of what is below fits into the budget, that of all that equals `smallest` does not.
    equal = order == smallest[..., None]
    weight = largest(jnp.where(equal, weights, 0.0))[0]
    room = jnp.maximum(budget - mass_below(smallest), 0.0)
    count = _sum(equal.astype(jnp.float32), bits)
    kept = jnp.maximum(count - jnp.floor(room / weight), 1.0)
    rank = jnp.cumsum(equal, -1, dtype=jnp.int32)
    return (order > smallest[..., None]) | (equal & (rank.astype(jnp.float32) <= kept[..., None]))


@shaped
def warp(
    logits: Logits, seen: SeenRows, sampling: Sampling, warpers: Warpers | None = None
) -> Logits:
    """The distribution that tokens are drawn from.

    Args:
      logits: [B, S, N] float32.
      seen: [B, S, N] bool, tokens of the prompt and the text before each row.
      sampling: one value a sequence.
      warpers: which filters a sequence wants; None: branches leave out those that none does.

    Returns:
      [B, S, N] float32 probabilities; at temperature 0, 1 at the (first) largest penalized logit.
      At least one token of a row survives.
    """
    x = penalize(logits, seen, sampling)
    most, place = largest(x)
    best = jnp.arange(x.shape[-1])[None, None] == place[..., None]
    temperature = sampling.temperature[:, None, None]
    # Subtracting first keeps the smallest temperatures from overflowing.
    x = (x - most[..., None]) / jnp.where(temperature > 0, temperature, 1.0)
    order, weights = _ordered(x), jnp.exp(x)

    def filtered(
        wanted: bool | None, on: jax.Array, keep: Callable[[], jax.Array]
    ) -> jax.Array | np.bool_:
        if wanted is None:
            return jax.lax.cond(jnp.any(on), keep, lambda: jnp.ones_like(seen))
        return keep() if wanted else np.bool_(True)

    _, by_k, by_p = warpers or (None, None, None)
    bits = 1 if warpers is None else 4
    keep = filtered(by_k, sampling.top_k > 0, lambda: _top_k(order, sampling.top_k, bits))
    weights = jnp.where(keep, weights, 0.0)
    keep = filtered(by_p, sampling.top_p < 1, lambda: _top_p(order, weights, sampling.top_p, bits))
    # The largest weight is 1 and survives, so min-p compares with the weights themselves.
    keep &= weights >= sampling.min_p[:, None, None]
    weights = jnp.where(keep, weights, 0.0)
    probabilities = weights / _sum(weights, bits)[..., None]
    return jnp.where(temperature > 0, probabilities, best.astype(jnp.float32))


def draw_keys(keys: jax.Array, position: jax.Array, role: Role) -> jax.Array:
    """[B] typed keys of the sequences, [B] positions → [B] keys of one draw each.

    A draw depends on its sequence's key, the position of the token it decides and its role, and on
    nothing else: not on the batch, and not on how rounds fell. A position is drawn again after a
    rejection before it. That uses the same numbers twice and is still exact: the first draw's
    outcome was thrown away before it could influence anything that is kept, because what a round
    keeps up to a position is decided by draws for positions up to it.
    """

    def one(key: jax.Array, at: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, at), int(role))

    return jax.vmap(one)(keys, position)


def draw(probabilities: jax.Array, keys: jax.Array, position: jax.Array, role: Role) -> jax.Array:
    """[B] int32 tokens from probabilities [B, N], which need not sum to 1 (Gumbel-max)."""
    tokens = jax.vmap(jax.random.categorical)(
        draw_keys(keys, position, role), jnp.log(probabilities)
    )
    return tokens.astype(jnp.int32)


@shaped
def choose(
    logits: LastLogits,
    seen: Seen,
    sampling: Sampling,
    keys: Keys,
    position: Each,
    role: Role,
    warpers: Warpers | None = None,
) -> tuple[Each, LastLogits]:
    """The token at sequence position `position`: the draft's, or the autoregressive target's.

    Args:
      logits: [B, N] float32.
      seen: [B, N] bool, tokens of the prompt and of the text so far.
      sampling: one value a sequence.
      keys: [B] typed PRNG keys, one a sequence.
      position: [B] int32, position of the token that is chosen.
      role: `Role.DRAFT` or `Role.TARGET`.
      warpers: what the sequences want, where that is known; None: branches find out.

    Returns:
      [B] int32 tokens and the [B, N] float32 probabilities they were drawn from; where every
      sequence is greedy nothing but argmax is computed and the probabilities are zeros.
    """
    logits, seen = logits[:, None], seen[:, None]

    def drawn() -> tuple[jax.Array, jax.Array]:
        probabilities = warp(logits, seen, sampling, warpers)[:, 0]
        return draw(probabilities, keys, position, role), probabilities

    def greedy() -> tuple[jax.Array, jax.Array]:
        penalized = logits if warpers == GREEDY else penalize(logits, seen, sampling)
        token = largest(penalized[:, 0])[1]
        return token, jnp.zeros((logits.shape[0], logits.shape[-1]), jnp.float32)

    return either(warpers, sampling, drawn, greedy)


def either(
    warpers: Warpers | None,
    sampling: Sampling,
    drawn: Callable[[], Result],
    greedy: Callable[[], Result],
) -> Result:
    """`drawn()` where any sequence is sampled, else `greedy()`; in a branch where `warpers` does
    not say which."""
    if warpers is None:
        return jax.lax.cond(any_sampled(sampling), drawn, greedy)
    return drawn() if warpers.draws else greedy()
