"""Acceptance of the draft by how its weights are quantized.

    python benchmarks/draft_weights.py --model M --text A.txt --text B.txt \
        --output benchmarks/NAME.json

Calibrated methods are calibrated on one text and measured on the other, both ways. Finished rows
are kept, and so are calibrations (in the directory --keep): the command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script

import quantspec_jax as qs
from pallas_kernels.rope_append import heads
from quantspec_jax.bench import record
from quantspec_jax.evaluate.measures import accepted
from quantspec_jax.evaluate.teacher_forced import compare
from quantspec_jax.weights.calibrate import calibrate, calibration_tokens
from quantspec_jax.weights.sizes import bits_per_weight

METHODS: dict[str, dict[str, Any]] = {
    "full weights": {"bits": None},
    "round to nearest, symmetric 128": {"group_size": 128, "symmetric": True},
    "round to nearest, asymmetric 128": {"group_size": 128},
    "round to nearest, asymmetric 64": {"group_size": 64},
    "calibrated, asymmetric 128": {"group_size": 128, "method": "gptq"},
    "calibrated, asymmetric 64": {"group_size": 64, "method": "gptq"},
    "calibrated, mixed 4.28": {"average_bits": 4.28, "method": "gptq"},
    "calibrated, mixed 4.5": {"average_bits": 4.5, "method": "gptq"},
    "calibrated, mixed 5": {"average_bits": 5.0, "method": "gptq"},
    "calibrated, asymmetric 64, lm_head": {"method": "gptq", "lm_head_bits": 4},
    "calibrated, asymmetric 64, lm_head after the first 4096": {
        "method": "gptq",
        "lm_head_bits": 4,
        "lm_head_first": 4096,
    },
    # The cache's side, with full weights.
    "full weights, cache group 64": {"bits": None},
    "full weights, rotated keys": {"bits": None},
}


@contextlib.contextmanager
def rotated_keys(on: bool) -> Iterator[None]:
    """Queries and keys turned by a Hadamard matrix after RoPE: their products stay, and outlying
    channels are spread over all."""
    rotate = heads.rotate

    def turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        turn = jnp.asarray(hadamard(x.shape[-1]), jnp.float32)
        x = rotate(x, cos, sin)
        return jnp.matmul(x, turn, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)

    if not on:
        yield
        return
    heads.rotate = turned
    jax.clear_caches()  # what was compiled before does not turn
    try:
        yield
    finally:
        heads.rotate = rotate
        jax.clear_caches()


def hadamard(d: int) -> np.ndarray:
    """[D, D], orthonormal; D a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < d:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    return matrix


def measure(model: qs.Model, ids: list[int], group: int) -> dict[str, float]:
    """As `quantspec eval acceptance`, and the draft's perplexity; positions from a quarter on."""
    seen = compare(model, ids, group_size=group)
    first = len(ids) // 4
    log_prob = seen.draft_log_prob[first:-1].mean(dtype=np.float64)
    return accepted(seen, first) | {"draft_perplexity": float(np.exp(-log_prob))}


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser, several=True)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--chunks", type=int, default=16, help="of calibration text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--keep", type=Path, help="calibrations; default: OUTPUT without .json")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    base = qs.load(args.model, dtype="float32")
    texts = {path.stem: path.read_text(encoding="utf-8")[script.SKIP :] for path in args.text}
    ids = {path.stem: script.tokens(base, path, args.context) for path in args.text}
    rows = script.finished_rows(args.output)
    finished = {(r["method"], r["measured_on"], r["context"]) for r in rows}
    keep = args.keep or args.output.with_suffix("")
    for measured_on in reversed(texts):
        for method in args.method:
            if (method, measured_on, args.context) in finished:
                continue
            begin = time.perf_counter()
            draft, entries, calibrated_on = qs.DraftConfig(**METHODS[method]), None, None
            if draft.method == "gptq":
                (calibrated_on,) = (name for name in texts if name != measured_on)
                tokens = calibration_tokens(
                    base.tokenizer, texts[calibrated_on], chunks=args.chunks, length=args.length
                )
                where = keep / f"{method}, {calibrated_on}".replace(", ", "-").replace(" ", "-")
                draft, entries = calibrate(
                    base.config, base.params, tokens, draft, progress=True, resume=where
                )
                jax.block_until_ready(entries)
            calibrated = time.perf_counter()
            model = qs.Model(base.config, base.params, base.tokenizer, draft, entries)
            with rotated_keys("rotated" in method):
                measured = measure(
                    model,
                    ids[measured_on],
                    64 if "cache group 64" in method else 128,
                )
            row = {
                "method": method,
                "draft_bits_per_weight": bits_per_weight(base.config, draft),
                "calibrated_on": calibrated_on,
                "calibration_tokens": args.chunks * args.length if calibrated_on else None,
                "measured_on": measured_on,
                "context": args.context,
                **measured,
                "calibration_seconds": calibrated - begin if calibrated_on else None,
            }
            rows.append(script.show(row))
            script.write(__file__, args, rows, model=record.model_name(args.model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
