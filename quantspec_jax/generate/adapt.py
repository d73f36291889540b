"""Adaptive γ: how many tokens to draft in a round, from what was accepted lately.

With acceptance α a round that drafts γ tokens yields 1 + α + … + α^γ of them and costs 1 + γ c, in
units of a verification; c is what a draft step costs. γ is what makes the most of that, and 0,
plain decoding, where α ≤ c.

α is the share of accepted ones among the proposals that were tried, up to the first rejection of
their round, each round counting a little less than the next one, and the prior one proposal's worth
of evidence. The prior lies between c, where drafting just pays, and 1: so drafting is tried at the
start, and once more whenever what spoke against it has faded. That costs a per cent.

γ depends on draws that decided kept tokens alone, never on a draw whose position is drawn again: so
the tokens still follow the target's distribution exactly. In a batch γ also depends on the other
sequences: sampled tokens are then not those that a sequence draws alone. Greedy ones are.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MOST_DRAFTED = 7  # a pass of 8 rows is one block of the kernels' products
FADING = 0.98  # of evidence, a round
NEVER = 1e6  # a cost at which nothing is drafted


class Timing(NamedTuple):
    """Rounds, the tokens drafted in them, and how long they took."""

    rounds: int
    drafted: int
    seconds: float

    def since(self, before: Timing) -> Timing:
        """What came after `before`."""
        return Timing(
            self.rounds - before.rounds,
            self.drafted - before.drafted,
            self.seconds - before.seconds,
        )


def measured_cost(drafting: Timing, plain: Timing) -> float | None:
    """c from rounds with drafts and rounds without; None where nothing was drafted, or no time
    passed."""
    if not (drafting.drafted and plain.rounds and plain.seconds > 0):
        return None
    verification = plain.seconds / plain.rounds
    step = (drafting.seconds - drafting.rounds * verification) / drafting.drafted
    return min(max(step / verification, 0.02), 10.0)


def acceptance(evidence: jax.Array, draft_cost: float | jax.Array) -> jax.Array:
    """[B, 2] evidence → [B] α."""
    prior = jnp.minimum((1 + draft_cost) / 2, 1.0)
    return (evidence[:, 0] + prior) / (evidence[:, 1] + 1)


def choose_gamma(
    evidence: jax.Array,
    room: jax.Array,
    active: jax.Array,
    draft_cost: float | jax.Array,
    most: int = MOST_DRAFTED,
) -> jax.Array:
    """[] int32 γ from 0 to `most`: one for the batch, since a round costs its longest sequence.

    Args:
      evidence: [B, 2] float32, accepted and tried proposals, faded.
      room: [B] int32, how many proposals of a sequence can count in this round.
      active: [B] bool, sequences that take part.
      draft_cost: c.
    """
    gammas = jnp.arange(most + 1)
    alpha = acceptance(evidence, draft_cost)[:, None]
    reached = jnp.where((gammas <= room[:, None]) & active[:, None], alpha**gammas, 0.0)
    tokens = jnp.cumsum(reached.sum(0))
    return jnp.argmax(tokens / (1 + draft_cost * gammas)).astype(jnp.int32)


def observe(evidence: jax.Array, proposed: jax.Array, accepted: jax.Array) -> jax.Array:
    """[B, 2] evidence after a round with so many proposals and so many of them accepted, [B]."""
    tried = jnp.minimum(accepted + 1, proposed)
    return FADING * evidence + jnp.stack([accepted, tried], 1)
