"""How long calibrating a draft takes a block, at full size with random weights.

    python benchmarks/calibration.py --preset llama-2-7b --output benchmarks/NAME.json

Two blocks or more are calibrated; the first one compiles, so the whole model is reckoned from the
others.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from unittest import mock

import jax
import script

from quantspec_jax.models.module import init_params
from quantspec_jax.models.presets import PRESETS
from quantspec_jax.weights.calibrate import calibrate, resume
from quantspec_jax.weights.formats import DraftConfig


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama-2-7b")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    script.add_dtype(parser, "bfloat16")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    whole = PRESETS[args.preset]
    model = dataclasses.replace(whole, num_layers=args.blocks)
    params = jax.block_until_ready(init_params(model, jax.random.key(0), args.dtype))
    shape = (args.chunks, args.length)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, model.vocab_size)
    ends = []

    class Timed(resume.Finished):
        def save(self, name: str, entries: dict) -> None:
            jax.block_until_ready(entries)
            ends.append(time.perf_counter())
            print(name, file=sys.stderr, flush=True)

    begin = time.perf_counter()
    with mock.patch.object(resume, "Finished", Timed):
        calibrate(model, params, tokens, DraftConfig(method="gptq"))
    seconds = [end - start for start, end in zip([begin, *ends], ends, strict=False)]
    later = sum(seconds[1:]) / len(seconds[1:])
    row = {
        "preset": args.preset,
        "calibration_tokens": args.chunks * args.length,
        "first_block_seconds": seconds[0],
        "later_block_seconds": later,
        "whole_model_minutes": (seconds[0] + later * (whole.num_layers - 1)) / 60,
        "peak_device_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    script.write(__file__, args, [script.show(row)], weights="random", dtype=args.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
