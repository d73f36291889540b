"""`quantspec bench prefill`: long prompts at full size, from tokens to the quantized cache.

The model has the shapes of a preset, random weights and a random prompt. The prompt runs block by
block, each filling its layer of the cache, and logits are computed for its last position alone.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantspec_jax.api import backend_in_use
from quantspec_jax.bench import record
from quantspec_jax.bench.decode import GROUP_SIZE
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.checks import require
from quantspec_jax.cost import linear_weights
from quantspec_jax.dtypes import float_type
from quantspec_jax.generate.config import BACKENDS, GenerateConfig
from quantspec_jax.generate.prefill import COMPILED, prefill
from quantspec_jax.generate.requests import requests
from quantspec_jax.generate.state import PromptProgram
from quantspec_jax.memory import require_memory, temporary_bytes, tree_bytes
from quantspec_jax.models.attention import uses_cudnn
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.module import init_params
from quantspec_jax.models.parameters import Params, parameter_count
from quantspec_jax.models.presets import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `quantspec bench prefill`."""
    parser.add_argument("--preset", choices=sorted(PRESETS), nargs="+", default=["llama-2-7b"])
    parser.add_argument("--context", type=int, nargs="+", default=[32768], help="prompt tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--repeat", type=int, default=3, help="measurements; the median counts")
    parser.add_argument("--output", metavar="FILE", help="write the run as JSON")


def measure(
    preset: str, model: ModelConfig, params: Params, context: int, args: Any
) -> dict[str, Any]:
    """Milliseconds and memory of one prompt of `context` tokens in each of the batch."""
    batch, dtype = args.batch, params["embedding"].dtype
    cache = CacheConfig(min(context + 2 * GROUP_SIZE, model.max_context), dtype=dtype)
    program = PromptProgram(model, cache.arrays, backend=args.backend)
    call = (
        params,
        jax.random.randint(jax.random.key(0), (batch, context), 0, model.vocab_size, jnp.int32),
        jnp.full(batch, context, jnp.int32),
        requests(GenerateConfig(max_new_tokens=GROUP_SIZE), jax.random.key(1), (), batch),
    )
    run_prefill = functools.partial(prefill, program=program, capacity=GROUP_SIZE)
    shapes = jax.eval_shape(run_prefill, *call)
    weights, state = tree_bytes(params), tree_bytes(shapes)
    what = f"a prompt of {context} tokens, batch {batch},"
    hidden = 2 * batch * context * model.hidden_size * dtype.itemsize
    parts = {"weights": weights, "cache": state, "temporaries": hidden}
    require_memory(what, parts, weights)
    compiled: dict[Any, Any] = {}

    def run(stage: Any, *arrays: Any, **static: Any) -> Any:
        if stage not in compiled:
            compiled[stage] = COMPILED[stage].lower(*arrays, **static).compile()
            found = hidden + temporary_bytes(compiled[stage])
            parts["temporaries"] = max(parts["temporaries"], found)
        return compiled[stage](*arrays)

    seconds = []
    for _ in range(args.repeat + 1):  # the first one compiles
        begin = time.perf_counter()
        jax.block_until_ready(run_prefill(*call, run=run))
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[1:])
    return {
        "preset": preset,
        "context": context,
        "batch": batch,
        "milliseconds": 1e3 * median,
        "tokens_per_second": batch * context / median,
        "tflop_per_second": batch * _operations(model, context) / median / 1e12,
        "attention": attention_in_use(model, dtype, args.backend),
        "state_bytes": state,
        "temporary_bytes": parts["temporaries"],
        "peak_bytes": sum(parts.values()),
        "first_run_seconds": seconds[0],
    }


def _operations(model: ModelConfig, context: int) -> float:
    """Multiplications and additions of a prompt; a token attends to half of it on average."""
    products = 2 * linear_weights(model) * context
    return products + 2 * model.num_layers * model.num_heads * model.head_dim * context**2


def attention_in_use(model: ModelConfig, dtype: np.dtype, backend: str) -> str:
    """What the prompt's attention runs in."""
    return "cudnn" if uses_cudnn(dtype, model.head_dim, backend) else "xla"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every preset at every context that it has."""
    require(args.batch >= 1, "--batch", args.batch, "an integer ≥ 1")
    require(args.repeat >= 1, "--repeat", args.repeat, "an integer ≥ 1")
    require(min(args.context) >= 1, "--context", args.context, "integers ≥ 1")
    longest = min(PRESETS[preset].max_context for preset in args.preset)
    require(max(args.context) <= longest, "--context", max(args.context), f"at most {longest}")
    backend, dtype = backend_in_use(args.backend), float_type(args.dtype)
    rows = []
    for preset in args.preset:
        model = PRESETS[preset]
        size = parameter_count(model) * dtype.itemsize
        require_memory(preset, {"weights": size})
        params = init_params(model, jax.random.key(0), dtype)
        for context in args.context:
            rows.append(measure(preset, model, params, context, args))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
        del params
    result = {"weights": "random", "dtype": args.dtype, "backend": backend}
    if args.output:
        record.write(
            Path(args.output), record.command("quantspec bench prefill", args), rows, **result
        )
    device = {"device": record.device_name(), "versions": record.versions()}
    return {**result, **device, "rows": rows}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['preset']} {row['context']:>7} {row['milliseconds']:10.1f} ms, "
        f"{row['tokens_per_second']:.0f} tokens/s, peak {row['peak_bytes'] / 2**30:.2f} GiB"
    )
