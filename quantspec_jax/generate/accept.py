"""The acceptance: which drafted tokens stay, and the token after them.

With p the target's and q the draft's distribution at a position, a coupling (`generate.couplings`)
says which of the proposals x ~ q stay and what follows them, so that every token follows p,
whatever q is. Both sides are warped alike (temperature, top-k, ...). At temperature 0, p and q are
one-hot, and every coupling is the same rule: accept while the draft's token is the target's argmax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.logit_filter.rows import largest
from pallas_kernels.shapes import Each, Logits, shaped
from quantspec_jax.generate.couplings import Verdict
from quantspec_jax.generate.draft import Proposals
from quantspec_jax.generate.sampling import also_seen, either, penalize, warp
from quantspec_jax.generate.state import DecodeState, Program


@shaped
def accept(
    logits: Logits,
    proposals: Proposals,
    proposed: Each,
    state: DecodeState,
    program: Program,
    best: jax.Array | None = None,
) -> Verdict:
    """Compare a round's proposals with the target.

    Args:
      logits: [B, γ+1, N] float32; row i is the target's after proposals 0..i−1. γ may be 0: then
        the token is drawn from the target alone.
      proposals: γ a sequence.
      proposed: [B] int32, 0..γ: only the first so many proposals count.
      state: before the round.
      best: [B, γ+1] int32, where each row's logits are largest, if that is known.

    Returns:
      How many proposals are accepted, and the token after them.
    """
    tokens, q = proposals
    sampling = state.requests.sampling
    rest = (tokens, proposed, state.requests.keys, state.cache.length + 1)

    def drawn() -> Verdict:
        seen = _seen_by_row(state.seen, tokens)
        p = warp(logits, seen, sampling, program.warpers, program.backend)
        return program.coupling.verdict(p, q, *rest)

    def greedy() -> Verdict:
        chosen = best
        if program.warpers is None:
            chosen = largest(penalize(logits, _seen_by_row(state.seen, tokens), sampling))[1]
        elif chosen is None:
            chosen = largest(logits)[1]
        return program.coupling.greedy(chosen, *rest)

    return either(program.warpers, sampling, drawn, greedy)


def _seen_by_row(seen: jax.Array, proposals: jax.Array) -> jax.Array:
    """[B, N] and [B, γ] → [B, γ+1, N] bool: row i has also seen the proposals before it."""
    rows = [seen]
    for i in range(proposals.shape[1]):
        rows.append(also_seen(rows[-1], proposals[:, i]))
    return jnp.stack(rows, 1)
