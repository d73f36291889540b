"""`quantspec bench decode`: the decode loop at full size, every mode side by side in one run.

The model has the shapes of a preset and random weights, and the cache holds random tokens up to the
context: how long a step takes does not depend on their values. Acceptance does, and random weights
have none worth the name: `--simulate-acceptance α` accepts each proposal with probability α instead
(the output says so), all the work of the round being done all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layout import QuantizedWeight
from quantspec_jax.api import backend_in_use
from quantspec_jax.bench import record
from quantspec_jax.cache import HierarchicalKVCache, cache_bytes, create, quantized_length
from quantspec_jax.config import (
    BACKENDS,
    VIEWS,
    CacheConfig,
    DraftConfig,
    GenerateConfig,
    ModelConfig,
    View,
    require,
)
from quantspec_jax.cost import cache_read_bytes, weight_bytes
from quantspec_jax.draft import draft_bytes, merge, quantize_params
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.sampling import sampling_arrays
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.memory import require_memory, temporary_bytes, tree_bytes
from quantspec_jax.models.decoder import Params
from quantspec_jax.models.parameters import nest, parameter_shapes
from quantspec_jax.models.presets import PRESETS

MODES = ("full", "int8", "int4", "draft", "verify", "quantspec")
GROUP_SIZE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `quantspec bench decode`."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama-2-7b")
    parser.add_argument("--context", type=int, nargs="+", default=[32768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--gamma", type=int, nargs="+", default=[4])
    parser.add_argument("--simulate-acceptance", type=float, metavar="ALPHA")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--draft-group", type=int, default=128)
    parser.add_argument("--draft-symmetric", action="store_true")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--rounds", type=int, default=20, help="rounds a measurement")
    parser.add_argument("--repeat", type=int, default=5, help="measurements; the median counts")


def random_params(config: ModelConfig, dtype: str) -> Params:
    """Random weights, made on the device a tensor at a time."""

    @functools.partial(jax.jit, static_argnames="shape")
    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)

    leaves: dict[str, jax.Array] = {}
    for i, (path, spec) in enumerate(parameter_shapes(config).items()):
        ones = path.endswith("norm")
        key = jax.random.fold_in(jax.random.key(0), i)
        leaves[path] = jnp.ones(spec.shape, dtype) if ones else normal(key, spec.shape)
    return nest(leaves)


@functools.partial(jax.jit, static_argnames=("program", "batch", "capacity"))
def random_state(
    program: Program, batch: int, context: jax.Array, capacity: int, limit: jax.Array
) -> DecodeState:
    """A state with `context` random tokens a sequence in the cache."""

    def fill(path: Any, leaf: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(1), hash(jax.tree_util.keystr(path)) % 2**31)
        if leaf.dtype == jnp.uint8:
            return jax.random.bits(key, leaf.shape, jnp.uint8)
        name = jax.tree_util.keystr(path)
        if name.endswith("scale"):
            return jnp.full_like(leaf, 0.25)
        if name.endswith("minimum"):
            return jnp.full_like(leaf, -2.0)
        return jax.random.normal(key, leaf.shape, leaf.dtype)

    empty = create(program.model, program.cache, batch)
    layers = jax.tree_util.tree_map_with_path(fill, empty.layers)
    g = program.cache.group_size
    length = jnp.full(batch, context, jnp.int32)
    full = program.cache.view == "full"
    flushed = jnp.zeros_like(length) if full else quantized_length(length, g)
    zero = jnp.zeros(batch, jnp.int32)
    return DecodeState(
        cache=HierarchicalKVCache(layers, length, flushed, g),
        keys=jax.random.split(jax.random.key(2), batch),
        seen=jnp.zeros((batch, program.model.vocab_size), bool),
        pending=zero + 1,
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        count=zero + 1,
        limit=jnp.full(batch, limit, jnp.int32),
        finished=zero > 0,
        rounds=zero,
        proposed=zero,
        accepted=zero,
        evidence=jnp.zeros((batch, 2), jnp.float32),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to measure: `gamma` 0 decodes a token a pass, `width` rows a pass."""

    name: str
    view: View
    gamma: int
    width: int
    drafts: bool = False  # decodes with the draft's weights alone: what a draft step costs


def cases(modes: list[str], gammas: list[int]) -> list[Case]:
    """The programs of the chosen modes."""
    found = []
    for mode in modes:
        if mode in VIEWS:
            found.append(Case(f"autoregressive {mode}", mode, 0, 1))
        elif mode == "draft":
            found.append(Case("draft step", "int4", 0, 1, drafts=True))
        elif mode == "verify":
            found += [Case(f"verify step, gamma {g}", "int8", 0, g + 1) for g in gammas]
        else:
            found += [Case(f"quantspec, gamma {g}", "int8", g, g + 1) for g in gammas]
    return found


def measure(
    case: Case, model: ModelConfig, params: Params, draft: Params, context: int, args: Any
) -> dict[str, Any]:
    """Milliseconds a round of one case, and what goes with it."""
    cache = CacheConfig(
        context + 2 * GROUP_SIZE + args.rounds * (args.repeat + 1) * (case.gamma + 1),
        GROUP_SIZE,
        case.view,
        case.width,
        args.dtype,
    )
    simulated = args.simulate_acceptance if case.gamma else None
    program = Program(model, cache, case.gamma, args.backend, simulated)

    def make_state() -> DecodeState:
        return random_state(program, args.batch, jnp.int32(context), 128, jnp.int32(1 << 20))

    sampling = sampling_arrays(GenerateConfig(), args.batch)
    step = jax.jit(generate_tokens, static_argnames="program", donate_argnames="state")
    weights = draft if case.drafts else params
    rest = (sampling, jnp.full(1, -1, jnp.int32), jnp.int32(args.rounds))
    own = draft if case.gamma else {}
    shapes = jax.eval_shape(make_state)
    present = {"weights": tree_bytes(params), "draft": _own_bytes(draft)}
    _require_memory(case, context, args, present | {"cache": tree_bytes(shapes)}, present)
    begin = time.perf_counter()
    compiled = step.lower(weights, own, shapes, *rest, program=program).compile()
    compile_seconds = time.perf_counter() - begin
    parts = {"cache": tree_bytes(shapes), "temporaries": temporary_bytes(compiled)}
    _require_memory(case, context, args, present | parts, present)
    memory = compiled.memory_analysis()
    state = make_state()
    sizes = cache_bytes(state.cache, cache.max_length)
    state = jax.block_until_ready(compiled(weights, own, state, *rest))
    before = jax.device_get((state.cache.length, state.accepted, state.proposed))
    seconds = []
    for _ in range(args.repeat):
        begin = time.perf_counter()
        state = jax.block_until_ready(compiled(weights, own, state, *rest))
        seconds.append((time.perf_counter() - begin) / args.rounds)
    after = jax.device_get((state.cache.length, state.accepted, state.proposed))
    made, accepted, proposed = (int((b - a).sum()) for a, b in zip(before, after, strict=True))
    milliseconds = statistics.median(seconds) * 1e3
    tokens = made / (args.rounds * args.repeat)
    return {
        "context": context,
        "batch": args.batch,
        "mode": case.name,
        "milliseconds_a_round": milliseconds,
        "tokens_a_round": tokens / args.batch,
        "tokens_per_second": tokens / milliseconds * 1e3,
        "acceptance": accepted / proposed if proposed else None,
        "acceptance_is_simulated": simulated is not None,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "argument_bytes": memory.argument_size_in_bytes if memory else None,
        "cache_bytes": sizes["total"],
        "compile_seconds": compile_seconds,
        **floor(case, model, params, draft, context, args),
    }


def _require_memory(
    case: Case, context: int, args: Any, parts: dict[str, int], present: dict[str, int]
) -> None:
    what = f"{case.name} at {context} tokens, batch {args.batch},"
    require_memory(what, parts, sum(present.values()))


def _own_bytes(draft: Params) -> int:
    """Bytes of the draft's own arrays."""
    leaves = jax.tree.leaves(draft, is_leaf=lambda x: isinstance(x, QuantizedWeight))
    return tree_bytes([leaf for leaf in leaves if isinstance(leaf, QuantizedWeight)])


def floor(case: Case, model: ModelConfig, params: Params, draft: Params, context: int, args: Any):
    """Fewest bytes of a round: weights and cache, each read once a pass."""
    itemsize = jnp.dtype(args.dtype).itemsize
    target = weight_bytes(draft if case.drafts else params)
    target += args.batch * cache_read_bytes(model, case.view, context, itemsize)
    drafts = 0
    if case.gamma:
        one = weight_bytes(draft) + args.batch * cache_read_bytes(model, "int4", context, itemsize)
        drafts = case.gamma * one
    return {"fewest_bytes_a_round": target + drafts}


def read_ceiling() -> float:
    """Bytes a second that the device reads, measured."""
    if jax.default_backend() != "cpu":
        from quantspec_jax.bench.kernels import measured_ceilings

        return 1e9 * measured_ceilings()["read"]
    x = jnp.ones(1 << 27, jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        total(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return x.nbytes / min(seconds)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every mode at every context."""
    alpha = args.simulate_acceptance
    require(alpha is None or 0 <= alpha <= 1, "--simulate-acceptance", alpha, "0 to 1")
    require(args.batch >= 1, "--batch", args.batch, "an integer ≥ 1")
    require(min(args.gamma) >= 1, "--gamma", args.gamma, "integers ≥ 1")
    require(min(args.context) >= 3 * GROUP_SIZE, "--context", args.context, "384 or more")
    backend = backend_in_use(args.backend)
    model = PRESETS[args.preset]
    longest = max(args.context)
    require(longest <= model.max_context, "--context", longest, f"at most {model.max_context}")
    config = DraftConfig(group_size=args.draft_group, symmetric=args.draft_symmetric)
    weights = sum(spec.size for spec in parameter_shapes(model).values())
    weights *= jnp.dtype(args.dtype).itemsize
    require_memory(args.preset, {"weights": weights, "draft": draft_bytes(model, config)})
    ceiling = read_ceiling()
    params = random_params(model, args.dtype)
    draft = merge(params, quantize_params(params, config))
    rows = []
    for context in args.context:
        for case in cases(args.mode, args.gamma):
            row = measure(case, model, params, draft, context, args)
            least = row["fewest_bytes_a_round"] / ceiling * 1e3
            row |= {"floor_milliseconds": least}
            row |= {"percent_of_floor": 100 * least / row["milliseconds_a_round"]}
            rows.append(row)
            print(_line(row), file=sys.stderr, flush=True)
        _add_speed_up([r for r in rows if r["context"] == context])
    return {
        "preset": args.preset,
        "weights": "random",
        "draft": config.describe(),
        "draft_bytes": _own_bytes(draft),
        "dtype": args.dtype,
        "backend": backend,
        "simulated_acceptance": alpha,
        "read_ceiling_gb_per_second": ceiling / 1e9,
        "device": record.device_name(),
        "versions": record.versions(),
        "rows": rows,
    }


def _add_speed_up(rows: list[dict[str, Any]]) -> None:
    base = [r for r in rows if r["mode"] == "autoregressive full"]
    for row in rows:
        row["speed_up"] = row["tokens_per_second"] / base[0]["tokens_per_second"] if base else None


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['context']:>7} {row['mode']:<24} {row['milliseconds_a_round']:8.2f} ms a round, "
        f"floor {row['floor_milliseconds']:.2f} ({row['percent_of_floor']:.0f}%), "
        f"{row['tokens_per_second']:.1f} tokens/s"
    )
