"""What drafts of every policy, view and weights would propose in one and the same text.

    python benchmarks/policy_acceptance.py --model M --text TEXT --context N --output FILE

Texts that policies decode differ after the first tie of two tokens, and one text is accepted more
easily than another by more than policies differ. Here all drafts follow the same tokens: the
novel's own after the prompt (`novel`), and those that the target decodes (`decoded`). A round has
--rows tokens, all of them accepted: each draft reads them one by one over the target's cache, and
what it says after each is held against the verification of the round (greedy: the same top token;
sampled: Σ min(p, q)). What policies remember, they remember as in decoding, from the prompt and the
verifications; each policy is a sequence of one batch. Tokens with which the newest tile is filled
end a round as a flush does.

    share, every   of the coded tokens; rounds that read the same pages
    read_share     what was read, of the coded tokens, on average over the rounds
    tokens         that each draft followed
    *_error        standard error of a mean over the rounds
    over_window    sampled acceptance less that of `window` with the same share on the same tokens;
    over_snapkv    likewise
    by_place       greedy acceptance by place in the round
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import script

import quantspec_jax as qs
from pallas_kernels.kv_attention.read import Pages, Read
from quantspec_jax.bench import reading, record
from quantspec_jax.bench.text import rounds_between_choices
from quantspec_jax.cache import KVCache, flush, rollback
from quantspec_jax.cache.codecs import EXACT_TILES
from quantspec_jax.checks import require
from quantspec_jax.commands.options import DTYPES, add_rope, rope
from quantspec_jax.engine.programs import PROGRAMS
from quantspec_jax.generate.cache_pass import cache_pass, observed_pass
from quantspec_jax.generate.policies import Policy, Sizes, policy
from quantspec_jax.generate.prefill import COMPILED, prefill
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.models.parameters import Params
from quantspec_jax.plotting import check_plot

PLACES = (20_000, 150_000, 300_000, 450_000)
Scores = tuple[jax.Array, jax.Array]


class Draft(NamedTuple):
    """`own` or `full` weights, and the view that is read."""

    weights: str
    view: str

    @property
    def read(self) -> Read:
        return Read(self.view, EXACT_TILES if self.view == "int4" else 0)


def sizes(program: Program) -> Sizes:
    model = program.model
    return Sizes(model.num_layers, model.num_kv_heads, program.cache.num_tiles)


def _padded(pages: Pages, tiles: int) -> Pages:
    width = tiles - pages.tiles.shape[-1]
    return Pages(jnp.pad(pages.tiles, ((0, 0), (0, 0), (0, width))), pages.count)


@partial(jax.jit, static_argnames=("policies", "program"))
def chosen(
    policies: tuple[Policy, ...],
    memories: Any,
    length: jax.Array,
    due: Any,
    old: Any,
    *,
    program: Any,
) -> tuple[Pages, ...]:
    """Lists of every layer, a policy a sequence; those that are not `due` [B] keep the old ones."""
    size, coded = sizes(program), length // program.cache.group_size
    every = jnp.broadcast_to(
        jnp.arange(size.tiles, dtype=jnp.int32), (1, size.kv_heads, size.tiles)
    )
    rows = []
    for each, memory in zip(policies, memories, strict=True):
        found = each.pages(memory, coded[:1], size) or (Pages(every, coded[:1]),) * size.layers
        rows.append([_padded(pages, size.tiles) for pages in found])
    new = tuple(
        jax.tree.map(lambda *x: jnp.concatenate(x), *(row[i] for row in rows))
        for i in range(size.layers)
    )
    if old is None:
        return new
    return jax.tree.map(
        lambda a, b: jnp.where(due.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
    )


@partial(jax.jit, static_argnames=("program", "read"))
def proposed(
    params: Params, cache: KVCache, tokens: jax.Array, pages: Any, *, program: Program, read: Read
) -> jax.Array:
    """[B, S, N] logits of a draft, after each of a round's tokens [S]."""

    def step(cache: KVCache, row: tuple[jax.Array, jax.Array]) -> tuple[KVCache, jax.Array]:
        token, place = row
        given = jnp.broadcast_to(token, (len(cache.length), 1))
        logits, cache = cache_pass(params, program, cache, given, cache.length + place, read, pages)
        return cache, logits[:, 0]

    _, logits = jax.lax.scan(step, cache, (tokens, jnp.arange(len(tokens))))
    return logits.swapaxes(0, 1)


@partial(jax.jit, static_argnames="program")
def verified(params: Params, cache: KVCache, tokens: jax.Array, *, program: Program) -> Any:
    """[S, N] logits of the target, each layer's attention by page, and the cache with
    the tokens."""
    given = jnp.broadcast_to(tokens, (len(cache.length), len(tokens)))
    call = (params, program, cache, given, cache.length, program.read)
    logits, cache, seen = observed_pass(*call, masses=True)
    assert seen is not None
    first = jax.tree.map(lambda x: x[:1], seen)
    return logits[0], first, flush(rollback(cache, cache.length + len(tokens)), program.backend)


@jax.jit
def held_against(target: jax.Array, draft: jax.Array) -> Scores:
    """[B, S]: whether the top tokens agree, and Σ min(p, q)."""
    both = jnp.minimum(jax.nn.softmax(target), jax.nn.softmax(draft)).sum(-1)
    return jnp.argmax(target, -1) == jnp.argmax(draft, -1), both


def prefilled(model: qs.Model, ids: list[int], each: Policy, rows: int, new: int) -> Any:
    """(program, state) after a prompt that the policy has seen."""
    share = None if each.name == "all" else each.share
    config = qs.GenerateConfig(
        max_new_tokens=new + 1, gamma=rows - 1, draft_policy=each.name, draft_share=share
    )
    ready = qs.prepare(model, [ids], config)

    def run(stage: Any, *arrays: Any, **static: Any) -> Any:
        return PROGRAMS.compiled(COMPILED[stage], *arrays, **static)[0](*arrays)

    call = {"program": ready.program.prompt, "capacity": ready.capacity, "run": run}
    return ready.program, prefill(model.params, *ready.inputs, **call)


def remembered(
    model: qs.Model, ids: list[int], policies: tuple[Policy, ...], rows: int, new: int
) -> tuple[Program, DecodeState, list[Any]]:
    """The program and state after a prompt, and what each policy remembers of it."""
    memories: dict[Any, Any] = {}

    def key(each: Policy) -> Any:  # votes are the same whatever share is read by them
        return each.name if each.votes else (each.name, each.share)

    for each in policies:
        if each.observes and key(each) not in memories:
            _, state = prefilled(model, ids, each, rows, new)
            memories[key(each)] = state.memory
    program, state = prefilled(model, ids, policy("all"), rows, new)
    return program, state, [memories.get(key(each), ()) for each in policies]


def follow(
    model: qs.Model,
    ids: list[int],
    text: list[int],
    policies: tuple[Policy, ...],
    drafts: tuple[Draft, ...],
    rows: int,
) -> tuple[dict[Draft, Scores], np.ndarray]:
    """What each draft says of a text after a prompt, [B, rounds, S], and the share of the coded
    tokens that it reads [B, rounds]."""
    program, state, memories = remembered(model, ids, policies, rows, len(text))
    cache = jax.tree.map(lambda x: jnp.repeat(x, len(policies), 0), state.cache)
    weights = {"own": model.draft_params, "full": model.params}
    found: dict[Draft, list[Scores]] = {draft: [] for draft in drafts}
    pages, coded, shares = None, -1, []
    for number, begin in enumerate(range(0, len(text) - rows + 1, rows)):
        now = int(cache.quantized_length[0])
        due = np.array([now != coded or number % (each.every or 1) == 0 for each in policies])
        coded = now
        call = (memories, cache.quantized_length, due, pages)
        pages = chosen(policies, *call, program=program)
        shares.append(np.asarray(pages[0].count) * program.cache.group_size / coded)
        tokens = jnp.asarray(text[begin : begin + rows], jnp.int32)
        if number == 0:  # all programs at once
            _compile(weights, drafts, cache, tokens, pages, program)
        said = {draft: proposed(weights[draft.weights], cache, tokens, pages, program=program,
                                read=draft.read) for draft in drafts}  # fmt: skip
        logits, seen, cache = verified(model.params, cache, tokens, program=program)
        for draft, theirs in said.items():
            found[draft].append(held_against(logits, theirs))
        accepted = jnp.full(1, rows - 1)
        memories = [each.update(memory, seen, accepted) if each.votes else memory
                    for each, memory in zip(policies, memories, strict=True)]  # fmt: skip
    scores = {draft: tuple(np.stack(x, 1) for x in zip(*all_, strict=True))
              for draft, all_ in found.items()}  # fmt: skip
    return scores, np.stack(shares, 1)


def _compile(weights: Any, drafts: Any, cache: Any, tokens: Any, pages: Any, program: Any) -> None:
    """Side by side: the calls find them in JAX's cache of compiled programs."""
    with ThreadPoolExecutor() as pool:
        for draft in drafts:
            call = (weights[draft.weights], cache, tokens, pages)
            pool.submit(proposed, *call, program=program, read=draft.read)
        pool.submit(verified, weights["full"], cache, tokens, program=program)


def decoded(model: qs.Model, ids: list[int], new: int) -> list[int]:
    """The target's greedy text."""
    config = qs.GenerateConfig(
        mode="autoregressive", kv="int8", max_new_tokens=new, ignore_eos=True
    )
    return qs.generate(model, [ids], config).tokens[0]


class Followed(NamedTuple):
    """What drafts said of a text: scores [B, rounds, S], the share that was read [B, rounds]."""

    text: str
    place: int
    scores: dict[Draft, Scores]
    share: np.ndarray


def table(done: list[Followed], policies: tuple[Policy, ...]) -> list[dict[str, Any]]:
    """A row a draft: of each kind of text at all places together, and at each."""
    rows = []
    for kind in dict.fromkeys(each.text for each in done):
        of_kind = [each for each in done if each.text == kind]
        alone = [[each] for each in of_kind] if len(of_kind) > 1 else []
        for group in (of_kind, *alone):
            places = [each.place for each in group]
            head = {"text": kind, "prompts": len(group), "skip_characters": places}
            for draft in group[0].scores:
                rows += [head | row for row in rows_of(group, draft, policies)]
    return rows


def error(means: np.ndarray) -> float:
    """Standard error of the mean of rounds' means."""
    return float(means.std() / len(means) ** 0.5)


def rows_of(
    group: list[Followed], draft: Draft, policies: tuple[Policy, ...]
) -> list[dict[str, Any]]:
    """A row a policy."""
    pairs = zip(*(each.scores[draft] for each in group), strict=True)
    greedy, sampled = (np.concatenate(x, 1) for x in pairs)
    share = np.concatenate([each.share for each in group], 1)
    others = {(each.name, each.share): b for b, each in enumerate(policies)}

    def over(b: int) -> Iterator[tuple[str, float | None]]:
        for name in ("window", "snapkv"):
            other = others.get((name, policies[b].share))
            better = None if other in (None, b) else (sampled[b] - sampled[other]).mean(1)
            yield f"over_{name}", None if better is None else float(better.mean())
            yield f"over_{name}_error", None if better is None else error(better)

    return [
        {
            "weights": draft.weights,
            "view": draft.view,
            "policy": each.name,
            "share": each.share,
            "every": each.every if each.votes else None,
            "read_share": float(share[b].mean()),
            "tokens": greedy[b].size,
            "greedy_acceptance": float(greedy[b].mean()),
            "sampled_acceptance": float(sampled[b].mean()),
            "sampled_error": error(sampled[b].mean(1)),
            **dict(over(b)),
            "by_place": greedy[b].mean(0).tolist(),
        }
        for b, each in enumerate(policies)
    ]


def asked(args: argparse.Namespace) -> Iterator[Policy]:
    for share in args.share:
        for name in args.policy:
            for every in rounds_between_choices(name, args.every):
                yield policy(name, share, every)


def measure(model: qs.Model, args: argparse.Namespace, write: Any) -> None:
    """The table grows with each text."""
    policies = (policy("all"), *asked(args))
    drafts = tuple(Draft(weights, view) for weights in args.weights for view in args.view)
    done: list[Followed] = []
    for kind in args.follow:
        for place in args.place:
            length = args.context + args.new_tokens
            whole = script.tokens(model, args.text, length, place - script.SKIP)
            ids, text = whole[: args.context], whole[args.context :]
            if kind == "decoded":
                text = decoded(model, ids, args.new_tokens)
            scores, share = follow(model, ids, text, policies, drafts, args.rows)
            done.append(Followed(kind, place, scores, share))
            for draft in drafts:
                for row in rows_of(done[-1:], draft, policies):
                    script.show({"text": kind, "place": place, **row})
            write(table(done, policies))


def drawn(rows: list[dict[str, Any]], context: int) -> list[dict[str, Any]]:
    """What `bench.reading.plot` takes: of the first kind of text, over all places, the drafts with
    the draft's own weights."""
    first = [row for row in rows if row["text"] == rows[0]["text"] and row["weights"] == "own"]
    return [
        {
            **row,
            "context": context,
            "gamma": None,
            "temperature": None,
            "acceptance_rate": row["sampled_acceptance"],
            "accepted_by_position": row["by_place"],
            "draft_read_share": row["read_share"],
        }
        for row in first
        if row["prompts"] == rows[0]["prompts"]
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser)
    parser.add_argument("--context", type=int, required=True, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=512, help="tokens that follow (512)")
    parser.add_argument("--place", type=int, nargs="+", default=list(PLACES), help="characters")
    parser.add_argument("--rows", type=int, default=4, help="of a round; divides 128 (4)")
    parser.add_argument("--follow", nargs="+", choices=("novel", "decoded"), default=["novel"])
    choosing = ("window", "snapkv", "top-pages")
    parser.add_argument("--policy", nargs="+", choices=choosing, default=list(choosing))
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--every", type=int, nargs="+", default=[1], help="of top-pages (1)")
    parser.add_argument("--weights", nargs="+", choices=("own", "full"), default=["own"])
    parser.add_argument("--view", nargs="+", choices=("int4", "int8"), default=["int4"])
    parser.add_argument("--dtype", choices=DTYPES, help="the device's own")
    words = "sampled acceptance against what is read, and greedy acceptance by place"
    parser.add_argument("--plot", metavar="FILE", help=f"draw {words}")
    add_rope(parser)
    return parser


def main() -> int:
    args = make_parser().parse_args()
    require(128 % args.rows == 0, "--rows", args.rows, "a divisor of 128")
    plot_path = check_plot(args.plot) if args.plot else None
    model = qs.load(args.model, dtype=args.dtype, rope=rope(args))
    more = {
        "model": record.model_name(args.model),
        "text": args.text.stem,
        "context": args.context,
        "dtype": model.dtype.name,
        "draft": model.draft.describe(),
    }

    def write(rows: list[dict[str, Any]]) -> None:
        script.write(__file__, args, rows, **more)
        if plot_path is not None:
            title = f"{more['model']}, {more['text']}"
            reading.plot(drawn(rows, args.context), model.config, title, plot_path)

    measure(model, args, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
