"""`quantspec bench text`: a real model on a real text, plain decoding and QuantSpec in one run.

    for each context, temperature and case
      for each prompt (the text from another place)     qs.generate, warmed up, then measured
      a row a prompt, and one of all of them            rates of the sums, not means of rates

It calls `load` and `generate` as any user does, with the same defaults: what is measured is what
runs. A case is plain decoding over a view of the cache (`full`, `int8`, ...), or QuantSpec with a
γ, a policy and a coupling. Speed-ups are over `full` with the same prompt and temperature; tokens
are compared with those of `int8`, QuantSpec's target, decoded one at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import quantspec_jax as qs
from pallas_kernels.timing import traced
from quantspec_jax.api import backend_in_use
from quantspec_jax.bench import reading, record
from quantspec_jax.bench.profile import breakdown
from quantspec_jax.cache import KVCache, flush, rollback
from quantspec_jax.cache.codecs import VIEWS
from quantspec_jax.cache.schedule import room
from quantspec_jax.checks import require
from quantspec_jax.commands.options import (
    add_draft,
    add_dtype,
    add_every,
    add_lookup,
    add_mesh,
    add_model,
    add_reading,
    add_rope,
    draft_config,
    gamma,
    given,
    load_model,
    rope,
    seed,
)
from quantspec_jax.engine.adaptive import MOST_DRAFTED
from quantspec_jax.engine.engine import Engine
from quantspec_jax.engine.programs import PROGRAMS
from quantspec_jax.files import check_output
from quantspec_jax.generate.cache_pass import cache_pass
from quantspec_jax.generate.config import BACKENDS, GenerateConfig
from quantspec_jax.generate.couplings import COUPLINGS
from quantspec_jax.generate.policies import POLICIES
from quantspec_jax.generate.prefill import COMPILED, prefill
from quantspec_jax.generate.sampling import Role, draw_keys, penalize
from quantspec_jax.generate.state import Program
from quantspec_jax.loading import Model
from quantspec_jax.memory import device
from quantspec_jax.models.parameters import Params
from quantspec_jax.plotting import check_plot
from quantspec_jax.text.prompts import encode, read_text

QUANTSPEC, BASELINE, TARGET = "quantspec", "full", "int8"
PLACES = (20_000, 300_000)  # characters, two places of a novel
WARPERS = ("top_k", "top_p", "min_p", "repetition_penalty")
TRACED_ROUNDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `quantspec bench text`."""
    add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--context", required=True, type=int, nargs="+", metavar="N", help="tokens of the prompts"
    )
    parser.add_argument(
        "--skip-characters",
        type=int,
        nargs="+",
        default=list(PLACES),
        metavar="N",
        help="where the prompts begin, one a value (20000 300000)",
    )
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="default: 256")
    modes = (BASELINE, TARGET, QUANTSPEC)
    parser.add_argument(
        "--mode",
        choices=tuple(dict.fromkeys((*modes, *VIEWS))),
        nargs="+",
        default=list(modes),
        help="plain decoding over a view of the cache, or quantspec (full int8 quantspec)",
    )
    parser.add_argument(
        "--gamma",
        type=gamma,
        nargs="+",
        default=[2, 4, "auto"],
        metavar="N",
        help="tokens drafted a round, or auto (2 4 auto)",
    )
    add_reading(parser, several=True)
    add_every(parser, nargs="+")
    add_lookup(parser, nargs="+")
    parser.add_argument("--coupling", choices=COUPLINGS, nargs="+", default=["block"])
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[0.0, 0.7],
        metavar="T",
        help="0 is greedy (0 0.7)",
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="0 is off (0)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="1 is off (1)")
    sampling.add_argument("--min-p", type=float, metavar="P", help="0 is off (0)")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is off (1)")
    sampling.add_argument("--seed", type=seed, default=0, metavar="N", help="default: 0")
    add_dtype(parser)
    add_draft(parser)
    add_mesh(parser)
    add_rope(parser)
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="kernels to use (auto)")
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="measurements; the median counts (1)"
    )
    parser.add_argument("--output", metavar="FILE", help="record the run as JSON")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw acceptance against what drafts read of the cache"
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to decode; all but the mode are None where nothing is drafted, and what a draft reads
    also where it is the policy's own and the codec's."""

    mode: str
    gamma: int | str | None = None
    policy: str | None = None
    coupling: str | None = None
    share: float | None = None
    view: str | None = None
    every: int | None = None
    lookup: int | None = None

    def config(self, temperature: float, args: argparse.Namespace) -> GenerateConfig:
        """What `generate` is called with."""
        common = {
            "max_new_tokens": args.new_tokens,
            "ignore_eos": True,
            "temperature": temperature,
            "backend": args.backend,
            **given(args, *WARPERS),
        }
        if self.mode != QUANTSPEC:
            return GenerateConfig(mode="autoregressive", kv=self.mode, **common)
        reads = {"draft_policy": self.policy, "draft_share": self.share}
        reads |= {"draft_view": self.view, "draft_every": self.every, "lookup": self.lookup}
        drafts: dict[str, Any] = {"gamma": self.gamma, "coupling": self.coupling, **reads}
        return GenerateConfig(**drafts, **common)

    @property
    def width(self) -> int:
        """Rows of its target passes."""
        most = MOST_DRAFTED if self.gamma == "auto" else int(self.gamma or 0)
        return max(most, self.lookup or 0) + 1

    def comparable(self, temperature: float) -> bool:
        """Whether its tokens are those of `int8` but for rounding: both are greedy, or draw with
        the same noise."""
        if self.mode != QUANTSPEC:
            return self.mode == TARGET
        return temperature == 0 or self.coupling == "invariant"


def cases(args: argparse.Namespace, temperature: float) -> list[Case]:
    """Plain decoding first, which the others are held against."""
    plain = [Case(mode) for mode in (BASELINE, TARGET) if mode in args.mode]
    plain += [Case(mode) for mode in args.mode if mode not in (BASELINE, TARGET, QUANTSPEC)]
    if QUANTSPEC not in args.mode:
        return plain
    couplings = args.coupling if temperature > 0 else args.coupling[:1]  # greedy, all are the same
    return plain + [
        Case(QUANTSPEC, gamma, policy, coupling, share, view, every, lookup)
        for coupling in couplings
        for policy in args.draft_policy or ["auto"]
        for view in args.draft_view or [None]
        for share in shares(policy, args.draft_share)
        for every in rounds_between_choices(policy, args.draft_every)
        for gamma in args.gamma
        for lookup in args.lookup or [None]
    ]


def rounds_between_choices(policy: str, asked: list[int] | None) -> Sequence[int | None]:
    """Those to measure a policy at: of one whose pages no round changes, none."""
    changes = policy != "auto" and POLICIES[policy].votes
    return [None] if asked is None or not changes else asked


def shares(policy: str, asked: list[float] | None) -> Sequence[float | None]:
    """Those to measure a policy at: of one that chooses none, its own."""
    return [None] if asked is None or policy in ("all", "auto") else asked


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, and the characters of the text before them."""

    place: int
    ids: list[int]


def prompts(text: str, tokenizer: Any, args: argparse.Namespace) -> list[Prompt]:
    """The text from each place on, as many tokens as the longest context."""
    longest, found = max(args.context), []
    for place in args.skip_characters:
        ids = encode(text[place:], tokenizer, "text")
        have = f"{len(ids)} tokens after {place} characters (--skip-characters)"
        require(len(ids) >= longest, args.text, have, f"{longest} (--context) or more")
        found.append(Prompt(place, ids[:longest]))
    return found


@dataclasses.dataclass(frozen=True)
class Run:
    """What a case made of one prompt: the measurement with the median decoding time."""

    prompt: Prompt
    tokens: list[int]
    stats: dict[str, Any]


def measure(
    model: Model, prompt: Prompt, config: GenerateConfig, key: jax.Array, repeat: int
) -> Run:
    """`generate`, `repeat` times."""
    runs = []
    for _ in range(repeat):
        out = qs.generate(model, prompt.ids, config, key)
        runs.append(Run(prompt, out.tokens[0], out.stats[0]))
    return sorted(runs, key=lambda run: run.stats["decode_seconds"])[repeat // 2]


def rates(runs: Sequence[Run]) -> dict[str, Any]:
    """Of all prompts together: the first token of each is the prefill's, and not counted."""

    def total(name: str) -> Any:
        return sum(run.stats[name] for run in runs)

    later = total("new_tokens") - len(runs)
    seconds, rounds, proposed = total("decode_seconds"), total("rounds"), total("proposed")
    return {
        "tokens_per_second": later / seconds,
        "milliseconds_a_round": 1e3 * seconds / rounds,
        "acceptance_rate": total("accepted") / proposed if proposed else None,
        "accepted_by_position": by_position([run.stats["accepted_by_position"] for run in runs]),
        "tokens_per_round": later / rounds,
        "proposed_per_round": proposed / rounds,
        "lookup_rounds": total("lookup_rounds") / rounds,
        "lookup_accepted": total("lookup_accepted") / later,
        "draft_cost": runs[0].stats.get("draft_cost"),
        "prefill_seconds": total("prefill_seconds") / len(runs),
    }


def by_position(shares: Sequence[Sequence[float]]) -> list[float]:
    """Means by place in the round, each over those that got so far."""
    longest = max(map(len, shares))
    reached = [[x[i] for x in shares if len(x) > i] for i in range(longest)]
    return [float(np.mean(x)) for x in reached]


# Where tokens differ from the target's, decoded one at a time.


def agreeing(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens agree up to the first that does not."""
    pairs = zip(ours, theirs, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


@functools.partial(jax.jit, static_argnames="program", donate_argnames="cache")
def given_pass(
    params: Params, cache: KVCache, tokens: jax.Array, count: jax.Array, *, program: Program
) -> tuple[jax.Array, KVCache]:
    """Logits of a pass over given tokens [1, S], `count` of which stay in the cache."""
    start = cache.length
    logits, cache = cache_pass(params, program, cache, tokens, start, program.read)
    return logits, flush(rollback(cache, start + count), program.backend)


def scores_after(
    model: Model, prompt: Prompt, tokens: Sequence[int], config: GenerateConfig, key: jax.Array
) -> np.ndarray:
    """[N] whose largest is the next token after a prompt and new tokens, one or more, decoded in
    passes of `config.pass_width` rows: logits, and where tokens are sampled the position's noise
    on top (top-k, top-p and min-p left out)."""
    ready = qs.prepare(model, [prompt.ids], config, key)
    program, requests = ready.program, ready.inputs[2]

    def run(stage: Any, *arrays: Any, **static: Any) -> Any:
        return PROGRAMS.compiled(COMPILED[stage], *arrays, **static)[0](*arrays)

    cache = prefill(
        model.params, *ready.inputs, program=program.prompt, capacity=ready.capacity, run=run
    ).cache
    rows, at = program.cache.pass_width, 0
    while at < len(tokens):
        left = room(int(cache.length[0]), program.cache.group_size) + 1
        count = min(rows, left, len(tokens) - at)
        fed = np.zeros((1, rows), np.int32)
        fed[0, :count] = tokens[at : at + count]
        call = (model.params, cache, jnp.asarray(fed), jnp.int32(count))
        logits, cache = given_pass(*call, program=program)
        at += count

    seen = np.zeros((1, 1, logits.shape[-1]), bool)
    seen[..., [*prompt.ids, *tokens]] = True
    scores = penalize(logits[:, count - 1, None], jnp.asarray(seen), requests.sampling)[0, 0]
    if config.temperature > 0:
        position = jnp.full(1, len(prompt.ids) + len(tokens), jnp.int32)
        noise_key = draw_keys(requests.keys, position, Role.TARGET)[0]
        scores = scores / config.temperature + jax.random.gumbel(noise_key, scores.shape)
    return np.asarray(scores)


def is_tie(
    model: Model,
    prompt: Prompt,
    ours: Sequence[int],
    theirs: Sequence[int],
    widths: tuple[int, int],
    config: GenerateConfig,
    key: jax.Array,
) -> bool:
    """Whether rounding explains the first difference of two texts of the target: passes of these
    two numbers of rows move a score by so much that the two tokens may change places."""
    at = agreeing(ours, theirs)
    if at == 0:
        return False
    narrow, wide = (
        scores_after(model, prompt, ours[:at], dataclasses.replace(config, pass_width=width), key)
        for width in widths
    )
    gap = abs(narrow[ours[at]] - narrow[theirs[at]])
    return bool(gap <= 2 * np.abs(wide - narrow).max())


def agreement(
    model: Model, case: Case, run: Run, target: Run | None, temperature: float, args: Any
) -> dict[str, int | None]:
    """How far a run's tokens are those of `int8`, and whether a tie ends it."""
    if target is None or not case.comparable(temperature):
        return dict.fromkeys(("tokens_as_int8", "differences", "ties"))
    same = agreeing(run.tokens, target.tokens)
    differs = same < len(target.tokens)
    plain = Case(TARGET).config(temperature, args)
    key, widths = jax.random.key(args.seed), (1, case.width)
    tie = differs and is_tie(model, run.prompt, run.tokens, target.tokens, widths, plain, key)
    return {"tokens_as_int8": same, "differences": int(differs), "ties": int(tie)}


# Where the time goes.


def profile_of(
    model: Model,
    prompt: Prompt,
    config: GenerateConfig,
    key: jax.Array,
    milliseconds_a_round: float,
) -> dict[str, Any]:
    """Launches and milliseconds by kind of kernel, a round: of the program that `generate` runs, in
    the state after its first rounds. None each where there are no kernels, on a CPU."""
    if device().platform == "cpu":
        return {"launches": None, "profile": None}
    engine = Engine(model, config, len(prompt.ids))
    (slot,) = engine.add([prompt.ids], config, key)
    # In pieces of a chunk, which may be all of the text: its γ is the one that was chosen for it.
    engine.step(heard=True)
    before = engine.read(slot).counters.rounds
    kernels = traced(lambda: engine.step(TRACED_ROUNDS, heard=True))
    rounds = engine.read(slot).counters.rounds - before
    if rounds == 0:  # the text was at its end
        return {"launches": None, "profile": None}
    return {
        "launches": len(kernels) / rounds,
        "profile": breakdown(kernels, rounds, milliseconds_a_round),
    }


def peak_bytes() -> int | None:
    """The most that the process had on the device so far, where the device says it."""
    return (device().memory_stats() or {}).get("peak_bytes_in_use")


# Rows.


@dataclasses.dataclass
class Bench:
    """One run of the benchmark."""

    model: Model
    prompts: list[Prompt]
    args: argparse.Namespace
    name: str

    def rows(self, context: int) -> Iterator[list[dict[str, Any]]]:
        """Those of each case at one context, at one temperature after the other."""
        cut = [Prompt(prompt.place, prompt.ids[:context]) for prompt in self.prompts]
        for temperature in self.args.temperature:
            yield from self._at(context, cut, temperature)

    def _at(
        self, context: int, cut: list[Prompt], temperature: float
    ) -> Iterator[list[dict[str, Any]]]:
        found: dict[str, list[Run]] = {}
        for case in cases(self.args, temperature):
            config = case.config(temperature, self.args)
            key = jax.random.key(self.args.seed)
            for prompt in cut:  # compiles, and runs what γ "auto" may choose there a first time
                qs.generate(self.model, prompt.ids, config, key)
            runs = [measure(self.model, p, config, key, self.args.repeat) for p in cut]
            found.setdefault(case.mode, runs)
            compared = [
                agreement(self.model, case, run, target, temperature, self.args)
                for run, target in zip(runs, found.get(TARGET, [None] * len(runs)), strict=True)
            ]
            head = self._head(case, context, temperature)
            rows = _rows(head, runs, found.get(BASELINE), compared)
            milliseconds = rows[-1]["milliseconds_a_round"]
            rows[-1] |= profile_of(self.model, cut[0], config, key, milliseconds)
            print(line(rows[-1]), file=sys.stderr, flush=True)
            yield rows

    def _head(self, case: Case, context: int, temperature: float) -> dict[str, Any]:
        head = {"model": self.name, **dataclasses.asdict(case)}
        return head | {"context": context, "temperature": temperature}


def _rows(
    head: dict[str, Any],
    runs: list[Run],
    baseline: list[Run] | None,
    compared: list[dict[str, int | None]],
) -> list[dict[str, Any]]:
    """A row a prompt, and one of all prompts last; the same row where there is one prompt."""
    alone = [[i] for i in range(len(runs))] if len(runs) > 1 else []
    rows = []
    for group in [*alone, list(range(len(runs)))]:
        made = rates([runs[i] for i in group])
        base = baseline and rates([baseline[i] for i in group])
        together = {name: [compared[i][name] for i in group] for name in compared[0]}
        rows.append(
            {
                **head,
                "prompts": len(group),
                "skip_characters": [runs[i].prompt.place for i in group],
                **made,
                "speed_up": made["tokens_per_second"] / base["tokens_per_second"] if base else None,
                "tokens_as_int8": _total(together["tokens_as_int8"], len(group)),
                "differences": _total(together["differences"]),
                "ties": _total(together["ties"]),
                "draft_read_share": _mean([runs[i].stats.get("draft_read_share") for i in group]),
                "peak_bytes": peak_bytes(),
                "device": record.device_name(),
            }
        )
    return rows


def _total(values: list[Any], of: int = 1) -> Any:
    """Their sum, divided by `of`; None where they are."""
    return None if None in values else sum(values) / of if of > 1 else sum(values)


def _mean(values: list[float | None]) -> float | None:
    """Of those that there are."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    name = row["mode"] if row["gamma"] is None else f"{row['mode']}, gamma {row['gamma']}"
    if row["policy"] not in (None, "all"):
        name += f", {row['policy']}" + ("" if row["share"] is None else f" {row['share']:g}")
        name += "" if row["every"] is None else f" every {row['every']}"
    name += "" if row["view"] is None else f", {row['view']}"
    name += "" if row["lookup"] is None else f", lookup {row['lookup']}"
    more = [f"{row['tokens_per_second']:.1f} tokens/s"]
    if row["speed_up"] is not None:
        more.append(f"{row['speed_up']:.2f} × {BASELINE}")
    if row["acceptance_rate"] is not None:
        more.append(f"acceptance {row['acceptance_rate']:.3f}")
        more.append(f"{row['tokens_per_round']:.2f} tokens a round")
    if row["lookup_rounds"]:
        more.append(f"{row['lookup_accepted']:.0%} copied")
    if row["differences"]:
        more.append(f"{row['differences']} differ from {TARGET}, {row['ties']} at ties")
    kind = f", {row['coupling']}" if row["temperature"] and row["coupling"] else ""
    return (
        f"{row['context']:>7} T {row['temperature']:g} {name + kind:<34} "
        f"{row['milliseconds_a_round']:8.2f} ms a round, {', '.join(more)}"
    )


def check(args: argparse.Namespace) -> None:
    """Raise for what is wrong with the options alone."""
    require(min(args.context) >= 1, "--context", args.context, "integers ≥ 1")
    require(min(args.skip_characters) >= 0, "--skip-characters", args.skip_characters, "0 or more")
    require(args.new_tokens >= 2, "--new-tokens", args.new_tokens, "an integer ≥ 2")
    require(args.repeat >= 1, "--repeat", args.repeat, "an integer ≥ 1")
    check_output(args.output)
    if args.plot:
        check_plot(args.plot)
    rope(args)
    for temperature in args.temperature:
        for case in cases(args, temperature):
            case.config(temperature, args)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every case at every context."""
    check(args)
    draft = draft_config(args)
    text, backend = read_text(args.text, "text file"), backend_in_use(args.backend)
    model = load_model(args, draft)
    limit, needed = model.config.max_context, max(args.context) + args.new_tokens
    words = f"--context {max(args.context)} + --new-tokens {args.new_tokens}"
    require(needed <= limit, words, needed, f"at most {limit}, the model's context")
    bench = Bench(model, prompts(text, model.tokenizer, args), args, record.model_name(args.model))
    rows: list[dict[str, Any]] = []
    result = {
        "text": Path(args.text).stem,
        "dtype": model.dtype.name,
        "draft": model.draft.describe(),
        "backend": backend,
        "new_tokens": args.new_tokens,
    }
    for made in chain.from_iterable(map(bench.rows, args.context)):
        rows += made
        if args.output is not None:  # after each case, so that an interruption loses one at most
            record.write(
                Path(args.output), record.command("quantspec bench text", args), rows, **result
            )
    if args.plot:
        title = f"{bench.name}, {result['text']}, {record.device_name()}"
        together = [row for row in rows if row["prompts"] == len(bench.prompts)]
        reading.plot(together, model.config, title, Path(args.plot))
    return {**result, "versions": record.versions(), "rows": rows}
