"""Greedy QuantSpec against autoregressive decoding with the same int8 view.

    python benchmarks/identity.py --model M --text A.txt --text B.txt --output benchmarks/NAME.json

For every γ, 8 prompts alone and in ragged batches of 4: the tokens have to be identical to those of
autoregressive decoding with passes of the same shape (γ + 1 rows, same batch), where XLA's
arithmetic is the same. Against passes of one row, or in bfloat16, a sequence may first differ at a
numerical tie; such places are listed with the gap between the two best logits and with how far the
logits of passes of both shapes lie apart there. Finished cells are kept: the command goes on where
it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import script

import quantspec_jax as qs
from quantspec_jax.cache import flush, rollback
from quantspec_jax.cache.schedule import room
from quantspec_jax.generate.cache_pass import cache_pass

LENGTHS = (1000, 1200, 1500, 1800, 2200, 2700, 3300, 4000)
APART = 30_000  # characters between two prompts of a text


def config(gamma: int, new: int, speculative: bool, max_length: int) -> qs.GenerateConfig:
    """The two sides of a comparison; the passes of both have γ + 1 rows."""
    common = {"max_new_tokens": new, "ignore_eos": True, "max_length": max_length}
    if speculative:
        return qs.GenerateConfig(gamma=gamma, rounds_per_chunk=64, **common)
    return qs.GenerateConfig(
        mode="autoregressive", kv="int8", pass_width=gamma + 1, rounds_per_chunk=64, **common
    )


@functools.partial(jax.jit, static_argnames="program", donate_argnames="cache")
def given_pass(params, cache, tokens, count, *, program):
    """Logits of a pass over given tokens [1, S], `count` of which stay in the cache."""
    start = cache.length
    logits, cache = cache_pass(params, program, cache, tokens, start, program.read)
    return logits, flush(rollback(cache, start + count), program.backend)


def logits_after(
    model: qs.Model, prompt: list[int], tokens: list[int], settings: qs.GenerateConfig
) -> np.ndarray:
    """Logits after a prompt and these new tokens, decoded in passes of the settings' rows."""
    state, program = script.prefilled(model, [prompt], settings)
    cache = state.cache
    rows, group, at = program.cache.pass_width, program.cache.group_size, 0
    while True:
        count = min(rows, room(int(cache.length[0]), group) + 1, len(tokens) - at)
        fed = np.zeros((1, rows), np.int32)
        fed[0, :count] = tokens[at : at + count]
        call = (model.params, cache, jnp.asarray(fed), jnp.int32(count))
        logits, cache = given_pass(*call, program=program)
        at += count
        if at == len(tokens):
            return np.asarray(logits)[0, count - 1]


def tie(model, prompt, ours, theirs, settings, narrow) -> dict | None:
    """Where two runs first differ, how close the two best logits are there, and how far those of
    passes of many rows and of one lie apart, for the same tokens."""
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    if not differing:
        return None
    at = differing[0]
    if at == 0:
        return {"position": 0, "gap": None, "noise": None}
    wide, one_row = (logits_after(model, prompt, ours[:at], s) for s in (settings, narrow))
    best = np.sort(one_row)[-2:]
    return {
        "position": at,
        "gap": float(best[1] - best[0]),
        "noise": float(np.abs(wide - one_row).max()),
    }


def compare(model, inputs, gamma, new, max_length) -> dict:
    """One cell: both sides on the same prompts."""
    begin = time.perf_counter()
    ours = qs.generate(model, inputs, config(gamma, new, True, max_length))
    theirs = qs.generate(model, inputs, config(gamma, new, False, max_length))
    proposed = sum(s["proposed"] for s in ours.stats)
    group = config(gamma, new, True, max_length).group_size
    row = {
        "gamma": gamma,
        "batch": len(inputs),
        "prompt_tokens": [len(p) for p in inputs],
        "new_tokens": new,
        "flushes": [(len(p) + new - 1) // group - len(p) // group for p in inputs],
        "identical": ours.tokens == theirs.tokens,
        "acceptance_rate": sum(s["accepted"] for s in ours.stats) / proposed,
        "tokens_per_round": float(np.mean([s["tokens_per_round"] for s in ours.stats])),
        "seconds": time.perf_counter() - begin,
    }
    return row | {"tokens": ours.tokens, "theirs": theirs.tokens}


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser, several=True)
    parser.add_argument("--gamma", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--new-tokens", type=int, default=600)
    parser.add_argument("--prompts", type=int, nargs="+", default=list(range(len(LENGTHS))))
    script.add_dtype(parser, "float32")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    model = qs.load(args.model, dtype=args.dtype)
    every = script.prompts(model, args.text, LENGTHS, APART)
    max_length = 6144
    rows = script.finished_rows(args.output)
    finished = {(r["gamma"], tuple(r["prompt_tokens"])) for r in rows}
    narrow = config(0, args.new_tokens, False, max_length)
    alone: dict[int, list[int]] = {}
    for gamma in args.gamma:
        for batch in args.batch:
            for first in range(0, len(args.prompts), batch):
                chosen = args.prompts[first : first + batch]
                inputs = [every[i] for i in chosen]
                if (gamma, tuple(map(len, inputs))) in finished:
                    continue
                row = compare(model, inputs, gamma, args.new_tokens, max_length)
                settings = config(gamma, args.new_tokens, False, max_length)
                tokens, same = row.pop("tokens"), row.pop("theirs")
                for i in chosen:
                    if i not in alone:
                        alone[i] = qs.generate(model, [every[i]], narrow).tokens[0]
                for name, others in (
                    ("differs_from_same_rows", same),
                    ("differs_from_one_row", [alone[i] for i in chosen]),
                ):
                    ties = (
                        {"prompt_tokens": len(every[i]), **found}
                        for i, ours, theirs in zip(chosen, tokens, others, strict=True)
                        if (found := tie(model, every[i], ours, theirs, settings, narrow))
                    )
                    row[name] = list(ties)
                rows.append(script.show(row))
                script.write(__file__, args, rows, model=Path(args.model).stem, dtype=args.dtype)
    return 0 if all(row["identical"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
