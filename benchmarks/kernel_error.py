"""Errors of the attention kernel on a real model's cache, against float32.

    python benchmarks/kernel_error.py --model M --text TEXT --output benchmarks/NAME.json

A text fills the cache; then one pass reads it, each layer with its own queries, once by the kernel
and once by the XLA reference in float32. An error is ‖kernel − reference‖ / ‖reference‖.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import script

import quantspec_jax as qs
from pallas_kernels.kv_attention.api import kv_attention
from pallas_kernels.kv_attention.read import Read
from pallas_kernels.rope_append.api import rope_append
from quantspec_jax.generate.cache_pass import rope_at
from quantspec_jax.models.decoder import forward


def errors(model: qs.Model, ids: list[int], view: str, tokens: int) -> dict[str, float]:
    """The largest error of all layers, before and after rounding to bfloat16."""
    config = qs.GenerateConfig(max_new_tokens=64)
    state, program = script.prefilled(model, [ids[:-tokens]], config)
    cache = state.cache

    @jax.jit
    def one_pass(params, layers):
        def attend(layer, heads):
            q, layer = rope_append(heads, layer, cache.length)
            call = (layer, cache.quantized_length, cache.length)
            # XLA may keep more of a bfloat16 than its bits, inside one program: not of these.
            q, call = jax.lax.optimization_barrier((q, call))
            options = {"read": Read(view), "sm_scale": model.config.head_dim**-0.5}
            found = kv_attention(q, *call, **options, backend="mosaic_gpu")[0]
            with jax.default_matmul_precision("highest"):
                exact = kv_attention(q, *call, **options, backend="xla")[0]
            scale = jnp.linalg.norm(exact)
            rounded = jax.lax.reduce_precision(found, exponent_bits=8, mantissa_bits=7)
            off = [jnp.linalg.norm(x - exact) / scale for x in (found, rounded)]
            return exact, jnp.stack(off)

        positions = cache.length[:, None] + jnp.arange(tokens)
        last = jnp.array([ids[-tokens:]], jnp.int32)
        rope = rope_at(positions, program)
        return forward(params, model.config, last, rope, layers, attend)[1]

    found = np.stack(jax.device_get(one_pass(model.params, cache.layers)))
    return {"error": float(found[:, 0].max()), "error_after_rounding": float(found[:, 1].max())}


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser)
    parser.add_argument("--context", type=int, default=4000)
    return parser


def main() -> int:
    args = make_parser().parse_args()
    model = qs.load(args.model, dtype="bfloat16")
    ids = script.tokens(model, args.text, args.context)
    rows = []
    for view, tokens in (("int4", 1), ("int8", 1), ("int8", 5), ("int8", 8)):
        found = errors(model, ids, view, tokens)
        row = {"view": view, "query_tokens": tokens, "context": len(ids), **found}
        rows.append(script.show(row))
    script.write(__file__, args, rows, model=Path(args.model).stem, text=args.text.stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
