"""Requests that come and go: throughput with slots against one after the other, the time to the
first token under load and in a second turn, and a cache that is saved and loaded.

    python benchmarks/serving.py --model M --text T.txt --output benchmarks/NAME.json

All requests come at once. `one after the other` is the same requests in an engine of one slot. The
prompts are parts of the text, of different lengths up to --longest.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import script

import quantspec_jax as qs
from quantspec_jax.bench import record
from quantspec_jax.engine.engine import Engine
from quantspec_jax.engine.prefixes import Prefixes
from quantspec_jax.engine.scheduler import Job, Scheduler
from quantspec_jax.engine.statistics import Clock


def settings(args: argparse.Namespace, length: int) -> qs.GenerateConfig:
    """Of an engine whose sequences have room for so many tokens."""
    gamma = args.gamma if args.gamma == "auto" else int(args.gamma)
    return qs.GenerateConfig(
        prefill="tiles", gamma=gamma, max_length=length, max_new_tokens=length - 1, ignore_eos=True
    )


def load(model: qs.Model, args: argparse.Namespace, slots: int) -> dict[str, Any]:
    """All requests at once over so many slots."""
    ids = script.tokens(model, args.text, 20 * args.longest)
    rng = np.random.default_rng(0)
    length = args.longest + args.new_tokens
    config = settings(args, length)
    scheduler = Scheduler(
        Engine(model, config, 1, slots, Prefixes(args.cache_bytes)), most_waiting=args.requests
    )

    def job(number: int, tokens: int, new: int) -> Job:
        start = int(rng.integers(0, len(ids) - tokens))
        wish = dataclasses.replace(config, max_new_tokens=new)
        prompt = ids[start : start + tokens]
        return Job(
            prompt, wish, lambda: jax.random.split(jax.random.key(number), 1), lambda _: None
        )

    scheduler.submit(job(0, 8, 40))  # compiles
    while scheduler.step():
        pass
    jobs = [
        job(i, int(rng.integers(args.longest // 8, args.longest)), args.new_tokens)
        for i in range(args.requests)
    ]
    scheduler.engine.clock = Clock()
    started = time.perf_counter()
    scheduler.submit(*jobs)
    while scheduler.step():
        pass
    seconds = time.perf_counter() - started
    first = sorted(job.first_token - job.waited for job in jobs)
    new = sum(len(job.reply.tokens) for job in jobs)
    clock = scheduler.engine.clock
    return {
        "what": f"{slots} slots" if slots > 1 else "one after the other",
        "requests": len(jobs),
        "tokens_per_second": new / seconds,
        "seconds": seconds,
        "decode_seconds": clock.decode,
        "prefill_seconds": clock.prefill,
        "first_token_seconds": first[len(first) // 2],
        "first_token_seconds_longest": first[-1],
        "waited_seconds_longest": max(job.waited for job in jobs),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }


def turns(model: qs.Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A long first turn, a short second one, and the cache's file."""
    ids = script.tokens(model, args.text, args.context)
    config = dataclasses.replace(
        settings(args, args.context + 4 * args.new_tokens), max_new_tokens=args.new_tokens
    )

    def seconds_to_first(session: qs.Session, prompt: list[int]) -> tuple[float, qs.Turn]:
        turn = session.generate(prompt)
        return turn.stats["prefill_seconds"], turn

    warm = qs.Session(model, config)
    warm.generate(ids[:200])
    session = qs.Session(model, config)
    first, turn = seconds_to_first(session, ids)
    question = [*ids, *turn.tokens, *model.tokenizer("\nAnd then?\n")["input_ids"]]
    second, again = seconds_to_first(session, question)
    _, fresh = seconds_to_first(qs.Session(model, config), question)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        began = time.perf_counter()
        session.save(path)
        saved = time.perf_counter()
        qs.Session.load(path, model, config)
        loaded = time.perf_counter()
        size = path.stat().st_size
    return [
        {
            "what": "second turn",
            "context": args.context,
            "first_turn_seconds": first,
            "second_turn_seconds": second,
            "cached_tokens": again.stats["cached_tokens"],
            "prompt_tokens": again.stats["prompt_tokens"],
            "same_as_fresh": again.tokens == fresh.tokens,
        },
        {
            "what": "saved cache",
            "context": args.context,
            "save_seconds": saved - began,
            "load_seconds": loaded - saved,
            "prefill_seconds": first,
            "bytes": size,
        },
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser)
    parser.add_argument("--longest", type=int, default=512, help="prompt of what comes at once")
    parser.add_argument("--context", type=int, default=4000, help="of the first turn")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--gamma", default="auto")
    parser.add_argument("--cache-bytes", type=int, default=1 << 30)
    return parser


def main() -> None:
    """Run and record."""
    args = make_parser().parse_args()
    model = qs.load(args.model)
    rows = [script.show(load(model, args, slots)) for slots in (args.slots, 1)]
    rows += [script.show(row) for row in turns(model, args)]
    script.write(__file__, args, rows, model=record.model_name(args.model), dtype=model.dtype.name)


if __name__ == "__main__":
    main()
