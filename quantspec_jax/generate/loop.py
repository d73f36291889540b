"""The speculative loop (QuantSpec, arXiv 2502.10424, algorithm 1): draft, verify, accept, flush.

    round, the pending token at position n:
      draft    γ tokens for n+1 … n+γ         upper plane, 4-bit weights
      verify   rows n … n+γ at once           both planes, full weights, same slots
      accept   a ≤ γ' of them and one more    γ' = min(γ, G − 1 − (n mod G)): no pass that counts
      rollback length = n + 1 + a             crosses a flush boundary
      flush    where length is a multiple of G: F1 → planes, F2 → F1

With γ = 0 the same loop decodes autoregressively. With adaptive γ (`generate.adapt`) a round drafts
as many tokens as pay off; the verification has the rows of the most of them all the same, so that
its results do not depend, in their last bits, on how many there were.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from quantspec_jax.cache import flush, flush_due, rollback
from quantspec_jax.generate.accept import accept, simulate
from quantspec_jax.generate.adapt import choose_gamma, observe
from quantspec_jax.generate.draft import Proposals, draft
from quantspec_jax.generate.sampling import Sampling
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.generate.verify import verify
from quantspec_jax.models.parameters import Params


def generate_tokens(
    params: Params,
    draft_params: Params,
    state: DecodeState,
    sampling: Sampling,
    eos_ids: jax.Array,
    max_rounds: jax.Array | int,
    *,
    program: Program,
) -> DecodeState:
    """Decode until every sequence has finished, or for `max_rounds` rounds; a pure function of
    arrays that may be called inside another `jax.jit`.

    Args:
      params, draft_params: parameter trees; `draft_params` may hold `QuantizedWeight` kernels, and
        is not read where `program.gamma` is 0.
      state: from `prefill` or an earlier call. Donate it: the cache is updated in place.
      eos_ids: [E] int32, tokens that end a sequence; −1 as padding.
      max_rounds: int32, may be traced.
    """

    Carry = tuple[DecodeState, jax.Array]

    def unfinished(carry: Carry) -> jax.Array:
        state, rounds = carry
        return ~jnp.all(state.finished) & (rounds < max_rounds)

    def no_flush_due(carry: Carry) -> jax.Array:
        return unfinished(carry) & ~jnp.any(flush_due(carry[0].cache))

    def body(carry: Carry) -> Carry:
        state, rounds = carry
        return one_round(params, draft_params, state, sampling, eos_ids, program), rounds + 1

    # Rounds until a flush is due, the flush, and again. A branch around the flush in each round
    # would make XLA copy the buffers.
    def until_flush(carry: Carry) -> Carry:
        state, rounds = jax.lax.while_loop(no_flush_due, body, carry)
        cache = flush(state.cache, program.backend)
        return dataclasses.replace(state, cache=cache), rounds

    return jax.lax.while_loop(unfinished, until_flush, (state, jnp.int32(0)))[0]


def one_round(
    params: Params,
    draft_params: Params,
    state: DecodeState,
    sampling: Sampling,
    eos_ids: jax.Array,
    program: Program,
) -> DecodeState:
    """One draft-verify cycle of every sequence that has not finished."""
    cache = state.cache
    start, flushed = cache.length, cache.quantized_length
    b = start.shape[0]
    active = ~state.finished
    room = cache.group_size - 1 - start % cache.group_size
    gamma: jax.Array | int = program.gamma
    if program.draft_cost is not None:
        useful = jnp.minimum(room, state.limit - state.count - 1)
        gamma = choose_gamma(state.evidence, useful, active, state.draft_cost, program.gamma)

    if program.gamma:
        proposals, layers = draft(
            draft_params,
            program,
            cache.layers,
            state.pending,
            state.seen,
            start,
            flushed,
            sampling,
            state.keys,
            gamma,
        )
    else:
        nothing = jnp.zeros((b, 0, program.model.vocab_size), jnp.float32)
        proposals, layers = Proposals(jnp.zeros((b, 0), jnp.int32), nothing), cache.layers

    logits, layers = verify(
        params, program, layers, state.pending, proposals.tokens, start, flushed
    )
    proposed = jnp.minimum(gamma, room)
    verdict = accept(
        logits,
        proposals.probabilities,
        proposals.tokens,
        proposed,
        state.seen,
        sampling,
        state.keys,
        start + 1,
    )

    if program.simulated_acceptance is not None:
        verdict = simulate(verdict, proposed, state.keys, start, program.simulated_acceptance)

    length = jnp.where(active, start + verdict.accepted + 1, start)
    cache = rollback(dataclasses.replace(cache, layers=layers), length)
    state = dataclasses.replace(
        state,
        cache=cache,
        rounds=state.rounds + active,
        proposed=state.proposed + jnp.where(active, proposed, 0),
        accepted=state.accepted + jnp.where(active, verdict.accepted, 0),
    )
    if program.draft_cost is not None:
        evidence = observe(state.evidence, proposed, verdict.accepted)
        state = dataclasses.replace(state, evidence=evidence)
    return _emit(state, proposals.tokens, verdict.accepted, verdict.token, eos_ids)


def _emit(
    state: DecodeState,
    proposals: jax.Array,
    accepted: jax.Array,
    token: jax.Array,
    eos_ids: jax.Array,
) -> DecodeState:
    """Write a round's tokens, the accepted proposals and `token`, up to EOS or the limit."""
    b, gamma = proposals.shape
    index = jnp.arange(gamma + 1)
    padded = jnp.concatenate([proposals, token[:, None]], 1)
    new = jnp.where(index == accepted[:, None], token[:, None], padded)  # [B, γ + 1]
    is_eos = (new[:, :, None] == eos_ids).any(-1) & (index <= accepted[:, None])
    number = jnp.where(is_eos.any(-1), jnp.argmax(is_eos, -1), accepted) + 1
    number = jnp.where(state.finished, 0, jnp.minimum(number, state.limit - state.count))

    offset = jnp.arange(state.tokens.shape[1]) - state.count[:, None]
    written = (offset >= 0) & (offset < number[:, None])
    shifted = jnp.take_along_axis(new, jnp.clip(offset, 0, gamma), 1)
    count = state.count + number
    kept = index < number[:, None]
    last = jnp.take_along_axis(new, jnp.maximum(number - 1, 0)[:, None], 1)[:, 0]
    return dataclasses.replace(
        state,
        seen=state.seen.at[jnp.arange(b)[:, None], new].max(kept),
        pending=jnp.where(state.finished, state.pending, last),
        tokens=jnp.where(written, shifted, state.tokens),
        count=count,
        finished=state.finished | (count >= state.limit) | ((is_eos & kept).any(-1)),
    )
