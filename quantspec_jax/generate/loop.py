"""The speculative loop (QuantSpec, arXiv 2502.10424, algorithm 1): draft, verify, accept, flush.

    round, the pending token at position n:
      draft    γ tokens for n+1 … n+γ         the draft's view and weights
      verify   rows n … n+γ at once           the target's view and weights, same slots
      accept   a ≤ γ' of them and one more    γ' = min(γ, room): no pass that counts crosses a flush
      rollback length = n + 1 + a
      flush    where length is a multiple of G: F1 is coded, F2 → F1

A round that finds the end of the text further up in it copies what came after, in place of drafts
(`generate.lookup`). With γ = 0 the same loop decodes autoregressively.

Which pages a draft reads is settled before its round, or for some rounds at a time
(`Policy.every`), and again after each flush.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Pages
from pallas_kernels.logit_filter.rows import largest
from quantspec_jax.cache import flush, flush_due, rollback, schedule
from quantspec_jax.checks import require
from quantspec_jax.generate import recoded
from quantspec_jax.generate.accept import accept
from quantspec_jax.generate.cache_pass import rope_at
from quantspec_jax.generate.couplings import Verdict
from quantspec_jax.generate.draft import copied_proposals, draft, no_proposals
from quantspec_jax.generate.logprobs import score
from quantspec_jax.generate.lookup import look
from quantspec_jax.generate.policies import Sizes
from quantspec_jax.generate.sampling import GREEDY
from quantspec_jax.generate.split import split
from quantspec_jax.generate.state import (
    COPIED,
    COUNTED,
    STATISTICS,
    DecodeState,
    Look,
    Program,
    counted,
)
from quantspec_jax.generate.verify import verify
from quantspec_jax.models.parameters import Params

NO_END = jnp.iinfo(jnp.int32).max


@split("params params state whole peers", "state", like=2)
def generate_tokens(
    params: Params,
    draft_params: Params,
    state: DecodeState,
    max_rounds: jax.Array | int = NO_END,
    peers: Mapping[str, jax.Array] | None = None,
    *,
    program: Program,
) -> DecodeState:
    """Decode until every sequence has finished, or for `max_rounds` rounds; a pure function of
    arrays that may be called inside another `jax.jit`.

    Args:
      params, draft_params: parameter trees; `draft_params` may hold packed kernels, and is not read
        where `program.gamma` is 0. Where the cache's codec learns, `params` holds what it has, too
        (`Model.params_for`).
      state: from `prefill` or an earlier call. Donate it: the cache is updated in place. Rounds
        copy where it has a `lookup`, of `program.lookup` tokens.
      max_rounds: int32 [], may be traced; or [4]: also a `Look`, when fewer rounds are enough.
      peers: `peers.addresses` of the program's mesh: in a layer, devices meet in kernels then.

    Raises:
      ValueError: the state's `lookup` is not for `program.lookup` tokens.
    """

    if peers is not None:
        params, draft_params = params | {"peers": peers}, draft_params | {"peers": peers}
    before, statistics = state.rounds, state.statistics
    early = None
    if jnp.ndim(max_rounds):
        max_rounds, *rest = jnp.asarray(max_rounds)
        early = Look(*rest)
    lookup = state.lookup if program.lookup else None
    if lookup is not None:
        number = lookup.tokens.shape[1]
        require(number == program.lookup, "tokens of state.lookup", number, str(program.lookup))

    def unfinished(state: DecodeState) -> jax.Array:
        going = goes_on(state, before, max_rounds)
        if early is None:
            return going
        new = state.statistics - statistics
        counts = new[:, : 2 * COUNTED].reshape(-1, 2, COUNTED)
        while counts.shape[-1] > 1:  # a sum of all would be a launch of its own, in each condition
            counts = counts[..., ::2] + counts[..., 1::2]
        proposed, accepted = jnp.sum(counts, (0, 2))
        return going & ~early.ends(jnp.max(state.rounds - before), proposed, accepted)

    def no_flush_due(state: DecodeState) -> jax.Array:
        return unfinished(state) & ~jnp.any(flush_due(state.cache))

    def copies(state: DecodeState) -> jax.Array:
        return no_flush_due(state) & all_found(state)

    def drafts(state: DecodeState) -> jax.Array:
        return no_flush_due(state) & ~all_found(state) if lookup else no_flush_due(state)

    def body(state: DecodeState) -> DecodeState:
        return one_round(params, draft_params, state, program)

    def some_rounds(state: DecodeState) -> DecodeState:
        return with_one_choice(params, draft_params, state, drafts, program)

    # Rounds until a flush is due, the flush, and again. A branch around the flush in each round
    # would make XLA copy the buffers, and one around a choice of pages would wait for the host.
    several = program.gamma and program.policy.every != 1
    rounds_with_their_choice = some_rounds if several else body

    def copied_round(state: DecodeState) -> DecodeState:
        return read_round(params, {}, state, program.copying, None, copied=True)

    def in_turn(state: DecodeState) -> DecodeState:
        state = jax.lax.while_loop(copies, copied_round, state)
        return jax.lax.while_loop(drafts, rounds_with_their_choice, state)

    def until_flush(state: DecodeState) -> DecodeState:
        rounds = in_turn if lookup else rounds_with_their_choice
        state = jax.lax.while_loop(no_flush_due, rounds, state)
        cache = state.cache
        if cache.codec.recodes:
            cache = recoded.flush(params["kv"], cache, program)
        else:
            cache = flush(cache, program.backend, program.axes)
        return dataclasses.replace(state, cache=cache)

    return jax.lax.while_loop(unfinished, until_flush, state)


def goes_on(state: DecodeState, before: jax.Array, rounds: jax.Array | int) -> jax.Array:
    """Whether a sequence has not finished, and there were fewer than `rounds` rounds since its
    number [B] was `before`: it has taken part in all of them."""
    return jnp.any(~state.finished & (state.rounds - before < rounds))


def all_found(state: DecodeState) -> jax.Array:
    """[] bool: whether every sequence that has not finished has tokens to copy."""
    assert state.lookup is not None
    return jnp.all(state.finished | state.lookup.found)


def with_one_choice(
    params: Params,
    draft_params: Params,
    state: DecodeState,
    go_on: Callable[[DecodeState], jax.Array],
    program: Program,
) -> DecodeState:
    """Rounds whose drafts read the same pages, `Policy.every` of them or while `go_on`. A call has
    one of these at least."""
    first, every = state.rounds, program.policy.every
    pages = pages_to_read(state, program)

    def more(state: DecodeState) -> jax.Array:
        within = True if every is None else goes_on(state, first, every)
        return within & go_on(state)

    def body(state: DecodeState) -> DecodeState:
        return read_round(params, draft_params, state, program, pages)

    return jax.lax.while_loop(more, body, state)


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
    copied: bool = False,
) -> DecodeState:
    """`one_round` whose draft reads these pages, or whose proposals are copied."""
    start, active = state.cache.length, ~state.finished
    proposals = no_proposals(len(start), 0, program.model.vocab_size)
    cache = state.cache
    positions = start[:, None] + jnp.arange(program.cache.pass_width)[None]
    positions = jax.lax.optimization_barrier(positions)  # as in `_decided`
    rope = rope_at(positions, program)
    if copied:
        proposals = copied_proposals(state, program)
    elif program.gamma:
        proposals, cache = draft(draft_params, state, positions, rope, program, pages)
    logits, cache, by_page = verify(
        params, dataclasses.replace(state, cache=cache), proposals.tokens, rope, program
    )
    proposed = jnp.minimum(program.gamma, schedule.room(start, program.cache.group_size))
    if copied and state.lookup is not None:
        proposed = jnp.where(state.lookup.found, proposed, 0)
    most, best = largest(logits)
    verdict = accept(logits, proposals, proposed, state, program, best)
    decided = _decided(verdict, proposals.tokens, ~jnp.isfinite(most))
    broken = active & decided.broken
    active &= ~broken
    accepted = jnp.where(active, decided.accepted, 0)
    proposed = jnp.where(active, proposed, 0)
    numbers = _counts(state, proposed, accepted, pages, program, copied)
    state = dataclasses.replace(
        state,
        finished=state.finished | broken,
        broken=state.broken | broken,
        cache=rollback(cache, jnp.where(active, start + accepted + 1, start)),
        rounds=state.rounds + active.astype(jnp.int32),
        statistics=state.statistics + numbers,
    )
    if by_page is not None:  # votes on what the next choice is
        call = (state.memory, by_page, decided.accepted)
        memory = program.policy.update(*call, backend=program.backend)
        state = dataclasses.replace(state, memory=memory)
    return _emit(state, decided, logits, start, program)


class _Decided(NamedTuple):
    """What a round decides.

    tokens    [B, γ+1] int32, the accepted proposals and the token after them; beyond, anything
    accepted  [B] int32
    broken    [B] bool, a logit of a row up to the one that the last token is from is not finite
    """

    tokens: jax.Array
    accepted: jax.Array
    broken: jax.Array


def _decided(verdict: Verdict, proposals: jax.Array, wrong: jax.Array) -> _Decided:
    """From the proposals [B, γ] and whether a row of logits is not finite, [B, γ+1] bool.

    All of it lies in one small array: on a GPU that is one launch, and what follows from it are
    few, for XLA joins what reads the same array."""
    gamma, accepted = proposals.shape[1], verdict.accepted
    tokens = [jnp.where(accepted == i, verdict.token, proposals[:, i]) for i in range(gamma)]
    broken = functools.reduce(
        jnp.logical_or, (wrong[:, i] & (i <= accepted) for i in range(gamma + 1))
    )
    columns = [*tokens, verdict.token, accepted, broken.astype(jnp.int32)]
    small = jax.lax.optimization_barrier(jnp.stack(columns, 1))
    return _Decided(small[:, : gamma + 1], small[:, gamma + 1], small[:, gamma + 2] > 0)


def pages_to_read(state: DecodeState, program: Program) -> tuple[Pages, ...] | None:
    """Those of the planes that the draft reads in each layer; None: all."""
    cache, axes = program.cache, program.axes
    coded = axes.tiles_before(state.cache.quantized_length // cache.group_size)
    tiles = -(-cache.num_tiles // axes.cp)
    sizes = Sizes(program.model.num_layers, program.model.num_kv_heads // axes.tp, tiles)
    return program.policy.pages(state.memory, coded, sizes, backend=program.backend)


def _counts(
    state: DecodeState,
    proposed: jax.Array,
    accepted: jax.Array,
    pages: tuple[Pages, ...] | None,
    program: Program,
    copied: bool,
) -> jax.Array:
    """[B, STATISTICS] int32, of one round."""
    nothing = jnp.zeros((len(proposed), STATISTICS), jnp.int32)
    if copied:
        numbers = jnp.stack([(proposed > 0).astype(jnp.int32), proposed, accepted], 1)
        return jnp.concatenate([nothing[:, :COPIED], numbers], 1)
    read = _pages_read(state, pages, program, proposed > 0)
    return jnp.concatenate([counted(proposed), counted(accepted), read, nothing[:, COPIED:]], 1)


def _pages_read(
    state: DecodeState, pages: tuple[Pages, ...] | None, program: Program, drafting: jax.Array
) -> jax.Array:
    """[B, 2] int32: pages that a draft of this round reads in a layer, and those that there are."""
    coded = state.cache.quantized_length // program.cache.group_size
    read = coded if pages is None else program.axes.of_all_tiles(pages[0].count)
    return jnp.where(drafting[:, None], jnp.stack([read, coded], 1), 0)


def _emit(
    state: DecodeState,
    decided: _Decided,
    logits: jax.Array,
    start: jax.Array,
    program: Program,
) -> DecodeState:
    """Write a round's tokens up to an end token or the limit; and, where somebody asks for it, what
    the logits say of them, and what may be copied next. `start` [B]: the round's position."""
    new, accepted = decided.tokens, decided.accepted
    b, width = new.shape
    index = jnp.arange(width)[None]
    eos_ids = state.requests.eos_ids[:, None]
    first_end = jnp.min(jnp.where(new[..., None] == eos_ids, index[..., None], width), (1, 2))
    ended = first_end <= accepted
    wanted = jnp.minimum(first_end, accepted) + 1
    room = state.requests.limit - state.count
    number = jnp.where(state.finished, 0, jnp.minimum(wanted, room))

    def write(rows: jax.Array, new: jax.Array) -> jax.Array:
        return _written(rows, new, state.count, number)

    drafted, logprobs, lookup = state.drafted, state.logprobs, state.lookup
    if drafted is not None:
        drafted = write(drafted, index < accepted[:, None])
    if program.logprobs and logprobs is not None:
        scores = score(logits, new, logprobs.ids.shape[-1])
        logprobs = jax.tree.map(write, logprobs, scores)
    if lookup is not None:
        text = _written(lookup.text, new, start + 1, number)
        lookup = look(text, start + number, lookup.tokens.shape[1])
    seen = state.seen
    if program.warpers != GREEDY:
        seen = seen.at[jnp.arange(b)[:, None], new].max(index < number[:, None])
    last = new[:, 0]
    for i in range(1, width):
        last = jnp.where(number > i, new[:, i], last)
    return dataclasses.replace(
        state,
        seen=seen,
        pending=jnp.where(state.finished, state.pending, last),
        tokens=write(state.tokens, new),
        drafted=drafted,
        logprobs=logprobs,
        lookup=lookup,
        count=state.count + number,
        finished=state.finished | (wanted >= room) | ended,
    )


def _written(rows: jax.Array, new: jax.Array, first: jax.Array, number: jax.Array) -> jax.Array:
    """[B, M, ...] with the first `number` [B] of new [B, S, ...] from place `first` [B] on."""
    offset = jnp.arange(rows.shape[1])[None] - first[:, None]
    rest = (1,) * (rows.ndim - 2)
    source = jnp.clip(offset, 0, new.shape[1] - 1)
    shifted = jnp.take_along_axis(new, source.reshape(*source.shape, *rest), 1)
    written = (offset >= 0) & (offset < number[:, None])
    return jnp.where(written.reshape(*written.shape, *rest), shifted, rows)
