"""From prompts to the state before the first round."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.cache import HierarchicalKVCache, LayerCache, from_prompt, quantized_length
from quantspec_jax.generate.sampling import Role, Sampling, choose
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.models.attention import prompt_attention
from quantspec_jax.models.decoder import Params, forward, unembed


def prefill(
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    keys: jax.Array,
    eos_ids: jax.Array,
    limit: jax.Array,
    *,
    program: Program,
    capacity: int,
) -> DecodeState:
    """Run the prompts in full precision, fill the cache layer by layer and choose the first token.

    Args:
      prompts: [B, P] int32, padded on the right; lengths: [B] int32, from 1 to P.
      keys: [B] typed PRNG keys. eos_ids: [E] int32, −1 as padding. limit: [B], tokens to make.
      capacity: M, how many new tokens the state has room for.
    """
    b, p = prompts.shape
    config = program.model

    def attend(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache]:
        out = prompt_attention(q, k, v, config.head_dim**-0.5, program.backend)
        layer = from_prompt(
            k.swapaxes(1, 2), v.swapaxes(1, 2), lengths, program.cache, program.backend
        )
        return out, layer

    positions = jnp.broadcast_to(jnp.arange(p), (b, p))
    states: tuple[Any, ...] = (None,) * config.num_layers
    hidden, layers = forward(
        params,
        config,
        prompts,
        positions,
        states,
        attend,
        rope_length=program.cache.max_length,
        backend=program.backend,
    )
    rows = jnp.arange(b)
    logits = unembed(params, hidden[rows, lengths - 1], program.backend)
    in_prompt = positions < lengths[:, None]
    seen = jnp.zeros((b, config.vocab_size), bool).at[rows[:, None], prompts].max(in_prompt)
    token, _ = choose(logits, seen, sampling, keys, lengths, Role.TARGET)

    g = program.cache.group_size
    flushed = jnp.zeros_like(lengths)
    if program.cache.view != "full":
        flushed = quantized_length(lengths, g)
    zero = jnp.zeros(b, jnp.int32)
    one = zero + 1
    return DecodeState(
        cache=HierarchicalKVCache(layers, lengths, flushed, g),
        keys=keys,
        seen=seen.at[rows, token].set(True),
        pending=token,
        tokens=jnp.zeros((b, capacity), jnp.int32).at[:, 0].set(token),
        count=one,
        limit=limit,
        finished=(token[:, None] == eos_ids).any(-1) | (one >= limit),
        rounds=zero,
        proposed=zero,
        accepted=zero,
        evidence=jnp.zeros((b, 2), jnp.float32),
    )
