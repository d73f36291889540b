"""A text through the cache, G tokens at a time, each position seeing what decoding would.

All positions of block b, which are bG … bG + G − 1, read the planes below G·max(0, b − 1):

    target   appends the block's keys and values to a half of the buffer, then attends causally
    draft    at each position reads the target's keys and values before it, and its own at it
    flush    F1 → planes

Logits exist for one block at a time; what is kept of them is a few numbers a position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.kv_attention.api import Read, kv_attention
from quantspec_jax.cache import KVCache, LayerCache, create, flush
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.generate.cache_pass import cache_pass
from quantspec_jax.generate.config import Backend
from quantspec_jax.generate.state import Program
from quantspec_jax.loading import Model
from quantspec_jax.models.decoder import forward, unembed
from quantspec_jax.models.parameters import Params


class Scores(NamedTuple):
    """Of each position: log_prob [N] of the token that follows in the text, top [N] token."""

    log_prob: Any
    top: Any


class Overlap(NamedTuple):
    """Of each position: top [N] of the target, draft_top [N], overlap [N] = Σ min(p, q), and what
    each gives the token that follows in the text, log_prob [N] and draft_log_prob [N]."""

    top: Any
    draft_top: Any
    overlap: Any
    log_prob: Any
    draft_log_prob: Any


def score(
    model: Model,
    ids: Sequence[int],
    view: str,
    *,
    group_size: int = 128,
    backend: Backend = "auto",
    progress: bool = False,
) -> Scores:
    """How the model that reads `view` of its cache predicts each token of a text after the first.

    The last position predicts nothing of the text; its log_prob means nothing.
    """
    program = _program(model, len(ids), view, group_size, backend)
    following = _blocks([*ids[1:], 0], group_size)

    def step(cache: KVCache, i: int, tokens: jax.Array) -> Any:
        return _score_block(model.params, cache, tokens, following[i], program=program)

    return Scores(*_walk(step, model, program, ids, f"{view} cache" if progress else None))


def compare(
    model: Model,
    ids: Sequence[int],
    *,
    group_size: int = 128,
    backend: Backend = "auto",
    progress: bool = False,
) -> Overlap:
    """What draft and target say after each position of a text, the target's cache before it.

    The last position predicts nothing of the text; its log-probabilities mean nothing.
    """
    drafts = [model.draft_params]
    return compare_drafts(
        model, drafts, ids, group_size=group_size, backend=backend, progress=progress
    )[0]


def compare_drafts(
    model: Model,
    drafts: Sequence[Params],
    ids: Sequence[int],
    *,
    group_size: int = 128,
    backend: Backend = "auto",
    progress: bool = False,
) -> list[Overlap]:
    """`compare` for several drafts of one model, whose target runs once.

    Args:
      drafts: their whole trees, as `Model.draft_params`.
    """
    program = _program(model, len(ids), "int8", group_size, backend)
    following = _blocks([*ids[1:], 0], group_size)

    def step(cache: KVCache, i: int, tokens: jax.Array) -> Any:
        cache, logits = _target_block(model.params, cache, tokens, program=program)
        compared = [
            _draft_block(draft, cache, tokens, logits, following[i], program=program)
            for draft in drafts
        ]
        return _flush_block(cache, program=program), [x for each in compared for x in each]

    title = "draft and target" if len(drafts) == 1 else f"{len(drafts)} drafts and target"
    found = _walk(step, model, program, ids, title if progress else None)
    width = len(Overlap._fields)
    return [Overlap(*found[i : i + width]) for i in range(0, len(found), width)]


def _program(model: Model, length: int, view: str, group_size: int, backend: Backend) -> Program:
    cache = CacheConfig(
        max_length=length,
        group_size=group_size,
        view=view,
        pass_width=group_size,
        dtype=model.dtype,
    )
    return Program(model.config, cache, 0, backend=backend)


def _blocks(ids: Sequence[int], group_size: int) -> np.ndarray:
    """[blocks, 1, G] int32, filled up with token 0, which no position that counts sees."""
    filled = np.zeros(-(-len(ids) // group_size) * group_size, np.int32)
    filled[: len(ids)] = ids
    return filled.reshape(-1, 1, group_size)


def _walk(
    step: Callable[[KVCache, int, jax.Array], tuple[KVCache, Any]],
    model: Model,
    program: Program,
    ids: Sequence[int],
    title: str | None,
) -> list[np.ndarray]:
    """Run `step` over the blocks of a text; its numbers [N], one array for each it returns."""
    # Committed to the parameters' device, as what a step returns is: else it is compiled twice.
    device = model.params["embedding"].sharding
    cache = jax.device_put(create(program.model, program.cache, 1), device)
    parts = []
    with tqdm(total=len(ids), desc=title, unit=" tokens", disable=title is None) as bar:
        for i, tokens in enumerate(_blocks(ids, program.cache.group_size)):
            cache, numbers = step(cache, i, tokens)
            parts.append(jax.device_get(numbers))
            bar.update(min(tokens.size, len(ids) - bar.n))
    return [np.concatenate(part)[: len(ids)] for part in zip(*parts, strict=True)]


@partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _score_block(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    following: jax.Array,
    *,
    program: Program,
) -> tuple[KVCache, Scores]:
    logits, layers = _target(params, program, cache, tokens)
    log_probs = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_probs, following[0][:, None], 1)[:, 0]
    return _advance(cache, layers, program), Scores(log_prob, jnp.argmax(logits, -1))


@partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _target_block(
    params: Params, cache: KVCache, tokens: jax.Array, *, program: Program
) -> tuple[KVCache, jax.Array]:
    """The cache with the block appended, its length as before; logits [G, N]."""
    logits, layers = _target(params, program, cache, tokens)
    return dataclasses.replace(cache, layers=layers), logits


@partial(jax.jit, static_argnames="program")
def _draft_block(
    draft_params: Params,
    cache: KVCache,
    tokens: jax.Array,
    logits: jax.Array,
    following: jax.Array,
    *,
    program: Program,
) -> Overlap:
    """The draft on what `_target_block` returned."""
    drafted = _draft(draft_params, program, cache, cache.layers, tokens)
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(drafted)

    def at(log_probs: jax.Array) -> jax.Array:
        return jnp.take_along_axis(log_probs, following[0][:, None], 1)[:, 0]

    return Overlap(
        jnp.argmax(logits, -1),
        jnp.argmax(drafted, -1),
        jnp.minimum(jnp.exp(log_p), jnp.exp(log_q)).sum(-1),
        at(log_p),
        at(log_q),
    )


@partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _flush_block(cache: KVCache, *, program: Program) -> KVCache:
    return _advance(cache, cache.layers, program)


def _target(
    params: Params, program: Program, cache: KVCache, tokens: jax.Array
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """The target on a block: logits [G, N] and the layers with the block appended."""
    logits, cache = cache_pass(params, program, cache, tokens, cache.length, program.cache.view)
    return logits[0], cache.layers


def _draft(
    params: Params,
    program: Program,
    cache: KVCache,
    layers: tuple[LayerCache, ...],
    tokens: jax.Array,
) -> jax.Array:
    """The draft on a block that the target has appended to `layers`: logits [G, N]."""
    sm_scale = program.model.head_dim**-0.5

    def attend(
        layer: LayerCache, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        before, log_sum_exp = kv_attention(
            q,
            layer,
            cache.quantized_length,
            cache.length,
            read=Read("int4"),
            sm_scale=sm_scale,
            strict=True,
            backend=program.backend,
        )
        return with_own(before, log_sum_exp, q, k, v, sm_scale), layer

    hidden, _ = forward(
        params,
        program.model,
        tokens,
        cache.length[:, None] + jnp.arange(tokens.shape[1]),
        layers,
        attend,
        rope_length=program.cache.max_length,
        backend=program.backend,
    )
    return unembed(params, hidden, program.backend)[0]


def with_own(
    before: jax.Array,
    log_sum_exp: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sm_scale: float,
) -> jax.Array:
    """Add each token's own key and value to its attention over the tokens before it.

    Args:
      before: [B, S, H, D] float32; log_sum_exp: [B, S, H] of its scores, −∞ where it saw nothing.
      q: [B, S, H, D]; k, v: [B, S, K, D].

    Returns:
      [B, S, H, D] float32.
    """
    repeats = q.shape[2] // k.shape[2]
    key, value = (jnp.repeat(x.astype(jnp.float32), repeats, 2) for x in (k, v))
    score = (q.astype(jnp.float32) * key).sum(-1) * sm_scale
    share = jax.nn.sigmoid(score - log_sum_exp)[..., None]  # eˢ / (eˢ + Σ of the scores before)
    return before + share * (value - before)


def _advance(cache: KVCache, layers: tuple[LayerCache, ...], program: Program) -> KVCache:
    """The cache after a block: G tokens longer, flushed."""
    length = cache.length + program.cache.group_size
    cache = dataclasses.replace(cache, layers=layers, length=length)
    return flush(cache, program.backend)
