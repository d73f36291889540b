"""The draft: γ tokens, one after the other, from the upper plane and the 4-bit weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from quantspec_jax.cache import LayerCache
from quantspec_jax.generate.sampling import Role, Sampling, choose
from quantspec_jax.generate.state import Program
from quantspec_jax.generate.verify import cache_pass
from quantspec_jax.models.parameters import Params

# A GPU waits for the host before each turn of a loop whose length the program does not know:
# 0.13 ms for a draft step of Llama-2-7B on an H200, and more where the loop is in a CUDA graph. So
# an adaptive draft takes some steps in a turn.
CHUNKS = (4, 2, 1)


class Proposals(NamedTuple):
    """tokens [B, γ] int32, and the distributions [B, γ, N] float32 they were drawn from; zeros
    beyond what a round drafted."""

    tokens: jax.Array
    probabilities: jax.Array


def draft(
    params: Params,
    program: Program,
    layers: tuple[LayerCache, ...],
    pending: jax.Array,
    seen: jax.Array,
    start: jax.Array,
    quantized_length: jax.Array,
    sampling: Sampling,
    keys: jax.Array,
    gamma: jax.Array | int,
) -> tuple[Proposals, tuple[LayerCache, ...]]:
    """Propose `gamma` ≤ γ tokens after the pending one at position `start` [B].

    Each step appends the draft's own keys and values to the buffers; the verification writes the
    same slots again. Steps past the end of the buffer's half do not count (`one_round`): they
    repeat its last position.
    """
    rows = jnp.arange(pending.shape[0])
    g = program.cache.group_size
    last = (start // g + 1) * g - 1

    def step(i, carry):
        layers, token, seen, found = carry
        position = jnp.minimum(start + i, last)
        logits, layers = cache_pass(
            params, program, layers, token[:, None], position, quantized_length, "int4"
        )
        token, probabilities = choose(logits[:, 0], seen, sampling, keys, position + 1, Role.DRAFT)
        found = Proposals(
            jax.lax.dynamic_update_index_in_dim(found.tokens, token, i, 1),
            jax.lax.dynamic_update_index_in_dim(found.probabilities, probabilities, i, 1),
        )
        return layers, token, seen.at[rows, token].set(True), found

    shape = (pending.shape[0], program.gamma)
    nothing = Proposals(
        jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, program.model.vocab_size), jnp.float32)
    )
    carry = (layers, pending, seen, nothing)
    if isinstance(gamma, int):
        layers, _, _, found = jax.lax.fori_loop(0, gamma, step, carry)
        return found, layers

    done = jnp.zeros_like(gamma)
    for size in CHUNKS:
        times = (gamma - done) // size

        def chunk(n, carry, done=done, size=size):
            return jax.lax.fori_loop(
                0, size, lambda i, carry: step(done + n * size + i, carry), carry
            )

        carry = jax.lax.fori_loop(0, times, chunk, carry)
        done = done + times * size
    return carry[3], carry[0]
