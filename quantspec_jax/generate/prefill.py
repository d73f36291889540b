"""From prompts to the state before the first round."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.shapes import Each, Ids, shaped
from quantspec_jax.cache import KVCache, LayerCache, from_prompt
from quantspec_jax.generate.logprobs import nothing, score
from quantspec_jax.generate.lookup import look
from quantspec_jax.generate.recoded import recode_prompt
from quantspec_jax.generate.requests import Requests, is_end
from quantspec_jax.generate.sampling import Role, choose, not_finite
from quantspec_jax.generate.split import own_tiles, split
from quantspec_jax.generate.state import STATISTICS, DecodeState, PromptProgram
from quantspec_jax.models.attention import part_of_prompt_attention, prompt_attention, uses_cudnn
from quantspec_jax.models.decoder import block_params, embed, run_block, unembed
from quantspec_jax.models.parameters import Params
from quantspec_jax.models.projection import Projection
from quantspec_jax.models.rope import rope_frequencies, rope_tables

# run(stage, *arrays, **static): how `prefill` calls its stages.
Run = Callable[..., Any]


def inline(stage: Callable[..., Any], *args: Any, **static: Any) -> Any:
    """Stages as parts of the caller's program."""
    return stage(*args, **static)


@shaped
def prefill(
    params: Params,
    prompts: Ids,
    lengths: Each,
    requests: Requests,
    *,
    program: PromptProgram,
    capacity: int,
    logprobs: int | None = None,
    lookup: int = 0,
    run: Run = inline,
) -> DecodeState:
    """Run the prompts in full precision, fill the cache layer by layer and choose the first token.

    A pure function of arrays. Its stages, `begin`, `layer` for each block and `end`, are called by
    `run`, which may compile each of them: then all blocks are one small program, and the host sees
    how far the prompt is.

    Args:
      prompts: [B, P] int32, padded on the right; lengths: [B] int32, from 1 to P.
      requests: what the sequences want.
      program: `Program.prompt`.
      capacity: M, how many new tokens the state has room for.
      logprobs: how many alternatives it has room for at each; None: it keeps no log-probabilities.
      lookup: `Program.lookup` of its rounds; 0: it does not keep the text.
    """
    x, h = run(begin, params, prompts, program=program)
    layers, observed, below = [], [], None
    for i in range(program.model.num_layers):
        x, h, made, seen = run(layer, *block_params(params, i), x, h, lengths, program=program)
        if program.cache.codec.recodes:
            call = (params["kv"][i], made, below, prompts, lengths)
            made, below = run(recode_prompt, *call, program=program)
        layers.append(made)
        observed.append(seen)
    room: dict[str, Any] = {"program": program, "capacity": capacity, "logprobs": logprobs}
    room |= {"lookup": lookup}
    state = run(end, params, prompts, h, lengths, requests, **room)
    memory = () if observed[0] is None else run(remember, observed, lengths, program=program)
    cache = dataclasses.replace(state.cache, layers=tuple(layers))
    return dataclasses.replace(state, cache=cache, memory=memory)


@split("params batch", "rows rows")
def begin(
    params: Params, prompts: jax.Array, *, program: PromptProgram
) -> tuple[jax.Array, jax.Array]:
    """[B, P] prompts → the residual stream and its norm before the first block, [B, P, E]."""
    axes, missing = program.axes, program.axes.prompt_rows(prompts.shape[1]) - prompts.shape[1]
    prompts = axes.own_rows(jnp.pad(prompts, ((0, 0), (0, missing))))
    return embed(params, program.model, prompts, axes)


@split("block whole rows rows batch", "rows rows layer pages")
def layer(
    block: Params,
    next_norm: jax.Array,
    x: jax.Array,
    h: jax.Array,
    lengths: jax.Array,
    *,
    program: PromptProgram,
) -> tuple[jax.Array, jax.Array, LayerCache, jax.Array | None]:
    """One block on whole prompts: the stream and its norm after it, the layer's cache, and what the
    draft policy wants to know of it (`Policy.observe`)."""
    config, cache, axes = program.model, program.cache, program.axes
    sm_scale = config.head_dim**-0.5

    def attend(_: None, heads: Projection) -> tuple[jax.Array, tuple[LayerCache, jax.Array | None]]:
        q, k, v = heads.finished()
        if axes.cp > 1:
            both = axes.all_rows(jnp.stack([k, v], 2))
            k, v = both[:, :, 0], both[:, :, 1]
            by_heads = uses_cudnn(q.dtype, config.head_dim, program.backend)
            every = axes.all_rows(q) if by_heads or program.policy.observes else q
            if by_heads:  # cuDNN's log-sum-exps come rounded to bfloat16: too coarse to merge by
                out = attention_by_heads(every, k, v, sm_scale, program)
            else:
                part = jnp.int32(axes.part("cp"))
                out = part_of_prompt_attention(q, k, v, sm_scale, part, axes.cp)
            q = every
        else:
            out = prompt_attention(q, k, v, sm_scale, program.backend)
        made = from_prompt(
            k.swapaxes(1, 2), v.swapaxes(1, 2), lengths, program.cache, program.backend
        )
        sizes = {"group_size": cache.group_size, "tiles": cache.num_tiles}
        seen = program.policy.observe(q, k, lengths, sm_scale=sm_scale, **sizes)
        made = own_tiles(made, axes.dealt)
        seen = None if seen is None else axes.dealt(seen)
        # The next block waits for this one's planes: else XLA, given all blocks at once, may keep
        # their keys and values in full precision (64 GiB of Llama-2-7B's at 131,072 tokens).
        out, made, seen = jax.lax.optimization_barrier((out, made, seen))
        return out, (made, seen)

    positions = axes.own_rows(jnp.arange(x.shape[1] * axes.cp, dtype=jnp.int32)[None])
    positions = jnp.broadcast_to(positions, x.shape[:2])
    frequencies = rope_frequencies(config.rope, config.head_dim, program.cache.max_length)
    rope = rope_tables(*frequencies, positions)
    options: dict[str, Any] = {"backend": program.backend, "axes": axes}
    x, h, (made, seen) = run_block(block, next_norm, config, x, h, rope, None, attend, **options)
    return x, h, made, seen


def attention_by_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, sm_scale: float, program: PromptProgram
) -> jax.Array:
    """`prompt_attention` of all rows, some heads on each device of `cp` where these divide them
    (DeepSpeed-Ulysses, arXiv 2309.14509); of the result a device's own rows."""
    axes = program.axes
    shared = k.shape[2] % axes.cp == 0

    def own(x: jax.Array) -> jax.Array:
        size = x.shape[2] // axes.cp
        return jax.lax.dynamic_slice_in_dim(x, axes.part("cp") * size, size, 2) if shared else x

    out = prompt_attention(own(q), own(k), own(v), sm_scale, program.backend)
    if shared:
        out = jax.lax.all_gather(out, "cp", axis=2, tiled=True)
    return axes.own_rows(out)


@split("pages batch", "memory")
def remember(observed: Sequence[jax.Array], lengths: jax.Array, *, program: PromptProgram) -> Any:
    """What the draft policy remembers of prompts of these lengths, from what it found in each layer
    (`Policy.start`)."""
    g = program.cache.group_size
    coded = program.cache.codec.quantized_length(lengths, g) // g
    return program.policy.start(observed, program.axes.tiles_before(coded))


@split("params batch rows batch batch", "state")
def end(
    params: Params,
    prompts: jax.Array,
    hidden: jax.Array,
    lengths: jax.Array,
    requests: Requests,
    *,
    program: PromptProgram,
    capacity: int,
    logprobs: int | None = None,
    lookup: int = 0,
) -> DecodeState:
    """The first token, from [B, P, E] hidden states after the final norm, and the state before the
    first round, the cache's layers left out."""
    b, p = prompts.shape
    rows = jnp.arange(b)
    last = program.axes.row_at(hidden, lengths - 1)
    logits = unembed(params, last, program.backend, program.axes)
    in_prompt = jnp.arange(p)[None] < lengths[:, None]
    seen = jnp.zeros((b, program.model.vocab_size), bool)
    seen = seen.at[rows[:, None], prompts].max(in_prompt)
    options: dict[str, Any] = {"capacity": capacity, "logprobs": logprobs, "lookup": lookup}
    return first_state(logits, seen, prompts, lengths, requests, program=program, **options)


def first_state(
    logits: jax.Array,
    seen: jax.Array,
    prompts: jax.Array,
    lengths: jax.Array,
    requests: Requests,
    *,
    program: PromptProgram,
    capacity: int,
    logprobs: int | None = None,
    lookup: int = 0,
) -> DecodeState:
    """The state before the first round, the cache's layers left out, from the target's logits
    [B, N] after the prompts [B, P], of whose tokens the set is `seen` [B, N]."""
    b = len(lengths)
    rows = jnp.arange(b)
    broken = not_finite(logits)
    call = (logits, seen, requests.sampling, requests.keys, lengths, Role.TARGET)
    token, _ = choose(*call, backend=program.backend)
    scores = None
    if logprobs is not None:
        first = score(logits[:, None], token[:, None], logprobs)
        room = nothing(b, capacity, logprobs)
        scores = jax.tree.map(lambda rows, new: rows.at[:, :1].set(new), room, first)

    copies = None
    if lookup:
        text = jnp.zeros((b, program.cache.max_length), jnp.int32)
        text = text.at[:, : prompts.shape[1]].set(prompts).at[rows, lengths].set(token)
        copies = look(text, lengths, lookup)

    codec, g = program.cache.codec, program.cache.group_size
    one = jnp.ones(b, jnp.int32)
    return DecodeState(
        cache=KVCache((), lengths, codec.quantized_length(lengths, g), g, codec),
        requests=requests,
        memory=(),
        seen=seen.at[rows, token].set(True),
        pending=token,
        tokens=jnp.zeros((b, capacity), jnp.int32).at[:, 0].set(token),
        count=one - broken.astype(jnp.int32),
        finished=is_end(token[:, None], requests.eos_ids)[:, 0] | (one >= requests.limit) | broken,
        broken=broken,
        rounds=jnp.zeros(b, jnp.int32),
        statistics=jnp.zeros((b, STATISTICS), jnp.int32),
        drafted=jnp.zeros((b, capacity), bool),
        logprobs=scores,
        lookup=copies,
    )


# The stages as programs of their own.
COMPILED: dict[Callable[..., Any], Any] = {
    begin: jax.jit(begin, static_argnames="program"),
    layer: jax.jit(layer, static_argnames="program", donate_argnames=("x", "h")),
    recode_prompt: jax.jit(recode_prompt, static_argnames="program", donate_argnames="layer"),
    remember: jax.jit(remember, static_argnames="program"),
    end: jax.jit(end, static_argnames=("program", "capacity", "logprobs", "lookup")),
}
