"""The draft: γ tokens, one after the other, from the draft's view and weights; or copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.kv_attention.read import Pages
from quantspec_jax.cache import KVCache, schedule
from quantspec_jax.generate.cache_pass import Rope, cache_pass
from quantspec_jax.generate.sampling import GREEDY, also_seen, choose
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.models.parameters import Params


class Proposals(NamedTuple):
    """tokens [B, γ] int32, and the distributions [B, γ, N] float32 they were drawn from; zeros
    where every sequence is greedy."""

    tokens: jax.Array
    probabilities: jax.Array


def draft(
    params: Params,
    state: DecodeState,
    positions: jax.Array,
    rope: Rope,
    program: Program,
    pages: Sequence[Pages] | None = None,
) -> tuple[Proposals, KVCache]:
    """Propose γ tokens after the pending one, from these pages of each layer (None: all).

    Each step appends the draft's own keys and values to the buffers; the verification writes the
    same slots again. Steps past the next flush do not count (`cache.schedule`): they repeat the
    last position before it.

    Args:
      positions: [B, γ+1 or more] int32, the round's, and rope: cos and sin of them.
    """
    start = state.cache.length
    sampling, coupling = state.requests.sampling, program.coupling
    keys = coupling.draft_keys(state.requests.keys, start + 1)
    last = schedule.last_position(positions[:, 0], program.cache.group_size)

    def step(i, carry):
        cache, token, seen, found = carry
        position = jnp.minimum(jax.lax.dynamic_index_in_dim(positions, i, 1, False), last)
        call = (params, program, cache, token[:, None], position, program.draft_read, pages)
        logits, cache = cache_pass(*call, rope, start)
        token, probabilities = choose(
            logits[:, 0],
            seen,
            sampling,
            keys,
            position + 1,
            coupling.draft_role,
            program.warpers,
            program.backend,
        )
        found = Proposals(
            jnp.where(jnp.arange(program.gamma)[None] == i, token[:, None], found.tokens),
            jax.lax.dynamic_update_index_in_dim(found.probabilities, probabilities, i, 1),
        )
        return cache, token, also_seen(seen, token), found

    nothing = no_proposals(len(start), program.gamma, program.model.vocab_size)
    carry = (state.cache, state.pending, state.seen, nothing)
    # On a GPU a turn's counter and its writes are launches of their own, and fuse with nothing.
    unroll = dispatch.device() is not None
    cache, _, _, found = jax.lax.fori_loop(0, program.gamma, step, carry, unroll=unroll)
    # Written down once: XLA would find each token again wherever one is read.
    return found._replace(tokens=jax.lax.optimization_barrier(found.tokens)), cache


def copied_proposals(state: DecodeState, program: Program) -> Proposals:
    """What the text has after the place where its last tokens stood before (`generate.lookup`)."""
    assert state.lookup is not None
    tokens = state.lookup.tokens
    if program.warpers == GREEDY:
        return Proposals(tokens, jnp.zeros((*tokens.shape, program.model.vocab_size), jnp.float32))
    return Proposals(tokens, jax.nn.one_hot(tokens, program.model.vocab_size, dtype=jnp.float32))


def no_proposals(batch: int, gamma: int, vocabulary: int) -> Proposals:
    """Room for γ proposals a sequence."""
    return Proposals(
        jnp.zeros((batch, gamma), jnp.int32), jnp.zeros((batch, gamma, vocabulary), jnp.float32)
    )
