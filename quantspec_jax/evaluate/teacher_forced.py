"""A text through the model a layer at a time, all its positions at once, each seeing what decoding
would.

The target's hidden states and the draft's go through a block, then both through the next:

    target   position t reads its own tokens before t, those of the planes as its view has them
    draft    the target's keys and values before t, as the draft's view has them, and its own at t

A block is one program for all layers. Of a draft's weights one layer at a time is held unpacked.
Logits exist for a few positions at a time; what is kept of them is a few numbers a position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.kv_attention.read import Read
from pallas_kernels.layout import PackedWeight
from quantspec_jax.cache.codecs import CODECS
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.cache.sequence import attend_coded
from quantspec_jax.evaluate.pages import pages_at_positions
from quantspec_jax.generate.config import Backend
from quantspec_jax.generate.policies import ALL, Policy
from quantspec_jax.loading import Model
from quantspec_jax.models.attention import Tokens
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import block_params, embed, run_block, unembed
from quantspec_jax.models.linear import unpacked
from quantspec_jax.models.parameters import LINEAR_LAYERS, Params
from quantspec_jax.models.projection import Projection
from quantspec_jax.models.rope import rope_frequencies, rope_tables

ROWS = 128  # positions whose logits exist at a time
TARGET, DRAFT = CODECS["hierarchical"].views[0], CODECS["hierarchical"].draft


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


class Stream(NamedTuple):
    """The residual stream and its norm that the next block reads, [1, T, E]."""

    x: jax.Array
    h: jax.Array


@dataclasses.dataclass(frozen=True)
class Reader:
    """Everything static about a pass over a text: the model, and what of the cache it reads."""

    model: ModelConfig
    cache: CacheConfig
    read: Read
    backend: Backend

    def reading(self, read: Read) -> Reader:
        """The same pass, reading something else."""
        return dataclasses.replace(self, read=read)


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
    reader = _reader(model, len(ids), view, group_size, backend)
    with _Bar(len(ids), model.config, f"{view} cache" if progress else None) as bar:
        target, _ = _through(model, [], ids, reader, reader, bar)
        return _by_position(_scores, lm_head_of(model.params), target, ids)


def compare(
    model: Model,
    ids: Sequence[int],
    *,
    policy: Policy = ALL,
    draft_read: Read = DRAFT,
    first: int = 1,
    group_size: int = 128,
    backend: Backend = "auto",
    progress: bool = False,
) -> Overlap:
    """What draft and target say after each position of a text, the target's cache before it;
    `policy`, `draft_read` and `first` as in `compare_drafts`.

    The last position predicts nothing of the text; its log-probabilities mean nothing.
    """
    drafts = [model.draft_params]
    return compare_drafts(
        model,
        drafts,
        ids,
        policies=[policy],
        draft_read=draft_read,
        first=first,
        group_size=group_size,
        backend=backend,
        progress=progress,
    )[0]


def compare_drafts(
    model: Model,
    drafts: Sequence[Params],
    ids: Sequence[int],
    *,
    target_view: str = TARGET,
    draft_read: Read = DRAFT,
    policies: Sequence[Policy] | None = None,
    first: int = 1,
    group_size: int = 128,
    backend: Backend = "auto",
    progress: bool = False,
) -> list[Overlap]:
    """`compare` for several drafts of one model, whose target runs once.

    Args:
      drafts: their whole trees, as `Model.draft_params`.
      target_view, draft_read: what either reads of the cache.
      policies: which pages of it each draft reads (`evaluate.pages`); None: all of them.
      first: where the prompt ends that policies look at.
    """
    policies = [ALL] * len(drafts) if policies is None else policies
    reader = _reader(model, len(ids), target_view, group_size, backend)
    title = "draft and target" if len(drafts) == 1 else f"{len(drafts)} drafts and target"
    with _Bar(len(ids), model.config, title if progress else None) as bar:
        reading = reader.reading(draft_read)
        both = list(zip(drafts, policies, strict=True))
        target, streams = _through(model, both, ids, reader, reading, bar, first)
        heads = (lm_head_of(model.params), [lm_head_of(draft) for draft in drafts])
        return _by_position(_overlaps, heads, (target, streams), ids)


def _reader(model: Model, length: int, view: str, group_size: int, backend: Backend) -> Reader:
    cache = CacheConfig(length, group_size, view, pass_width=1, dtype=model.dtype)
    return Reader(model.config, cache, Read(view), backend)


class _Bar:
    """A bar of tokens that moves a layer at a time; the logits are a layer more."""

    def __init__(self, tokens: int, model: ModelConfig, title: str | None):
        self.tokens, self.layers, self.done = tokens, model.num_layers + 1, 0
        self.bar = tqdm(total=tokens, desc=title, unit=" tokens", disable=title is None)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, failed: Any, *_: Any) -> None:
        if failed is None:
            self.layer(None)
        self.bar.close()

    def layer(self, results: Any) -> None:
        """A layer is done when its results are there."""
        jax.block_until_ready(results)
        self.done += 1
        self.bar.update(self.tokens * self.done // self.layers - self.bar.n)


def _through(
    model: Model,
    drafts: Sequence[tuple[Params, Policy]],
    ids: Sequence[int],
    target_reader: Reader,
    draft_reader: Reader,
    bar: _Bar,
    first: int = 1,
) -> tuple[jax.Array, list[jax.Array]]:
    """The hidden states [1, T, E] of target and drafts after the last norm."""
    target = embedded(model.params, jnp.asarray([ids], jnp.int32), model.config)
    streams = [target] * len(drafts)
    for i in range(model.config.num_layers):
        block, norm = block_params(model.params, i)
        target, (q, past) = _block(block, norm, target, None, None, reader=target_reader)
        pages = {policy: _pages(policy, q, past, target_reader, first) for _, policy in drafts}
        for n, (draft, policy) in enumerate(drafts):
            own = _unpacked_block(draft["layers"][str(i)], block)
            call = (own, norm, streams[n], past, pages[policy])
            streams[n], _ = _block(*call, reader=draft_reader)
        bar.layer((target, streams))
    return target.h, [stream.h for stream in streams]


def embedded(params: Mapping[str, Any], tokens: jax.Array, config: ModelConfig) -> Stream:
    """[B, T] tokens as the first block reads them."""
    read = {"embedding": params["embedding"], "layers": {"0": params["layers"]["0"]}}
    return _embed(read, tokens, config=config)


@partial(jax.jit, static_argnames="config")
def _embed(params: Params, tokens: jax.Array, *, config: ModelConfig) -> Stream:
    return Stream(*embed(params, config, tokens))


def _pages(
    policy: Policy, q: jax.Array, past: Tokens, reader: Reader, first: int
) -> jax.Array | None:
    """[1, T, K, T/G] bool, what a policy reads of a layer, from the target's queries, keys and
    values there; None: all."""
    if policy == ALL:
        return None
    g, sm_scale = reader.cache.group_size, reader.model.head_dim**-0.5
    coded = _coded(past, reader=reader)
    sizes = {"first": first, "group_size": g, "sm_scale": sm_scale}
    return pages_at_positions(q, past, coded, policy=policy, **sizes)


@partial(jax.jit, static_argnames="reader")
def _coded(past: Tokens, *, reader: Reader) -> Tokens:
    """What is read of keys and values once they are coded."""
    by_head = (past.keys.swapaxes(1, 2), past.values.swapaxes(1, 2))
    decoded = reader.cache.codec.decoded(*by_head, reader.read, reader.cache.group_size)
    return Tokens(*(x.swapaxes(1, 2) for x in decoded))


@partial(jax.jit, static_argnames="reader")
def _block(
    block: Params,
    next_norm: jax.Array,
    stream: Stream,
    past: Tokens | None,
    pages: jax.Array | None,
    *,
    reader: Reader,
) -> tuple[Stream, tuple[jax.Array, Tokens]]:
    """A stream through a block. `past`: keys and values that the cache has, None: the stream's own,
    which are returned after its queries. `pages`: of those that are coded, which each position
    reads; None: all."""
    config, cache = reader.model, reader.cache

    def attend(
        past: Tokens | None, heads: Projection
    ) -> tuple[jax.Array, tuple[jax.Array, Tokens]]:
        q, k, v = heads.finished()
        own = Tokens(k, v)
        held = own if past is None else past
        sizes = {"group_size": cache.group_size, "sm_scale": config.head_dim**-0.5}
        out = attend_coded(q, own, held, read=reader.read, pages=pages, **sizes)
        return out, (q, held)

    frequencies = rope_frequencies(config.rope, config.head_dim, cache.max_length)
    rope = rope_tables(*frequencies, jnp.arange(stream.x.shape[1])[None])
    x, h, held = run_block(
        block, next_norm, config, *stream, rope, past, attend, backend=reader.backend
    )
    return Stream(x, h), held


def _unpacked_block(draft: Params, block: Params) -> Params:
    """A draft's block with its packed kernels as arrays like those of the target's block."""
    return draft | {name: _unpacked_layer(draft[name], block[name]) for name in LINEAR_LAYERS}


def _unpacked_layer(weights: Params, target: Params) -> Params:
    """A draft's linear layer with one array for its kernel, of the target's shape and type."""
    if not isinstance(weights["kernel"], PackedWeight):
        return weights
    packed = {name: weights[name] for name in ("kernel", "residual", "order") if name in weights}
    kernel = target["kernel"]
    plain = {"kernel": _unpack(packed, kernel.shape[0], kernel.dtype)}
    return plain | ({"bias": weights["bias"]} if "bias" in weights else {})


@partial(jax.jit, static_argnums=(1, 2))
def _unpack(weights: Params, inputs: int, dtype: np.dtype) -> jax.Array:
    return unpacked(weights, inputs).astype(dtype)


def lm_head_of(params: Params) -> Params:
    """What `unembed` reads, with one array for the kernel."""
    if "lm_head" not in params:
        return {"embedding": params["embedding"]}
    embedding = params["embedding"]
    like = {"kernel": jax.ShapeDtypeStruct(embedding.shape[::-1], embedding.dtype)}
    head = params["lm_head"]
    first = {"first": head["first"]} if "first" in head else {}
    return {"lm_head": _unpacked_layer(head, like) | first}


def _by_position(measure: Any, heads: Any, hidden: Any, ids: Sequence[int]) -> Any:
    """What `measure` says of each position [T], on the host."""
    following = jnp.asarray([*ids[1:], 0], jnp.int32)
    found = jax.device_get(measure(heads, hidden, following))
    return jax.tree.map(lambda x: x.reshape(-1)[: len(ids)], found)


def in_chunks(measure: Any, hidden: Any, following: jax.Array) -> Any:
    """`measure` of hidden states [1, T, E] and following tokens [T], ROWS positions at a time."""
    t = len(following)
    rows = min(ROWS, t)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, -t % rows), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, rows, *x.shape[1:])

    chunks = jax.tree.map(lambda x: split(x[0]), hidden), split(following)
    return jax.lax.map(lambda chunk: measure(*chunk), chunks)


def at_tokens(log_probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """[R, N] log-probabilities, [R] tokens → [R]."""
    return jnp.take_along_axis(log_probs, tokens[:, None], 1)[:, 0]


@jax.jit
def _scores(head: Params, hidden: jax.Array, following: jax.Array) -> Scores:
    def measure(hidden: jax.Array, following: jax.Array) -> Scores:
        logits = unembed(head, hidden, "xla")
        return Scores(at_tokens(jax.nn.log_softmax(logits), following), jnp.argmax(logits, -1))

    return in_chunks(measure, hidden, following)


@jax.jit
def _overlaps(
    heads: tuple[Params, list[Params]],
    hidden: tuple[jax.Array, list[jax.Array]],
    following: jax.Array,
) -> list[Overlap]:
    def measure(hidden: tuple[jax.Array, list[jax.Array]], following: jax.Array) -> list[Overlap]:
        target = unembed(heads[0], hidden[0], "xla")
        log_p = jax.nn.log_softmax(target)

        def overlap(head: Params, hidden: jax.Array) -> Overlap:
            draft = unembed(head, hidden, "xla")
            log_q = jax.nn.log_softmax(draft)
            return Overlap(
                jnp.argmax(target, -1),
                jnp.argmax(draft, -1),
                jnp.minimum(jnp.exp(log_p), jnp.exp(log_q)).sum(-1),
                at_tokens(log_p, following),
                at_tokens(log_q, following),
            )

        return [overlap(*both) for both in zip(heads[1], hidden[1], strict=True)]

    return in_chunks(measure, hidden, following)
