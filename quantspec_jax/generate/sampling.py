"""From logits to a token: the warped distribution, and draws that depend on position alone.

The order and meaning of the warpers are those of transformers' `generate`:

    repetition penalty on seen tokens → temperature → top-k → top-p → min-p

Which tokens top-k, top-p and min-p leave is `pallas_kernels.logit_filter`'s to find.

A GPU's branch waits for the host to read its condition. There nothing of this is in a branch: the
program is compiled for what its sequences want (`Warpers`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.logit_filter.api import kept
from pallas_kernels.logit_filter.rows import largest
from pallas_kernels.shapes import Each, Keys, LastLogits, Logits, Seen, SeenRows, shaped

Result = TypeVar("Result")


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


def not_finite(logits: jax.Array) -> jax.Array:
    """[..., N] logits → [...] bool: whether one is NaN or infinite, in one pass. A single −∞ is not
    told from a token that cannot come."""
    return ~jnp.isfinite(largest(logits)[0])  # the maximum of a row with a NaN is NaN


@shaped
def warp(
    logits: Logits,
    seen: SeenRows,
    sampling: Sampling,
    warpers: Warpers | None = None,
    backend: str = "auto",
) -> Logits:
    """The distribution that tokens are drawn from.

    Args:
      logits: [B, S, N] float32.
      seen: [B, S, N] bool, tokens of the prompt and the text before each row.
      sampling: one value a sequence.
      warpers: which filters a sequence wants; None: branches leave out those that none does.
      backend: of the kernels.

    Returns:
      [B, S, N] float32 probabilities; at temperature 0, 1 at the (first) largest penalized logit.
      At least one token of a row survives.
    """
    # Written down once: those that equal the least that survives have to be the same ones twice.
    scores = jax.lax.optimization_barrier(penalize(logits, seen, sampling))
    left = kept(
        scores,
        *sampling[:4],
        wanted=None if warpers is None else (warpers.top_k, warpers.top_p),
        backend=backend,
    )
    return left.probabilities(scores, sampling.temperature)


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
    """[B] int32 tokens from probabilities [B, N], which need not sum to 1 (Gumbel-max): those of
    `jax.random.categorical`, in fewer launches."""

    def noise(key: jax.Array) -> jax.Array:
        return jax.random.gumbel(key, probabilities.shape[-1:])

    return largest(jax.vmap(noise)(draw_keys(keys, position, role)) + jnp.log(probabilities))[1]


@shaped
def choose(
    logits: LastLogits,
    seen: Seen,
    sampling: Sampling,
    keys: Keys,
    position: Each,
    role: Role,
    warpers: Warpers | None = None,
    backend: str = "auto",
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
      backend: of the kernels.

    Returns:
      [B] int32 tokens and the [B, N] float32 probabilities they were drawn from; where every
      sequence is greedy nothing but argmax is computed and the probabilities are zeros.
    """
    logits, seen = logits[:, None], seen[:, None]

    def drawn() -> tuple[jax.Array, jax.Array]:
        probabilities = warp(logits, seen, sampling, warpers, backend)[:, 0]
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
