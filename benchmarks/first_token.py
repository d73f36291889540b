"""Time from the start of a process to its first token, with and without compiled code on disk.

    python benchmarks/first_token.py --model M --text TEXT --output benchmarks/NAME.json

Each measurement is a process of its own. The cold one starts with an empty compilation cache, the
others find what it left there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import script

from quantspec_jax.bench import record

CHILD = """
import sys, time
import quantspec_jax as qs
model = qs.load(sys.argv[1], dtype=sys.argv[4])
ids = model.tokenizer(open(sys.argv[2], encoding="utf-8").read()[20_000:40_000])["input_ids"]
config = qs.GenerateConfig(max_new_tokens=64, ignore_eos=True)
pieces = qs.stream(model, ids[:int(sys.argv[3])], config)
next(pieces)
print(time.time(), flush=True)
for _ in pieces:
    pass
print(time.time(), flush=True)
"""


def measure(args: argparse.Namespace, cache: str) -> tuple[float, float]:
    """(seconds to the first text, seconds to the end) of a new process."""
    begin = time.time()
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD,
            args.model,
            str(args.text),
            str(args.prompt_tokens),
            args.dtype,
        ],
        env={**os.environ, "QUANTSPEC_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return float(out[0]) - begin, float(out[1]) - begin


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    script.add_dtype(parser, "float32")
    parser.add_argument("--cache", type=Path, help="compiled code of an earlier run; no cold start")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as empty:
        names = ["compiled code on disk", "compiled code on disk, again"]
        for name in names if args.cache else ["cold", *names]:
            first, end = measure(args, str(args.cache or empty))
            row = {
                "what": name,
                "prompt_tokens": args.prompt_tokens,
                "first_token_seconds": first,
                "end_of_64_tokens_seconds": end,
            }
            rows.append(script.show(row))
    script.write(__file__, args, rows, model=record.model_name(args.model), dtype=args.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
