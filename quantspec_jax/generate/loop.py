"""The speculative loop (QuantSpec, arXiv 2502.10424, algorithm 1): draft, verify, accept, flush.

    round, the pending token at position n:
      draft    γ tokens for n+1 … n+γ         the draft's view and weights
      verify   rows n … n+γ at once           the target's view and weights, same slots
      accept   a ≤ γ' of them and one more    γ' = min(γ, room): no pass that counts crosses a flush
      rollback length = n + 1 + a
      flush    where length is a multiple of G: F1 is coded, F2 → F1

With γ = 0 the same loop decodes autoregressively. Which pages a draft reads is settled before its
round, or for some rounds at a time (`Policy.every`), and again after each flush.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Pages
from quantspec_jax.cache import flush, flush_due, rollback, schedule
from quantspec_jax.generate import recoded
from quantspec_jax.generate.accept import Verdict, accept
from quantspec_jax.generate.cache_pass import rope_at
from quantspec_jax.generate.draft import draft, no_proposals
from quantspec_jax.generate.logprobs import score
from quantspec_jax.generate.policies import Sizes
from quantspec_jax.generate.requests import is_end
from quantspec_jax.generate.sampling import not_finite
from quantspec_jax.generate.split import split
from quantspec_jax.generate.state import DecodeState, Program, counted
from quantspec_jax.generate.verify import verify
from quantspec_jax.models.parameters import Params

NO_END = jnp.iinfo(jnp.int32).max

Carry = tuple[DecodeState, jax.Array]  # and the rounds of this call so far


@split("params params state whole", "state", like=2)
def generate_tokens(
    params: Params,
    draft_params: Params,
    state: DecodeState,
    max_rounds: jax.Array | int = NO_END,
    *,
    program: Program,
) -> DecodeState:
    """Decode until every sequence has finished, or for `max_rounds` rounds; a pure function of
    arrays that may be called inside another `jax.jit`.

    Args:
      params, draft_params: parameter trees; `draft_params` may hold packed kernels, and is not read
        where `program.gamma` is 0. Where the cache's codec learns, `params` holds what it has, too
        (`Model.params_for`).
      state: from `prefill` or an earlier call. Donate it: the cache is updated in place.
      max_rounds: int32, may be traced.
    """

    def unfinished(carry: Carry) -> jax.Array:
        state, rounds = carry
        return ~jnp.all(state.finished) & (rounds < max_rounds)

    def no_flush_due(carry: Carry) -> jax.Array:
        return unfinished(carry) & ~jnp.any(flush_due(carry[0].cache))

    def body(carry: Carry) -> Carry:
        state, rounds = carry
        return one_round(params, draft_params, state, program), rounds + 1

    def some_rounds(carry: Carry) -> Carry:
        return with_one_choice(params, draft_params, carry, no_flush_due, program)

    # Rounds until a flush is due, the flush, and again. A branch around the flush in each round
    # would make XLA copy the buffers, and one around a choice of pages would wait for the host.
    several = program.gamma and program.policy.every != 1
    rounds_with_their_choice = some_rounds if several else body

    def until_flush(carry: Carry) -> Carry:
        state, rounds = jax.lax.while_loop(no_flush_due, rounds_with_their_choice, carry)
        cache = state.cache
        if cache.codec.recodes:
            cache = recoded.flush(params["kv"], cache, program)
        else:
            cache = flush(cache, program.backend, program.axes)
        return dataclasses.replace(state, cache=cache), rounds

    return jax.lax.while_loop(unfinished, until_flush, (state, jnp.int32(0)))[0]


def with_one_choice(
    params: Params,
    draft_params: Params,
    carry: Carry,
    go_on: Callable[[Carry], jax.Array],
    program: Program,
) -> Carry:
    """Rounds whose drafts read the same pages, `Policy.every` of them or while `go_on`. A call has
    one of these at least."""
    state, first = carry
    pages, every = pages_to_read(state, program), program.policy.every

    def more(carry: Carry) -> jax.Array:
        within = True if every is None else carry[1] - first < every
        return within & go_on(carry)

    def body(carry: Carry) -> Carry:
        state, rounds = carry
        return read_round(params, draft_params, state, program, pages), rounds + 1

    return jax.lax.while_loop(more, body, carry)


def one_round(
    params: Params, draft_params: Params, state: DecodeState, program: Program
) -> DecodeState:
    """One draft-verify cycle of every sequence that has not finished."""
    pages = pages_to_read(state, program) if program.gamma else None
    return read_round(params, draft_params, state, program, pages)


def read_round(
    params: Params,
    draft_params: Params,
    state: DecodeState,
    program: Program,
    pages: tuple[Pages, ...] | None,
) -> DecodeState:
    """`one_round` whose draft reads these pages."""
    start, active = state.cache.length, ~state.finished
    proposals = no_proposals(len(start), 0, program.model.vocab_size)
    cache = state.cache
    rope = rope_at(start[:, None] + jnp.arange(program.cache.pass_width)[None], program)
    if program.gamma:
        proposals, cache = draft(draft_params, state, rope, program, pages)
    logits, cache, by_page = verify(
        params, dataclasses.replace(state, cache=cache), proposals.tokens, rope, program
    )
    proposed = jnp.minimum(program.gamma, schedule.room(start, program.cache.group_size))
    verdict = accept(logits, proposals, proposed, state, program)

    # Of rows behind the one that decides the round's last token nothing is kept.
    kept = jnp.arange(program.gamma + 1)[None] <= verdict.accepted[:, None]
    broken = active & jnp.any(not_finite(logits) & kept, -1)
    active &= ~broken
    accepted = jnp.where(active, verdict.accepted, 0)
    state = dataclasses.replace(
        state,
        finished=state.finished | broken,
        broken=state.broken | broken,
        cache=rollback(cache, jnp.where(active, start + accepted + 1, start)),
        rounds=state.rounds + active.astype(jnp.int32),
        proposed=state.proposed + counted(jnp.where(active, proposed, 0)),
        accepted=state.accepted + counted(accepted),
        draft_pages=state.draft_pages + _pages_read(state, pages, program, active & (proposed > 0)),
    )
    if by_page is not None:  # votes on what the next choice is
        call = (state.memory, by_page, verdict.accepted)
        memory = program.policy.update(*call, backend=program.backend)
        state = dataclasses.replace(state, memory=memory)
    return _emit(state, proposals.tokens, verdict, logits if program.logprobs else None)


def pages_to_read(state: DecodeState, program: Program) -> tuple[Pages, ...] | None:
    """Those of the planes that the draft reads in each layer; None: all."""
    cache, axes = program.cache, program.axes
    coded = axes.tiles_before(state.cache.quantized_length // cache.group_size)
    tiles = -(-cache.num_tiles // axes.cp)
    sizes = Sizes(program.model.num_layers, program.model.num_kv_heads // axes.tp, tiles)
    return program.policy.pages(state.memory, coded, sizes, backend=program.backend)


def _pages_read(
    state: DecodeState, pages: tuple[Pages, ...] | None, program: Program, drafting: jax.Array
) -> jax.Array:
    """[B, 2] int32: pages that a draft of this round reads in a layer, and those that there are."""
    coded = state.cache.quantized_length // program.cache.group_size
    read = coded if pages is None else program.axes.of_all_tiles(pages[0].count)
    return jnp.where(drafting[:, None], jnp.stack([read, coded], 1), 0)


def _emit(
    state: DecodeState, proposals: jax.Array, verdict: Verdict, logits: jax.Array | None
) -> DecodeState:
    """Write a round's tokens, the accepted proposals and the one after them, up to an end token or
    the limit; with logits, what these say of them."""
    b, gamma = proposals.shape
    accepted, token = verdict.accepted[:, None], verdict.token[:, None]
    index = jnp.arange(gamma + 1)[None]
    padded = jnp.concatenate([proposals, token], 1)
    new = jnp.where(index == accepted, token, padded)  # [B, γ + 1]
    ends = is_end(new, state.requests.eos_ids) & (index <= accepted)
    number = jnp.where(ends.any(-1), jnp.argmax(ends, -1), verdict.accepted) + 1
    limit = state.requests.limit
    number = jnp.where(state.finished, 0, jnp.minimum(number, limit - state.count))

    offset = jnp.arange(state.tokens.shape[1])[None] - state.count[:, None]
    written = (offset >= 0) & (offset < number[:, None])
    source = jnp.clip(offset, 0, gamma)

    def write(rows: jax.Array, new: jax.Array) -> jax.Array:  # [B, M, ...] from [B, γ + 1, ...]
        rest = (1,) * (rows.ndim - 2)
        shifted = jnp.take_along_axis(new, source.reshape(*source.shape, *rest), 1)
        return jnp.where(written.reshape(*written.shape, *rest), shifted, rows)

    drafted, logprobs = state.drafted, state.logprobs
    if drafted is not None:
        drafted = write(drafted, index < accepted)
    if logits is not None and logprobs is not None:
        scores = score(logits, new, logprobs.ids.shape[-1])
        logprobs = jax.tree.map(write, logprobs, scores)
    count = state.count + number
    kept = index < number[:, None]
    last = jnp.take_along_axis(new, jnp.maximum(number - 1, 0)[:, None], 1)[:, 0]
    return dataclasses.replace(
        state,
        seen=state.seen.at[jnp.arange(b)[:, None], new].max(kept),
        pending=jnp.where(state.finished, state.pending, last),
        tokens=write(state.tokens, new),
        drafted=drafted,
        logprobs=logprobs,
        count=count,
        finished=state.finished | (count >= limit) | ((ends & kept).any(-1)),
    )
