"""The draft: γ tokens, one after the other, from the upper plane and the 4-bit weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from quantspec_jax.cache import LayerCache
from quantspec_jax.generate.sampling import Role, Sampling, choose
from quantspec_jax.generate.state import Program
from quantspec_jax.generate.verify import cache_pass
from quantspec_jax.models.decoder import Params


class Proposals(NamedTuple):
    """tokens [B, γ] int32, and the distributions [B, γ, N] float32 they were drawn from."""

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
) -> tuple[Proposals, tuple[LayerCache, ...]]:
    """Propose γ tokens after the pending one at position `start` [B].

    Each step appends the draft's own keys and values to the buffers; the verification writes the
    same slots again. Steps past the end of the buffer's half do not count (`one_round`): they
    repeat its last position.
    """
    rows = jnp.arange(pending.shape[0])
    g = program.cache.group_size
    last = (start // g + 1) * g - 1

    def step(carry, i):
        layers, token, seen = carry
        position = jnp.minimum(start + i, last)
        logits, layers = cache_pass(
            params, program, layers, token[:, None], position, quantized_length, "int4"
        )
        token, probabilities = choose(logits[:, 0], seen, sampling, keys, position + 1, Role.DRAFT)
        return (layers, token, seen.at[rows, token].set(True)), (token, probabilities)

    (layers, _, _), (tokens, probabilities) = jax.lax.scan(
        step, (layers, pending, seen), jnp.arange(program.gamma)
    )
    return Proposals(tokens.swapaxes(0, 1), probabilities.swapaxes(0, 1)), layers
