"""Decoding after a long real prompt: QuantSpec beside autoregressive decoding, in one run.

    python benchmarks/real_text.py --model M --text TEXT --output benchmarks/NAME.json

Greedy. Every mode decodes the same prompt twice; the second run is measured, so that nothing is
compiled in it. `tokens_as_int8` counts how many tokens agree with autoregressive decoding that
reads the same int8 view, up to the first that does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import takewhile
from pathlib import Path

import quantspec_jax as qs
from quantspec_jax.bench import record

SKIP = 20_000  # characters
MEASURED = (
    "prefill_seconds",
    "decode_seconds",
    "decode_tokens_per_second",
    "acceptance_rate",
    "tokens_per_round",
)


def modes(gammas: list[int]) -> dict[str, dict]:
    """What to compare, by name; int8 first, which the others are held against."""
    plain = {
        f"autoregressive {kv}": {"mode": "autoregressive", "kv": kv} for kv in ("int8", "full")
    }
    return plain | {f"quantspec, gamma {g}": {"gamma": g} for g in gammas}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=7600)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--gamma", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()

    model = qs.load(args.model, dtype=args.dtype)
    text = args.text.read_text(encoding="utf-8")[SKIP:]
    prompt = model.tokenizer(text)["input_ids"][: args.prompt_tokens]
    rows, int8 = [], []
    for name, options in modes(args.gamma).items():
        config = qs.GenerateConfig(
            max_new_tokens=args.new_tokens, ignore_eos=True, rounds_per_chunk=1024, **options
        )
        for _ in range(2):
            out = qs.generate(model, prompt, config)
        tokens, stats = out.tokens[0], out.stats[0]
        int8 = int8 or tokens
        agreeing = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, int8, strict=True))
        rows.append(
            {
                "mode": name,
                "prompt_tokens": len(prompt),
                "new_tokens": len(tokens),
                "tokens_as_int8": len(list(agreeing)),
                **{key: stats[key] for key in MEASURED},
                "cache_bytes": stats["cache_bytes"]["total"],
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    start = "python benchmarks/real_text.py --model M --text TEXT --output FILE"
    command = record.command(start, args)
    more = {"model": Path(args.model).stem, "text": args.text.stem, "dtype": args.dtype}
    record.write(args.output, command, rows, **more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
