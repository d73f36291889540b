"""The acceptance rule: which drafted tokens stay, and the token after them.

Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1). With p the target's and q
the draft's distribution at a position, a proposal x ~ q is

    accepted with probability min(1, p(x)/q(x)),

the first one rejected is replaced by a draw from norm(max(p − q, 0)), and where all are accepted
one more token comes from p. So every token follows p, whatever q is. Both sides are warped alike
(temperature, top-k, ...). At temperature 0, p and q are one-hot and the rule is: accept while the
draft's token is the target's argmax.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from quantspec_jax.generate.sampling import (
    Role,
    Sampling,
    any_sampled,
    draw,
    draw_keys,
    penalize,
    warp,
)


class Verdict(NamedTuple):
    """What a round keeps: `accepted` proposals and one token of the target's own after them."""

    accepted: jax.Array  # [B] int32
    token: jax.Array  # [B] int32


def _accepts(u: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    """u < p/q, for u uniform in [0, 1), without the division."""
    return u * q < p


def _residual(p: jax.Array, q: jax.Array) -> jax.Array:
    """[B, N] max(p − q, 0), unnormalized; p where rounding left nothing of it."""
    rest = jnp.maximum(p - q, 0.0)
    return jnp.where(jnp.sum(rest, -1, keepdims=True) > 0, rest, p)


def _seen_by_row(seen: jax.Array, proposals: jax.Array) -> jax.Array:
    """[B, N] and [B, γ] → [B, γ+1, N] bool: row i has also seen the proposals before it."""
    tokens = jnp.arange(seen.shape[-1])
    rows = [seen]
    for i in range(proposals.shape[1]):
        rows.append(rows[-1] | (tokens == proposals[:, i, None]))
    return jnp.stack(rows, 1)


def _leading(accepts: jax.Array, proposed: jax.Array) -> jax.Array:
    """[B] int32: how many of the first `proposed` of [B, γ] hold without a gap."""
    counts = jnp.arange(accepts.shape[1]) < proposed[:, None]
    return jnp.sum(jnp.cumprod(accepts & counts, 1, dtype=jnp.int32), 1, dtype=jnp.int32)


def _row(x: jax.Array, i: jax.Array) -> jax.Array:
    """[B, S, ...] → [B, ...], row i of each sequence."""
    index = i.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, 1)[:, 0]


def _at(probabilities: jax.Array, tokens: jax.Array) -> jax.Array:
    """[B, γ, N] at tokens [B, γ] → [B, γ]."""
    return jnp.take_along_axis(probabilities, tokens[..., None], -1)[..., 0]


def accept(
    target_logits: jax.Array,
    draft_probabilities: jax.Array,
    proposals: jax.Array,
    proposed: jax.Array,
    seen: jax.Array,
    sampling: Sampling,
    keys: jax.Array,
    position: jax.Array,
) -> Verdict:
    """Compare a round's proposals with the target.

    Args:
      target_logits: [B, γ+1, N] float32; row i is the target's after proposals 0..i−1.
      draft_probabilities: [B, γ, N] float32, what `choose` returned with each proposal. γ may be 0:
        then the token is drawn from the target alone.
      proposals: [B, γ] int32.
      proposed: [B] int32, 0..γ: only the first so many proposals count.
      seen: [B, N] bool, tokens of the prompt and of the text before the first proposal.
      sampling: one value a sequence.
      keys: [B] typed PRNG keys, one a sequence.
      position: [B] int32, sequence position of the first proposal.

    Returns:
      How many proposals are accepted, and the token after them: drawn from the residual at the
      first rejection, from the target's row `proposed` where there is none.
    """
    gamma = proposals.shape[1]

    def sampled() -> Verdict:
        p = warp(target_logits, _seen_by_row(seen, proposals), sampling)
        # No draft stands at the row after the last proposal: there all of p is residual.
        q = jnp.pad(draft_probabilities, ((0, 0), (0, 1), (0, 0)))
        at = position[:, None] + jnp.arange(gamma)
        accept_keys = jax.vmap(lambda t: draw_keys(keys, t, Role.ACCEPT), 1, 1)(at)
        u = jax.vmap(jax.vmap(jax.random.uniform))(accept_keys)
        accepted = _leading(
            _accepts(u, _at(p[:, :gamma], proposals), _at(q[:, :gamma], proposals)), proposed
        )
        rejected = (accepted < proposed)[:, None]
        p_next, q_next = _row(p, accepted), jnp.where(rejected, _row(q, accepted), 0.0)
        weights = _residual(p_next, q_next)
        return Verdict(accepted, draw(weights, keys, position + accepted, Role.TARGET))

    def greedy() -> Verdict:
        penalized = penalize(target_logits, _seen_by_row(seen, proposals), sampling)
        best = jnp.argmax(penalized, -1).astype(jnp.int32)
        accepted = _leading(best[:, :gamma] == proposals, proposed)
        return Verdict(accepted, _row(best, accepted))

    return jax.lax.cond(any_sampled(sampling), sampled, greedy)


def simulate(
    verdict: Verdict, proposed: jax.Array, keys: jax.Array, position: jax.Array, alpha: float
) -> Verdict:
    """For measurements with random weights: accept each of `proposed` [B] proposals with
    probability `alpha`, up to the first rejection, in place of what `verdict` found."""
    draws = jax.vmap(lambda key: jax.random.uniform(key, (32,)))(
        draw_keys(keys, position, Role.ACCEPT)
    )
    run = jnp.sum(jnp.cumprod(draws < alpha, 1, dtype=jnp.int32), 1, dtype=jnp.int32)
    return Verdict(jnp.minimum(run, proposed), verdict.token)
