"""The engine at full size: slots that decode at a long context against `quantspec bench decode` of
the same shapes in the same process, and a request that comes while they do.

    python benchmarks/engine.py --preset llama-3.1-8b --context 32768 --output benchmarks/NAME.json

As there the weights are random, the cache of each slot holds random tokens up to the context, and a
proposal is accepted with probability --alpha. `the engine, as the server asks` takes as many rounds
a step as that does.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script

import quantspec_jax as qs
from quantspec_jax.bench import decode
from quantspec_jax.bench.simulated import Simulated
from quantspec_jax.engine.engine import Engine, _Slot
from quantspec_jax.engine.prepare import known_warpers
from quantspec_jax.engine.scheduler import Pace
from quantspec_jax.generate.logprobs import MOST, nothing
from quantspec_jax.generate.sampling import GREEDY
from quantspec_jax.models.module import init_params
from quantspec_jax.models.presets import PRESETS

STEPS = 48  # rounds of a measurement


def bench_args(args: argparse.Namespace) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    given = ["--preset", args.preset, "--context", args.context, "--batch", args.slots]
    given += ["--mode", "quantspec", "--gamma", args.gamma, "--simulate-acceptance", args.alpha]
    given += ["--dtype", args.dtype, "--rounds", STEPS, "--repeat", 1]  # as long as the engine
    return parser.parse_args([str(each) for each in given])


def of_bench(
    model: qs.Model, args: argparse.Namespace, ready: Callable[[], None]
) -> dict[str, Any]:
    """`quantspec bench decode`; `ready` returns when nothing else is compiled."""
    setting = decode.Setting(model, bench_args(args))
    (case,) = decode.cases(["quantspec"], [args.gamma])
    compiled = decode.compile_case(case, setting, args.context)
    ready()
    row = decode.measure(compiled, setting)
    names = ("milliseconds_a_round", "tokens_a_round", "tokens_per_second", "compile_seconds")
    return {"what": "bench decode", "context": args.context, **{name: row[name] for name in names}}


def new_engine(model: qs.Model, args: argparse.Namespace) -> Engine:
    """Whose proposals are accepted as those of `bench decode`."""
    config = qs.GenerateConfig(
        gamma=args.gamma,
        draft_policy="all",  # as the server's drafts, and those of `bench decode`
        prefill="tiles",
        max_length=args.context + 2048,
        max_new_tokens=1024,
        ignore_eos=True,
        logprobs=MOST,
    )
    engine = Engine(model, config, 1, args.slots)
    coupling = Simulated((args.alpha,))
    engine.program = dataclasses.replace(engine.program, coupling=coupling)
    return engine


def new_state(engine: Engine, args: argparse.Namespace) -> qs.DecodeState:
    """What `bench decode` measures."""
    state = decode.random_state(engine.program, args.slots, args.context, engine.capacity, 1 << 20)
    return dataclasses.replace(state, logprobs=nothing(args.slots, engine.capacity, MOST))


def prepare(model: qs.Model, engine: Engine, args: argparse.Namespace) -> None:
    """Compile what the engine decodes with."""
    forms = jax.eval_shape(lambda: new_state(engine, args))
    program = dataclasses.replace(engine.program, warpers=known_warpers(GREEDY))
    engine._runner.prepare(model, forms, program)


def fill(engine: Engine, args: argparse.Namespace) -> None:
    """All slots decode."""
    engine._state = new_state(engine, args)
    engine._slots = [_Slot(GREEDY, None) for _ in range(args.slots)]
    engine._runner.made("cache")
    engine._look()


def stepped(engine: Engine, rounds: int | None, words: str) -> dict[str, Any]:
    """So many rounds a step; None: as the server."""
    pace = Pace(engine)

    def advance() -> None:
        if rounds is None:
            pace.advance()
        else:
            engine.advance(rounds)

    def counted() -> tuple[int, int]:
        return int(engine._seen.count.sum()), int(engine._seen.rounds.max())

    for _ in range(5):
        advance()
    before, decoding, started = counted(), engine.clock.decode, time.perf_counter()
    while counted()[1] - before[1] < STEPS:
        advance()
    seconds = time.perf_counter() - started
    made, number = (now - then for now, then in zip(counted(), before, strict=True))
    return {
        "what": f"the engine, {words}",
        "rounds_a_step": rounds or pace.rounds,
        "milliseconds_a_round": 1e3 * seconds / number,
        "tokens_a_round": made / number / engine.slots,
        "tokens_per_second": made / seconds,
        "share_of_seconds_in_rounds": (engine.clock.decode - decoding) / seconds,
        "compile_seconds": engine.clock.compile,
    }


def first_token(engine: Engine, tokens: int) -> dict[str, Any]:
    """Of a request that takes slot 0 while the others decode."""
    engine.remove(0)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, engine.model.config.vocab_size, tokens).tolist()
    wish = dataclasses.replace(engine.config, max_new_tokens=8, logprobs=None)
    pace, started, steps, longest = Pace(engine), time.perf_counter(), 0, 0.0
    (slot,) = engine.add([prompt], wish)
    while not engine.read(slot).tokens:
        begun = time.perf_counter()
        pace.advance()
        longest, steps = max(longest, time.perf_counter() - begun), steps + 1
    return {
        "what": f"a request of {tokens} tokens beside {engine.slots - 1} that decode",
        "seconds_to_first_token": time.perf_counter() - started,
        "steps": steps,
        "seconds_a_step_longest": longest,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama-3.1-8b")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=0.9)
    script.add_dtype(parser, "bfloat16")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 2048])
    return parser


def main() -> None:
    """Run and record, what is done so far after each step."""
    args = make_parser().parse_args()
    dtype, shapes = jnp.dtype(args.dtype), PRESETS[args.preset]
    model = qs.Model(shapes, init_params(shapes, jax.random.key(0), dtype), None)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(script.show(row))
        script.write(__file__, args, rows, preset=args.preset, weights="random")

    _ = model.draft_params
    engine = new_engine(model, args)
    with ThreadPoolExecutor(1) as compiler:
        preparing = compiler.submit(prepare, model, engine, args)
        add(of_bench(model, args, preparing.result))
    fill(engine, args)
    for rounds, words in ((2, "2 rounds a step"), (None, "as the server asks")):
        row = stepped(engine, rounds, words)
        share = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        by_rounds = rows[0]["milliseconds_a_round"] / row["milliseconds_a_round"]
        more = {"share_of_bench_decode": share, "share_of_its_rounds_a_second": by_rounds}
        add(row | more)
    print("compiling a tile's programs", file=sys.stderr, flush=True)
    first_token(engine, 1)
    for tokens in args.prompts:
        add(first_token(engine, tokens))


if __name__ == "__main__":
    main()
