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
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from pallas_kernels.layout import PackedWeight
from pallas_kernels.timing import traced
from quantspec_jax.api import backend_in_use
from quantspec_jax.axes import Axes
from quantspec_jax.bench import record, tuning
from quantspec_jax.bench.launches import launches_a_round
from quantspec_jax.bench.profile import breakdown
from quantspec_jax.bench.simulated import Simulated
from quantspec_jax.cache import KVCache, cache_bytes, create
from quantspec_jax.cache.codecs import VIEWS, codec_of
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.checks import require
from quantspec_jax.commands.options import add_mesh
from quantspec_jax.commands.options import mesh as mesh_of_options
from quantspec_jax.cost import Costs, bytes_read, cache_read_bytes, weight_bytes
from quantspec_jax.dtypes import float_type
from quantspec_jax.engine.adaptive import MOST_DRAFTED, PRIOR
from quantspec_jax.engine.engine import CHUNK
from quantspec_jax.engine.prepare import draft_policy, known_warpers
from quantspec_jax.engine.programs import DECODE
from quantspec_jax.generate.config import BACKENDS, GenerateConfig
from quantspec_jax.generate.couplings import REJECTION
from quantspec_jax.generate.lookup import unseen
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.policies import POLICIES, Policy
from quantspec_jax.generate.requests import requests
from quantspec_jax.generate.sampling import GREEDY
from quantspec_jax.generate.state import STATISTICS, DecodeState, Program, axes_of
from quantspec_jax.loading import Model
from quantspec_jax.memory import require_memory, temporary_bytes, tree_bytes
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.module import init_params
from quantspec_jax.models.parameters import Params, parameter_count
from quantspec_jax.models.presets import PRESETS
from quantspec_jax.peers import addresses
from quantspec_jax.plotting import check_plot, save, short
from quantspec_jax.sharding import (
    cache_shardings,
    check_draft,
    check_mesh,
    heads_over,
    init_params_over,
    mesh_of,
    state_shardings,
)
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.sizes import draft_bytes

MODES = ("full", "int8", "int4", "draft", "verify", "quantspec")
GROUP_SIZE = 128
TRACED_ROUNDS = 5
SHORTER = 8  # times: the calls beside those measured that say what a call itself takes
SIZES = (128, 1 << 20)  # room for new tokens, and how many there may be: no end is in sight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `quantspec bench decode`."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama-2-7b")
    parser.add_argument("--context", type=int, nargs="+", default=[32768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--gamma", type=gamma, nargs="+", default=[4], help="numbers, or auto")
    parser.add_argument(
        "--simulate-acceptance",
        type=float,
        nargs="+",
        metavar="ALPHA",
        help="of each place of a round where those before were accepted; the last of all beyond",
    )
    parser.add_argument(
        "--draft-policy",
        choices=(*POLICIES, "auto"),
        default="all",
        help="which pages of the cache drafts read; auto: generate's choice at that length (all)",
    )
    parser.add_argument("--draft-share", type=float, metavar="F", help="the policy's own")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--draft-group", type=int, default=128)
    parser.add_argument("--draft-symmetric", action="store_true")
    parser.add_argument("--draft-lm-head-bits", type=int, default=16, help="4 or 16")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="try kernels' configurations in each step first, keep the best in the device's file",
    )
    add_mesh(parser)
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    what = "rounds a measurement, a call; by default as many as a chunk of generate's has"
    parser.add_argument("--rounds", type=int, default=CHUNK, help=what)
    parser.add_argument("--repeat", type=int, default=5, help="measurements; the median counts")
    parser.add_argument("--output", metavar="FILE", help="write the run as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw tokens/s against context")


def gamma(text: str) -> int | str:
    """An option's value: a number of tokens, or auto."""
    return text if text == "auto" else int(text)


@functools.cache
def _maker(
    name: str, shape: tuple[int, ...], dtype: Any, where: Sharding | None
) -> Callable[[jax.Array], jax.Array]:
    """Makes an array of the cache, each device its part; compiled once for all layers."""
    return jax.jit(lambda key: _random_leaf(key, name, shape, dtype), out_shardings=where)


def _random_leaf(key: jax.Array, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if dtype == jnp.uint8:
        return jax.random.bits(key, shape, jnp.uint8)
    if name == "scale":
        return jnp.full(shape, 0.25, dtype)
    if name == "minimum":
        return jnp.full(shape, -2.0, dtype)
    return jax.random.normal(key, shape, dtype)


def random_state(
    program: Program, batch: int, context: int, capacity: int, limit: int
) -> DecodeState:
    """A state with `context` random tokens a sequence in the cache."""

    def fill(path: Any, leaf: jax.ShapeDtypeStruct, where: Sharding | None) -> jax.Array:
        name = jax.tree_util.keystr(path)
        # A checksum, for `hash` differs from process to process.
        key = jax.random.fold_in(jax.random.key(1), zlib.crc32(name.encode()))
        return _maker(name.rpartition(".")[2], leaf.shape, leaf.dtype, where)(key)

    empty = jax.eval_shape(lambda: create(program.model, program.cache, batch))
    parts = (
        jax.tree.map(lambda _: None, empty.layers)
        if program.mesh is None
        else cache_shardings(empty, program.mesh).layers
    )
    layers = jax.tree_util.tree_map_with_path(fill, empty.layers, parts)
    codec, g = program.cache.codec, program.cache.group_size

    def each(value: int, *shape: int, dtype: Any = jnp.int32) -> jax.Array:
        """A number a sequence, in a buffer of its own: the state is donated."""
        return jnp.full((batch, *shape), value, dtype)

    # Pages that a policy chooses lie scattered.
    shape = (batch, program.model.num_kv_heads, program.cache.num_tiles)
    keys = jax.random.split(jax.random.key(3), program.model.num_layers)
    votes = [jax.random.uniform(key, shape) for key in keys]
    coded = codec.quantized_length(each(context), g)
    wants = requests(GenerateConfig(ignore_eos=True), jax.random.key(2), (), batch)
    state = DecodeState(
        cache=KVCache(layers, each(context), coded, g, codec),
        requests=dataclasses.replace(wants, limit=each(limit)),
        memory=program.policy.start(votes, coded // g),
        seen=each(False, program.model.vocab_size, dtype=bool),
        pending=each(1),
        tokens=each(0, capacity),
        count=each(1),
        finished=each(False, dtype=bool),
        broken=each(False, dtype=bool),
        rounds=each(0),
        statistics=each(0, STATISTICS),
        drafted=each(False, capacity, dtype=bool),
        lookup=unseen(batch, program.cache.max_length, program.lookup),
    )
    if program.mesh is None:
        return state
    return jax.device_put(state, state_shardings(state, program.mesh))


def state_forms(program: Program, batch: int, context: int) -> DecodeState:
    """What `Compiled.new_state` makes, as shapes, and where they lie."""
    shapes = jax.eval_shape(lambda: random_state(program, batch, context, *SIZES))
    if program.mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        state_shardings(shapes, program.mesh),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to measure: `gamma` 0 decodes a token a pass, `width` rows a pass. `adaptive`:
    γ is what pays off most at the costs that were measured, `gamma` at most."""

    name: str
    view: str
    gamma: int
    width: int
    drafts: bool = False  # decodes with the draft's weights alone: what a draft step costs
    adaptive: bool = False


def cases(modes: list[str], gammas: list[int | str]) -> list[Case]:
    """The programs of the chosen modes."""
    most = [(g, MOST_DRAFTED if g == "auto" else int(g)) for g in gammas]
    found = []
    for mode in modes:
        if mode in VIEWS:
            found.append(Case(f"autoregressive {mode}", mode, 0, 1))
        elif mode == "draft":
            found.append(Case("draft step", "int4", 0, 1, drafts=True))
        elif mode == "verify":
            found += [Case(f"verify step, gamma {g}", "int8", 0, n + 1) for g, n in most]
        else:
            found += [
                Case(f"quantspec, gamma {g}", "int8", n, n + 1, adaptive=g == "auto")
                for g, n in most
            ]
    return found


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all measurements of a run share."""

    loaded: Model
    args: Any

    @property
    def model(self) -> ModelConfig:
        """The shapes."""
        return self.loaded.config

    @property
    def params(self) -> Params:
        """The target's weights."""
        return self.loaded.params

    @property
    def draft(self) -> Params:
        """The draft's, as `generate` gets them."""
        return self.loaded.draft_params

    @property
    def mesh(self) -> Mesh | None:
        """Of the devices; None: there is one."""
        mesh = mesh_of(self.params)
        return None if mesh.size == 1 else mesh

    @property
    def axes(self) -> Axes:
        """Sizes of the mesh."""
        return axes_of(self.mesh)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in full precision."""
        return self.loaded.dtype.itemsize

    def policy(self, context: int, drafted: int = MOST_DRAFTED) -> Policy:
        """Which pages drafts read there, in rounds that draft so many tokens."""
        return draft_policy(self.loaded, reads(self.args), context, drafted)

    @property
    def alpha(self) -> float | None:
        """The acceptance that is simulated, the mean of the places'."""
        alphas = self.args.simulate_acceptance
        return float(np.mean(alphas)) if alphas else None

    def program(self, case: Case, context: int) -> Program:
        """The case's program, with room for all rounds."""
        args, alphas = self.args, self.args.simulate_acceptance
        rounds = sum(lengths(args)) * args.repeat + args.rounds + TRACED_ROUNDS
        length = context + 2 * GROUP_SIZE + rounds * (case.gamma + 1)
        cp, tiles = self.axes.cp, codec_of(case.view).num_tiles(1, GROUP_SIZE)
        if cp > 1:  # as many tiles a device; of positions that are not coded, a slot to spare
            length = -(-length // (cp * GROUP_SIZE)) * cp * GROUP_SIZE
            length += 0 if tiles else cp - case.width
        return Program(
            self.model,
            CacheConfig(length, GROUP_SIZE, case.view, case.width, self.loaded.dtype),
            case.gamma,
            policy=self.policy(context, case.gamma),
            coupling=Simulated(tuple(alphas)) if case.gamma and alphas else REJECTION,
            warpers=known_warpers(GREEDY),
            backend=args.backend,
            mesh=self.mesh,
        )

    def costs(self, context: int) -> Costs:
        """Bytes that the passes read."""
        return bytes_read(
            self.model,
            self.loaded.draft,
            context,
            batch=self.args.batch,
            itemsize=self.itemsize,
            share=self.policy(context).share,
            axes=self.axes,
        )

    def fewest_bytes(self, case: Case, context: int, drafted: float) -> float:
        """Of a round that drafts so many tokens: a device's weights and cache, each read once a
        pass."""

        def one_pass(weights: Params, view: str, share: float = 1.0) -> int:
            cache = cache_read_bytes(self.model, view, context, self.itemsize, share=share)
            return weight_bytes(weights) + self.args.batch * cache // self.axes.size

        target = one_pass(self.draft if case.drafts else self.params, case.view)
        draft = one_pass(self.draft, "int4", self.policy(context, case.gamma).share)
        return target + (drafted * draft if case.gamma else 0)

    def require_memory(self, case: Case, context: int, more: dict[str, int]) -> None:
        """ValueError unless these parts fit beside the weights."""
        present = {"weights": tree_bytes(self.params), "draft": _own_bytes(self.draft)}
        what = f"{case.name} at {context} tokens, batch {self.args.batch},"
        require_memory(what, present | more, sum(present.values()))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A case's compiled program at one context, and what it is called with."""

    case: Case
    context: int
    program: Program
    call: Callable[..., DecodeState]
    weights: tuple[Params, Params]
    text: str | None  # the optimized program, where there is a device to launch kernels on
    row: dict[str, Any]

    def new_state(self, batch: int) -> DecodeState:
        """Random tokens in the cache, and no end of decoding in sight."""
        return random_state(self.program, batch, self.context, *SIZES)

    def run(self, state: DecodeState, rounds: int) -> DecodeState:
        """So many rounds; `state` is donated."""
        peers = addresses(self.program.mesh)
        return self.call(*self.weights, state, _number(rounds), *peers)


# In the same place each time, as a `Runner` has it.
_number = functools.cache(jnp.int32)


def lengths(args: Any) -> tuple[int, ...]:
    """Rounds of each measurement's calls: of the one that counts, and of a shorter one, where there
    can be one."""
    shorter = args.rounds // SHORTER
    return (args.rounds, shorter) if shorter else (args.rounds,)


def reads(args: argparse.Namespace) -> GenerateConfig:
    """What `generate` would be called with, of what drafts read; ValueError where it is refused."""
    return GenerateConfig(draft_policy=args.draft_policy, draft_share=args.draft_share)


def weights_of(case: Case, setting: Setting) -> tuple[Params, Params]:
    """The target's, or what is measured in their place; and the draft's."""
    target = setting.draft if case.drafts else setting.params
    return target, setting.draft if case.gamma else {}


def tune(case: Case, setting: Setting, context: int) -> tuning.Found:
    """The configurations of a case's kernels that some of its layers take least with."""
    params, few = setting.params, min(tuning.LAYERS, setting.model.num_layers)
    layers = {str(i): params["layers"][str(i)] for i in range(few)}
    model = dataclasses.replace(setting.model, num_layers=few)
    loaded = Model(model, {**params, "layers": layers}, draft=setting.loaded.draft)
    room = {"rounds": tuning.MOST_ROUNDS + 2, "repeat": 0}
    args = argparse.Namespace(**{**vars(setting.args), **room})
    setting = Setting(loaded, args)
    program, weights = setting.program(case, context), weights_of(case, setting)
    coded = program.cache.codec.quantized_length(jnp.int32(context), GROUP_SIZE)
    peers = addresses(program.mesh)
    kept: list[DecodeState] = []

    def timed(compiled: Any) -> tuning.Seconds:
        def seconds(rounds: int) -> float:
            # As many tokens again each time, so that all meet the same lengths.
            state = kept.pop() if kept else random_state(program, args.batch, context, *SIZES)
            state = jax.block_until_ready(_at(state, context, coded))
            begin = time.perf_counter()
            state = compiled(*weights, state, _number(rounds), *peers)
            kept.append(jax.block_until_ready(state))
            return time.perf_counter() - begin

        return seconds

    def lower() -> Any:
        def decode(params: Params, draft: Params, state: DecodeState, *rest: Any) -> DecodeState:
            return generate_tokens(params, draft, state, *rest, program=program)

        # A new function: of the old one JAX would know what it had chosen.
        new = jax.jit(decode, donate_argnames="state")
        forms = state_forms(program, args.batch, context)
        return new.lower(*weights, forms, _number(0), *peers)

    return tuning.tune(tuning.Step(lower, timed))


def _at(state: DecodeState, length: int, coded: jax.Array) -> DecodeState:
    """With caches of this length, of which so much is coded."""
    cache = state.cache
    lengths = [
        jax.device_put(jnp.full_like(old, new), old.sharding)
        for old, new in ((cache.length, length), (cache.quantized_length, coded))
    ]
    cache = dataclasses.replace(cache, length=lengths[0], quantized_length=lengths[1])
    return dataclasses.replace(state, cache=cache)


def compile_case(case: Case, setting: Setting, context: int) -> Compiled:
    """Compile one case; may run in a thread of its own."""
    args = setting.args
    program = setting.program(case, context)
    shapes = state_forms(program, args.batch, context)
    setting.require_memory(case, context, {"cache": tree_bytes(shapes)})
    begin = time.perf_counter()
    call = (*weights_of(case, setting), shapes, jnp.int32(0), *addresses(program.mesh))
    compiled = DECODE.lower(*call, program=program).compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    temporaries = temporary_bytes(compiled)
    setting.require_memory(case, context, {"cache": tree_bytes(shapes), "temporaries": temporaries})
    text = compiled.as_text() if jax.default_backend() != "cpu" else None
    row = {
        "draft_read_share": program.policy.share if case.gamma else None,
        "temporary_bytes": temporaries,
        "argument_bytes": memory.argument_size_in_bytes if memory else None,
        "cache_bytes": cache_bytes(shapes.cache, program.cache.max_length)["total"],
        "device_bytes": {
            "weights": tree_bytes(setting.params),
            "draft": _own_bytes(setting.draft),
            "cache": tree_bytes(shapes.cache),
            "temporaries": temporaries,
        },
        "compile_seconds": seconds,
    }
    return Compiled(case, context, program, compiled, weights_of(case, setting), text, row)


def measure(compiled: Compiled, setting: Setting) -> dict[str, Any]:
    """Milliseconds a round of one case, and what goes with it."""
    args, case = setting.args, compiled.case
    state = jax.block_until_ready(compiled.run(compiled.new_state(args.batch), args.rounds))
    before = _counters(state)
    seconds: dict[int, list[float]] = {rounds: [] for rounds in lengths(args)}
    for _ in range(args.repeat):
        for rounds, found in seconds.items():
            begin = time.perf_counter()
            state = jax.block_until_ready(compiled.run(state, rounds))
            found.append(time.perf_counter() - begin)
    broken = bool(np.any(jax.device_get(state.broken)))
    made, accepted, proposed = (b - a for a, b in zip(before, _counters(state), strict=True))

    drafted = case.gamma
    calls = {rounds: 1e3 * statistics.median(found) for rounds, found in seconds.items()}
    milliseconds = calls[args.rounds] / args.rounds
    a_call, inside = call_and_round(calls)
    tokens = made / (sum(calls) * args.repeat)
    launches = launches_a_round(compiled.text) if compiled.text else None
    profile = None
    if jax.default_backend() != "cpu":
        kernels = traced(lambda: compiled.run(state, TRACED_ROUNDS))
        profile = breakdown(kernels, TRACED_ROUNDS, inside or milliseconds)
    return {
        "context": compiled.context,
        "batch": args.batch,
        "mode": case.name,
        "milliseconds_a_round": milliseconds,
        "milliseconds_a_call": a_call,
        "milliseconds_without_call": inside,
        "tokens_a_round": tokens / args.batch,
        "drafted_a_round": drafted,
        "tokens_per_second": tokens / milliseconds * 1e3,
        "acceptance": accepted / proposed if proposed else None,
        "acceptance_is_simulated": isinstance(compiled.program.coupling, Simulated),
        "launches_a_token": launches * args.batch / tokens if launches else None,
        "fewest_bytes_a_round": setting.fewest_bytes(case, compiled.context, drafted),
        "broken": broken,
        "profile": profile,
        "peak_bytes": peak_bytes(),
        **compiled.row,
    }


def call_and_round(calls: dict[int, float]) -> tuple[float | None, float | None]:
    """What a call takes beside its rounds, and what a round takes without a part of that, of the
    times of calls of two lengths; None where there is one."""
    if len(calls) < 2:
        return None, None
    (long, of_long), (short, of_short) = calls.items()
    inside = (of_long - of_short) / (long - short)
    return of_long - long * inside, inside


def _counters(state: DecodeState) -> tuple[int, ...]:
    """Tokens in the cache, accepted and proposed ones, of all sequences."""
    found = jax.device_get((state.cache.length, state.accepted, state.proposed))
    return tuple(int(x.sum()) for x in found)


def _own_bytes(draft: Params) -> int:
    """Bytes of the draft's own arrays."""
    leaves = jax.tree.leaves(draft, is_leaf=lambda x: isinstance(x, PackedWeight))
    return tree_bytes([leaf for leaf in leaves if isinstance(leaf, PackedWeight)])


def measured_costs(rows: list[dict[str, Any]]) -> Costs | None:
    """Milliseconds of each kind of pass at one context, where all three were measured."""
    found = []
    for kind in ("autoregressive full", "draft step", "verify step"):
        times = [
            row.get("milliseconds_without_call") or row["milliseconds_a_round"]
            for row in rows
            if row["mode"].startswith(kind)
        ]
        if not times:
            return None
        found.append(times[0])
    return Costs(*found)


def prediction(
    rows: list[dict[str, Any]], costs: Costs, context: int, simulated: float | None
) -> dict[str, Any] | None:
    """The best γ at one context, and the speed-up it promises, by bytes and by what was measured;
    None where there is no acceptance to predict from."""
    alpha = simulated
    for row in rows:
        if alpha is None and row["acceptance"] is not None and "auto" not in row["mode"]:
            alpha = chance_of_acceptance(row["acceptance"], row["drafted_a_round"])
    if alpha is None:
        return None
    found: dict[str, Any] = {"context": context, "acceptance": alpha}
    for name, prices in (("bytes", costs), ("milliseconds", measured_costs(rows))):
        if prices is not None:
            gamma = prices.best_gamma(alpha)
            found[f"gamma_by_{name}"] = gamma
            found[f"speed_up_by_{name}"] = prices.speed_up(alpha, gamma)
    return found


def chance_of_acceptance(share: float, gamma: int) -> float:
    """α for which the share of accepted proposals, (α + … + α^γ)/γ, is `share`; by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(middle**i for i in range(1, gamma + 1)) < share * gamma:
            low = middle
        else:
            high = middle
    return (low + high) / 2


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
    for alpha in args.simulate_acceptance or ():
        require(0 <= alpha <= 1, "--simulate-acceptance", alpha, "0 to 1")
    reads(args)
    require(args.batch >= 1, "--batch", args.batch, "an integer ≥ 1")
    numbers = [g for g in args.gamma if g != "auto"]
    require(min(numbers, default=1) >= 1, "--gamma", args.gamma, "integers ≥ 1, or auto")
    require(min(args.context) >= 3 * GROUP_SIZE, "--context", args.context, "384 or more")
    plot_path = check_plot(args.plot) if args.plot else None
    backend = backend_in_use(args.backend)
    model = PRESETS[args.preset]
    longest = max(args.context)
    require(longest <= model.max_context, "--context", longest, f"at most {model.max_context}")
    config = DraftConfig(
        group_size=args.draft_group,
        symmetric=args.draft_symmetric,
        lm_head_bits=args.draft_lm_head_bits,
    )
    dtype = float_type(args.dtype)
    mesh = mesh_of_options(args)
    if mesh is not None:
        check_mesh(model, mesh)
        check_draft(model, config, mesh)
        # Processes would find different configurations the best, and wait for each other for ever.
        one = jax.process_count() == 1
        require(one or not args.tune, "--tune", args.tune, "one process, without --coordinator")
        model = heads_over(model, mesh)
    check_parts(args, axes_of(mesh))
    tp = axes_of(mesh).tp
    weights = {
        "weights": parameter_count(model) * dtype.itemsize // tp,
        "draft": draft_bytes(model, config) // tp,
    }
    require_memory(args.preset, weights)
    ceiling = read_ceiling()
    setting = Setting(Model(model, random_params(model, dtype, mesh), draft=config), args)
    rows: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []
    result = {
        "preset": args.preset,
        "weights": "random",
        "draft": config.describe(),
        "draft_bytes": _own_bytes(setting.draft),
        "dtype": args.dtype,
        "backend": backend,
        "simulated_acceptance": setting.alpha,
        "draft_policy": args.draft_policy,
        "draft_share": None if args.draft_policy == "auto" else setting.policy(longest).share,
        "mesh": args.mesh,
        "devices": [device.device_kind for device in ([] if mesh is None else mesh.devices.flat)],
        "read_ceiling_gb_per_second": ceiling / 1e9,
        "predictions": predictions,
    }
    for case in cases(args.mode, args.gamma) if args.tune else ():
        if not case.gamma:
            tuning.keep(tune(case, setting, longest))
    for context in args.context:
        here = measure_context(setting, context, ceiling)
        rows += here
        found = prediction(here, setting.costs(context), context, setting.alpha)
        if found is not None:
            predictions.append(found)
            print(_prediction_line(found), file=sys.stderr, flush=True)
        if args.output:  # after each context, so that an interruption loses one at most
            record.write(
                Path(args.output), record.command("quantspec bench decode", args), rows, **result
            )
    if plot_path is not None:
        plot(rows, f"{args.preset}, batch {args.batch}, {record.device_name()}", plot_path)
    device = {"device": record.device_name(), "versions": record.versions()}
    return {**result, **device, "rows": rows}


def random_params(model: ModelConfig, dtype: np.dtype, mesh: Mesh | None) -> Params:
    """On the default device, or each device's parts on it."""
    key = jax.random.key(0)
    if mesh is None or mesh.size == 1:
        return init_params(model, key, dtype)
    return init_params_over(model, key, dtype, mesh)


def check_parts(args: argparse.Namespace, axes: Axes) -> None:
    """ValueError or NotImplementedError for what cannot be split over the mesh."""
    require(args.batch % axes.dp == 0, "--batch", args.batch, f"multiples of {axes.dp}, dp")
    if axes.cp > 1 and args.draft_policy == "snapkv":
        raise NotImplementedError("draft_policy 'snapkv' is not there with a mesh axis cp")


def peak_bytes() -> list[int] | None:
    """The most that each device ever held in this process; None where devices do not say."""
    found = [device.memory_stats() for device in jax.local_devices()]
    return [each["peak_bytes_in_use"] for each in found if each] or None


def measure_context(setting: Setting, context: int, ceiling: float) -> list[dict[str, Any]]:
    """The rows of every mode at one context."""
    rows: list[dict[str, Any]] = []
    chosen = cases(setting.args.mode, setting.args.gamma)
    # All programs are compiled at once; an adaptive one waits for the cost of a draft step.
    with ThreadPoolExecutor(max_workers=len(chosen)) as pool:
        waiting = [
            None if case.adaptive else pool.submit(compile_case, case, setting, context)
            for case in chosen
        ]
        programs = [None if future is None else future.result() for future in waiting]
    for case, program in zip(chosen, programs, strict=True):
        if program is None:
            costs = measured_costs(rows) or setting.costs(context)
            alpha = setting.alpha
            gamma = costs.best_gamma(PRIOR[0] if alpha is None else alpha, MOST_DRAFTED)
            case = dataclasses.replace(case, gamma=gamma, width=gamma + 1)
            program = compile_case(case, setting, context)
        row = measure(program, setting)
        least = row["fewest_bytes_a_round"] / ceiling * 1e3
        row |= {"floor_milliseconds": least}
        row |= {"percent_of_floor": 100 * least / row["milliseconds_a_round"]}
        inside = row["milliseconds_without_call"]
        row |= {"percent_of_floor_without_call": 100 * least / inside if inside else None}
        rows.append(row)
        print(_line(row), file=sys.stderr, flush=True)
    _add_speed_up(rows)
    return rows


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Tokens/s against context, a line a mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points = [(r["context"], r["tokens_per_second"]) for r in rows if r["mode"] == mode]
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=mode)
    contexts = sorted({row["context"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [short(context) for context in contexts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context")
    axes.set_ylabel("tokens/s")
    simulated = any(row["acceptance_is_simulated"] for row in rows)
    axes.set_title(f"{title}{', simulated acceptance' if simulated else ''}", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


def _add_speed_up(rows: list[dict[str, Any]]) -> None:
    base = [r for r in rows if r["mode"] == "autoregressive full"]
    for row in rows:
        row["speed_up"] = row["tokens_per_second"] / base[0]["tokens_per_second"] if base else None


def _line(row: dict[str, Any]) -> str:
    inside = row["percent_of_floor_without_call"]
    inside = f"; {inside:.0f}% without the call's own" if inside else ""
    return (
        f"{row['context']:>7} {row['mode']:<24} {row['milliseconds_a_round']:8.2f} ms a round, "
        f"floor {row['floor_milliseconds']:.2f} ({row['percent_of_floor']:.0f}%{inside}), "
        f"{row['tokens_per_second']:.1f} tokens/s"
        f"{', ended: logits were not finite' if row['broken'] else ''}"
    )


def _prediction_line(found: dict[str, Any]) -> str:
    best = ", ".join(
        f"gamma {found[f'gamma_by_{by}']} by {by} ({found[f'speed_up_by_{by}']:.2f}×)"
        for by in ("bytes", "milliseconds")
        if f"gamma_by_{by}" in found
    )
    return f"{found['context']:>7} best at acceptance {found['acceptance']:.3f}: {best}"
