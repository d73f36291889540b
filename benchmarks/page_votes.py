"""Which pages a draft should read: acceptance by who votes, how votes are pooled, and page size.

    python benchmarks/page_votes.py --model M --text TEXT --context N [--vary age ...] --output FILE

A verification of γ + 1 = 8 rows leaves the attention mass of every page; the drafts of the next
round read the pages with most of it. Teacher-forced, with full weights: the target reads the text
once (8-bit view); a draft at position t reads the target's keys and values below t, of the planes
the chosen pages alone (4-bit view, tile 0 with both planes), and its own at t. The draft at place j
of its round chose by the rows t − j − 1, ..., t − j − 8 of a round all of whose proposals were
accepted. Positions are of the text's last 512, as many as --positions; what comes before them is
the prompt.

    voters     the rows that vote: last, first, first and last, all; `own` is the draft's own query,
               which no selection in advance can beat
    heads      mass is pooled over the query heads of a kv head (sum or max), or of the layer
    decay      of the votes of earlier rounds, a round; 0: they are forgotten
    age        rounds that read the same pages before: the votes are so many rounds older
    prompt     weight of what the prompt's end attends to (as snapkv sees it) beside the
               verification's votes, each summing to 1 over the pages
    recent     share of what is read that goes to the pages before the buffer (one at least)
    page       tokens; a share of them is read: the first page, the one before the buffer, and those
               with most votes
    even       share of what is read that is the same in all layers; the rest goes to the layers
               where the prompt's 32 last queries have most mass that would else not be read
    power      of masses, as the last counts them: above 1, peaks count more than what is spread
    clusters   the tokens of a tile lie in the order of so many clusters of keys (k-means), so that
               smaller pages hold what belongs together; 0: in the order of their positions

Drafts of other policies read as many tokens: `window` the most recent ones, `snapkv` what was coded
after the prompt and the pages that the prompt's 32 last queries attend to (max over 7 tokens, then
summed by page).

    *_error       standard error of a mean over the positions
    over_default  sampled acceptance less that of the votes as they are by default with the same
                  share, at the same positions
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import script

import quantspec_jax as qs
from pallas_kernels.kv_attention.read import Read
from pallas_kernels.rope_append.heads import Heads
from quantspec_jax.bench import record
from quantspec_jax.cache.codecs import CODECS, EXACT_TILES
from quantspec_jax.cache.schedule import quantized_length
from quantspec_jax.evaluate.teacher_forced import Stream, embedded
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import block_params, run_block, unembed
from quantspec_jax.models.rope import rope_frequencies, rope_tables

G, ROWS, AFTER = 128, 8, 512
ROUNDS = 32  # whose votes count, at most
LEAST = 1e-2  # weight of a round that counts
OBSERVED, POOLED = 32, 7  # SnapKV's window and kernel
BLOCK = G  # queries at a time
CLUSTERS = (0, 8, 16)
PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Votes:
    """A draft: what it reads of the planes."""

    share: float = 0.25
    place: int = 3
    voters: str = "all"
    heads: str = "kv sum"
    decay: float = 0.0
    age: int = 0
    prompt: float = 0.0
    recent: float = 0.0
    page: int = 128
    clusters: int = 0
    whole_layers: int = 0  # the first layers read everything
    even: float = 1.0
    power: float = 1.0


PLACES = (0, 3, 6)
VARIED: dict[str, list[dict[str, Any]]] = {
    "policy": [{"voters": voters} for voters in ("window", "snapkv", "own")],
    "voters": [
        *({"voters": v, "place": j} for v in ("all", "last", "first and last") for j in PLACES),
        {"voters": "first"},
    ],
    "heads": [{"heads": heads} for heads in ("kv max", "layer")],
    "decay": [{"decay": decay} for decay in (0.5, 0.7, 0.9)],
    "age": [{"age": age, "place": j} for age in (0, 1, 2, 3, 5, 7, 11, 15) for j in PLACES],
    "prompt": [{"prompt": weight} for weight in (0.25, 1.0)],
    "recent": [{"recent": share} for share in (0.25, 0.5, 0.75)],
    "page": [{"page": page} for page in (64, 32, 16)],
    "clusters": [
        *({"page": 16, "clusters": c} for c in CLUSTERS[1:]),
        {"page": 32, "clusters": 8},
    ],
    "whole": [{"whole_layers": 2}],
    "even": [
        {"even": 0.5},
        {"even": 0.5, "power": 2.0},
    ],
}


def drafts(vary: Sequence[str]) -> list[Votes]:
    """One thing changed at a time."""
    found = [Votes(share=1, voters="own", place=0)]
    for share in (0.25, 0.125):
        found.append(Votes(share))
        found += [dataclasses.replace(Votes(share), **x) for name in vary for x in VARIED[name]]
    return list(dict.fromkeys(found))


class Forms(NamedTuple):
    """What drafts are of, together: the least page, and numbers of clusters in a tile."""

    finest: int
    clusters: tuple[int, ...]

    @classmethod
    def of(cls, drafts: Iterable[Votes]) -> Forms:
        found = list(drafts)
        return cls(min(x.page for x in found), tuple(sorted({0, *(x.clusters for x in found)})))


class Masses(NamedTuple):
    """Attention mass [T, H, T/finest] of the target's queries in the least pages, by how tokens are
    ordered; and of the prompt's last queries a token, [K, T]."""

    by_order: tuple[jax.Array, ...]
    observed: jax.Array


class Held(NamedTuple):
    """A layer's keys and values as they are read, [K, T, D]: in full, by both planes, by the upper
    one (tile 0 by both); and the orders of tokens, [K, T] each."""

    full: tuple[jax.Array, jax.Array]
    target: tuple[jax.Array, jax.Array]
    draft: tuple[jax.Array, jax.Array]
    orders: tuple[jax.Array, ...]


def clustered(keys: jax.Array, clusters: int) -> jax.Array:
    """[K, T, D] → [K, T] int32: the tokens, those of each tile in the order of k-means clusters."""
    k, t, d = keys.shape
    tiles = keys.reshape(k, t // G, G, d)
    centers = tiles[:, :, :: G // clusters]

    def labels(centers: jax.Array) -> jax.Array:
        score = jnp.einsum("ktgd,ktcd->ktgc", tiles, centers)
        return jnp.argmax(score - (centers**2).sum(-1)[:, :, None] / 2, -1)

    def step(_: int, centers: jax.Array) -> jax.Array:
        member = jax.nn.one_hot(labels(centers), clusters)
        total = jnp.einsum("ktgc,ktgd->ktcd", member, tiles)
        count = member.sum(2)[..., None]
        return jnp.where(count > 0, total / jnp.maximum(count, 1), centers)

    order = jnp.argsort(labels(jax.lax.fori_loop(0, 10, step, centers)), -1)
    return (order + G * jnp.arange(t // G)[None, :, None]).reshape(k, t)


def held(keys: jax.Array, values: jax.Array, forms: Forms) -> Held:
    """[T, K, D] keys after RoPE and values."""
    full, codec = tuple(x.swapaxes(0, 1)[None] for x in (keys, values)), CODECS["hierarchical"]
    target, draft = (codec.decoded(*full, Read(*x), G) for x in (("int8",), ("int4", EXACT_TILES)))
    plain = jnp.broadcast_to(jnp.arange(len(keys)), (keys.shape[1], len(keys)))
    orders = [plain, *(clustered(target[0][0], c) for c in forms.clusters[1:])]
    return Held(*(tuple(x[0] for x in pair) for pair in (full, target, draft)), tuple(orders))


def attend_target(q: jax.Array, layer: Held, prompt: int, finest: int) -> tuple[jax.Array, Masses]:
    """[T, H, D] queries over the target's view → output [T, H, D] and masses."""
    t, h, d = q.shape
    k = layer.full[0].shape[0]
    blocks = q.reshape(t // BLOCK, BLOCK, k, h // k, d)

    token = jnp.arange(t)

    def one(block: tuple[jax.Array, jax.Array]) -> Any:
        query, begin = block
        position = begin + jnp.arange(BLOCK)
        coded = token < quantized_length(begin, G)  # as long as a tile, a block has one buffer
        keys, values = (
            jnp.where(coded[:, None], *both) for both in zip(layer.target, layer.full, strict=True)
        )
        scores = jnp.einsum("skrd,ktd->krst", query, keys, precision=PRECISION) * d**-0.5
        p = jax.nn.softmax(jnp.where(token <= position[:, None], scores, -jnp.inf), -1)
        out = jnp.einsum("krst,ktd->skrd", p, values, precision=PRECISION)
        read = jnp.where(coded, p, 0)
        masses = [
            (read if i == 0 else jnp.take_along_axis(read, order[:, None, None], -1))
            .reshape(*p.shape[:-1], t // finest, finest)
            .sum(-1)
            for i, order in enumerate(layer.orders)
        ]
        seen = (position >= prompt - OBSERVED) & (position < prompt)
        observed = jnp.where(seen[None, None, :, None], read, 0).sum((1, 2))
        return out, masses, observed

    begins = BLOCK * jnp.arange(t // BLOCK)
    out, masses, observed = jax.lax.map(one, (blocks, begins))

    def flat(x: jax.Array) -> jax.Array:  # [n, K, R, BLOCK, X] → [T, H, X]
        return jnp.moveaxis(x, 3, 1).reshape(t, h, -1)

    return out.reshape(t, h, d), Masses(tuple(map(flat, masses)), observed.sum(0))


def votes(draft: Votes, masses: Masses, position: jax.Array, heads: int, forms: Forms) -> jax.Array:
    """[N] positions → [N, K, T/page] votes."""
    of_order = masses.by_order[forms.clusters.index(draft.clusters)]
    t, h, _ = of_order.shape
    mass = of_order.reshape(t, h, t // draft.page, -1).sum(-1)
    pooled = jax.lax.reduce_window(
        masses.observed, -jnp.inf, jax.lax.max, (1, POOLED), (1, 1), "SAME"
    )
    of_prompt = pooled.reshape(heads, t // draft.page, draft.page).sum(-1)[None]
    if draft.voters == "snapkv":
        return jnp.broadcast_to(of_prompt, (len(position), *of_prompt.shape[1:]))
    last = position - draft.place - 1 - draft.age * ROWS
    rounds = 1
    while rounds < ROUNDS and draft.decay**rounds >= LEAST:
        rounds += 1
    rows = {"last": [0], "first": [ROWS - 1], "first and last": [0, ROWS - 1]}.get(
        draft.voters, range(ROWS)
    )
    if draft.voters == "own":
        found = mass[position]
    else:
        found = sum(
            draft.decay**k * mass[jnp.maximum(last - k * ROWS - row, 0)]
            for k in range(rounds)
            for row in rows
        )
    pooled = found.reshape(len(position), heads, h // heads, -1)
    by_head = pooled.max(2) if draft.heads == "kv max" else pooled.sum(2)
    if draft.heads == "layer":
        by_head = jnp.broadcast_to(by_head.sum(1, keepdims=True), by_head.shape)
    if draft.prompt:
        shares = [x / x.sum(-1, keepdims=True) for x in (by_head, of_prompt)]
        by_head = shares[0] + draft.prompt * shares[1]
    return by_head


@partial(jax.jit, static_argnames=("draft", "heads", "forms"))
def chosen(
    masses: Masses,
    orders: Any,
    position: Any,
    share: Any,
    *,
    draft: Votes,
    heads: int,
    forms: Forms,
) -> jax.Array:
    """[N, K, T] bool: the tokens of the planes that the draft at a position reads."""
    t = masses.observed.shape[-1]
    coded = quantized_length(position, G)[:, None] // draft.page  # [N, 1]
    pages = t // draft.page
    number = jnp.arange(pages)[None]
    budget = jnp.ceil(share * coded).astype(jnp.int32)
    priority = (
        jnp.broadcast_to(number[:, None].astype(jnp.float32), (len(position), heads, pages))
        if draft.voters == "window"
        else votes(draft, masses, position, heads, forms)
    )
    newest = jnp.maximum(1, jnp.round(draft.recent * budget)).astype(jnp.int32)
    if draft.voters == "snapkv":
        of_prompt = quantized_length(jnp.int32(t - AFTER), G) // draft.page
        newest = jnp.minimum(coded - of_prompt, budget - 1)
    always = (number == 0) | (number >= coded - newest)
    priority = jnp.where(always[:, None], jnp.inf, priority)
    priority = jnp.where((number < coded)[:, None], priority, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-priority, -1), -1)
    by_token = jnp.repeat(rank < budget[:, :, None], draft.page, -1)
    order = orders[forms.clusters.index(draft.clusters)]
    return jnp.take_along_axis(by_token, jnp.argsort(order, -1)[None], -1)


def attend_draft(q: Any, own: Any, layer: Held, read: jax.Array, position: jax.Array) -> jax.Array:
    """[N, H, D] queries with their own keys and values [N, K, D] → [N, H, D]."""
    n, h, d = q.shape
    k, t = layer.full[0].shape[:2]
    query = q.reshape(n, k, h // k, d) * d**-0.5
    bound, first = quantized_length(position, G)[:, None], max(t - AFTER - 2 * G, 0)
    token, last = jnp.arange(t)[None], jnp.arange(first, t)[None]
    buffers = tuple(x[:, first:] for x in layer.full)
    buffered = (last >= bound) & (last < position[:, None])

    def scores(keys: jax.Array, mask: jax.Array) -> jax.Array:
        found = jnp.einsum("nkrd,ktd->nkrt", query, keys, precision=PRECISION)
        return jnp.where(mask, found, -jnp.inf)

    parts = [
        scores(layer.draft[0], ((token < bound)[:, None] & read)[:, :, None]),
        scores(buffers[0], buffered[:, None, None]),
        (query * own[0][:, :, None]).sum(-1)[..., None],
    ]
    p = jax.nn.softmax(jnp.concatenate(parts, -1), -1)
    out = jnp.einsum("nkrt,ktd->nkrd", p[..., :t], layer.draft[1], precision=PRECISION)
    out += jnp.einsum("nkrt,ktd->nkrd", p[..., t:-1], buffers[1], precision=PRECISION)
    return (out + p[..., -1:] * own[1][:, :, None]).reshape(n, h, d)


@partial(jax.jit, static_argnames=("config", "prompt", "forms"))
def target_block(
    block: Any, norm: Any, stream: Stream, *, config: ModelConfig, prompt: int, forms: Forms
) -> Any:
    def attend(_: None, heads: Heads) -> Any:
        q, k, v = heads.finished()
        layer = held(k[0], v[0], forms)
        out, masses = attend_target(q[0], layer, prompt, forms.finest)
        return out[None], (layer, masses)

    rope = tables(config, jnp.arange(stream.x.shape[1])[None])
    x, h, made = run_block(block, norm, config, *stream, rope, None, attend, backend="xla")
    return Stream(x, h), *made


@partial(jax.jit, static_argnames="config")
def draft_block(
    block: Any,
    norm: Any,
    stream: Stream,
    layer: Held,
    read: jax.Array,
    position: jax.Array,
    *,
    config: ModelConfig,
) -> Stream:
    """A draft's stream [1, N, E] through a block."""

    def attend(_: None, heads: Heads) -> Any:
        q, k, v = heads.finished()
        return attend_draft(q[0], (k[0], v[0]), layer, read, position)[None], None

    rope = tables(config, position[None])
    x, h, _ = run_block(block, norm, config, *stream, rope, None, attend, backend="xla")
    return Stream(x, h)


def tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rope_tables(
        *rope_frequencies(config.rope, config.head_dim, config.max_context), positions
    )


@jax.jit
def compared(head: Any, target: jax.Array, draft: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[N, E] hidden states → whether the top tokens agree, and Σ min(p, q)."""
    p, q = (jax.nn.softmax(unembed(head, x, "xla")) for x in (target, draft))
    return jnp.argmax(p, -1) == jnp.argmax(q, -1), jnp.minimum(p, q).sum(-1)


def by_layer(draft: Votes, ends: list[np.ndarray], heads: int, total: int) -> np.ndarray:
    """The share that each layer reads of a text of `total` tokens, the draft's on average: from
    masses [rows, H, T/finest] a layer of the prompt's end."""
    if draft.even == 1:
        return np.full(len(ends), draft.share, np.float32)
    pages = int(quantized_length(jnp.int32(total - AFTER), G)) // draft.page
    mass = np.stack(ends)
    mass = mass.reshape(*mass.shape[:3], total // draft.page, -1).sum(-1)[..., :pages]
    worth = (mass**draft.power).sum(1).reshape(len(ends), heads, -1, pages).sum(2)
    budget = int(np.ceil(draft.share * pages))
    worth[..., 0] = worth[..., -1] = np.inf
    gain = -np.sort(-worth, -1).sum(1)  # of the n-th page in every head of a layer
    gain[:, : max(2, round(draft.even * budget))] = np.inf
    best = np.argsort(-gain.reshape(-1), kind="stable")[: budget * len(ends)]
    number = np.bincount(best // pages, minlength=len(ends))
    return (draft.share * number / budget).astype(np.float32)


def measure(
    model: qs.Model, ids: list[int], positions: int, vary: Sequence[str]
) -> list[dict[str, Any]]:
    """A row a draft."""
    config, t = model.config, len(ids)
    prompt = t - AFTER
    position = jnp.asarray(np.linspace(prompt, t - 1, positions).astype(np.int32))
    tokens = jnp.asarray([ids], jnp.int32)
    target = embedded(model.params, tokens, config)
    streams = {draft: Stream(*(x[:, position] for x in target)) for draft in drafts(vary)}
    forms = Forms.of(streams)
    shares = dict.fromkeys(streams, 0.0)
    layers = []
    for i in range(config.num_layers):
        block, norm = block_params(model.params, i)
        options: Any = {"config": config, "prompt": prompt, "forms": forms}
        target, layer, masses = target_block(block, norm, target, **options)
        layers.append((layer, masses))
        print(f"layer {i + 1} of {config.num_layers}", file=sys.stderr, flush=True)
    of_planes = (jnp.arange(t)[None] < quantized_length(position, G)[:, None])[:, None]
    ends = [np.asarray(x.by_order[0][prompt - OBSERVED : prompt]) for _, x in layers]
    for draft in streams:
        share_of = by_layer(draft, ends, config.num_kv_heads, t)
        for i, (layer, masses) in enumerate(layers):
            block, norm = block_params(model.params, i)
            options = {"draft": draft, "heads": config.num_kv_heads, "forms": forms}
            read = chosen(masses, layer.orders, position, share_of[i], **options)
            read = read | (i < draft.whole_layers)
            call = (block, norm, streams[draft], layer, read, position)
            streams[draft] = draft_block(*call, config=config)
            shares[draft] += float((read & of_planes).sum() / of_planes.sum()) / config.num_kv_heads
        print(draft, file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    said = {
        draft: compared(model.params, target.h[0, position], stream.h[0])
        for draft, stream in streams.items()
    }

    def error(x: jax.Array) -> float:
        return float(x.std() / len(x) ** 0.5)

    for draft, (same, overlap) in said.items():
        over = overlap - said[Votes(draft.share)][1] if draft.share < 1 else jnp.zeros(1)
        rows.append(
            {
                **dataclasses.asdict(draft),
                "place": draft.place + 1,
                "read_share": shares[draft] / config.num_layers,
                "greedy_acceptance": float(same.mean()),
                "sampled_acceptance": float(overlap.mean()),
                "sampled_error": error(overlap),
                "over_default": float(over.mean()),
                "over_default_error": error(over),
            }
        )
        script.show(rows[-1])
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser)
    parser.add_argument("--context", type=int, default=2048, help="a multiple of 128")
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument(
        "--vary", nargs="+", choices=tuple(VARIED), default=list(VARIED), help="what (all)"
    )
    return parser


def main() -> int:
    args = make_parser().parse_args()
    model = qs.load(args.model, dtype="float32", draft=qs.DraftConfig(bits=None))
    rows = measure(model, script.tokens(model, args.text, args.context), args.positions, args.vary)
    name = record.model_name(args.model)
    script.write(__file__, args, rows, model=name, context=args.context, dtype="float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
