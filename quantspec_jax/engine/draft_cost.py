"""What a draft step costs: measured once for a model, device and context bucket, and kept on disk
beside the compiled programs.

A trial decodes some rounds from the state at hand and takes everything back. That is possible
because planes do not change before a flush: the trial begins where F2 does, ends before it is full,
and what it wrote, in the buffer and in the small arrays, is put back.

A program that drafts takes a CPU a minute or more to compile, only to say, as a rule, that drafts
do not pay there, where XLA unpacks 4-bit weights at every step. So where no kernels run, passes of
one layer are asked first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.kv_attention.read import Read
from quantspec_jax import compilation_cache
from quantspec_jax.cache import KVCache
from quantspec_jax.cost import bytes_read
from quantspec_jax.files import read_json, write_json
from quantspec_jax.generate.cache_pass import hidden_pass
from quantspec_jax.generate.policies import ALL
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.loading import Model
from quantspec_jax.models.decoder import unembed
from quantspec_jax.models.linear import computed
from quantspec_jax.models.parameters import Params

TRIAL_GAMMA = 4
LEAST_SECONDS = 0.15  # of a timed run, if so many rounds may be tried
MOST_ROUNDS = 16
REPEATS = 3  # the fastest counts
GUESS_SECONDS = 1.0
ENDLESS = 1 << 30  # tokens
VERSION = 3  # of how it is measured
# What a round changes beside the cache's arrays.
SMALL = (
    *("memory", "seen", "pending", "tokens", "count", "finished"),
    *("broken", "rounds", "statistics", "lookup"),
)
_known: dict[str, float] = {}

Decode = Callable[[DecodeState, int, Program], tuple[DecodeState, float]]


def with_gamma(program: Program, gamma: int) -> Program:
    """The program that drafts `gamma` tokens a round, with passes of as many rows as that needs."""
    cache = dataclasses.replace(program.cache, pass_width=gamma + 1)
    return dataclasses.replace(program, gamma=gamma, cache=cache)


def without_copies(program: Program, gamma: int) -> Program:
    """`with_gamma`, of which no round copies."""
    return dataclasses.replace(with_gamma(program, gamma), lookup=0)


def key_of(model: Model, program: Program, batch: int) -> str:
    """What the cost depends on, as a name for a file."""
    device = jax.devices()[0]
    parts = (
        *(VERSION, jax.__version__, device.platform, device.device_kind, model.config),
        *(model.draft, model.dtype.name, batch),
        without_copies(program, TRIAL_GAMMA),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def by_bytes(model: Model, program: Program, batch: int) -> float:
    """What a draft step reads over what a plain one does: a guess where no time is to be lost."""
    costs = bytes_read(
        model.config,
        model.draft,
        program.cache.max_length,
        batch=batch,
        itemsize=model.dtype.itemsize,
        group_size=program.cache.group_size,
        view=program.draft_read.view,
        share=program.policy.share,
    )
    return costs.draft / costs.verify


@functools.partial(jax.jit, static_argnames=("program", "read"))
def _layers(
    params: Params, cache: KVCache, tokens: jax.Array, *, program: Program, read: Read
) -> jax.Array:
    hidden = hidden_pass(params, program, cache, tokens[:, None], cache.length, read)[0]
    return computed(hidden, program.backend)


@functools.partial(jax.jit, static_argnames="backend")
def _head(params: Params, hidden: jax.Array, *, backend: str) -> jax.Array:
    return unembed(params, hidden, backend)


def guessed(
    model: Model, state: DecodeState, program: Program, ready: Callable[..., Any]
) -> float | None:
    """What a draft step takes over a plain one, from a pass of the first layer and the lm_heads: c
    without what a verification takes beyond a plain step, so that what cannot pay by it does not.
    None where it would say little: where kernels run, devices meet, or drafts choose pages.

    Args:
      ready: a jitted function's executable for given arguments.
    """
    alone = dispatch.device() is None and program.mesh is None
    if not alone or program.policy != ALL or program.cache.codec.recodes:
        return None
    one = dataclasses.replace(program.model, num_layers=1)
    plain = dataclasses.replace(without_copies(program, 0), model=one)
    cache = dataclasses.replace(state.cache, layers=state.cache.layers[:1])

    passes = []  # of the draft, then of the target: a layer, and the head
    for params, read in (
        (model.draft_params, program.draft_read),
        (model.params_for(program.cache), program.read),
    ):
        params = {**params, "layers": {"0": params["layers"]["0"]}}
        hidden = jnp.zeros((*state.pending.shape, 1, one.hidden_size), model.dtype)
        for function, args, static in (
            (_layers, (params, cache, state.pending), {"program": plain, "read": read}),
            (_head, (params, hidden), {"backend": program.backend}),
        ):
            passes.append(functools.partial(ready(function, *args, **static), *args))

    def seconds(run: Callable[[], jax.Array]) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - begin

    # In turn, so that whatever else the machine does meets all of them.
    fastest, until = [math.inf] * len(passes), time.perf_counter() + GUESS_SECONDS
    while time.perf_counter() < until or math.inf in fastest:
        fastest = [min(best, seconds(run)) for best, run in zip(fastest, passes, strict=True)]
    draft, plain_step = (
        program.model.num_layers * layer + head for layer, head in (fastest[:2], fastest[2:])
    )
    return draft / plain_step


def known(key: str) -> float | None:
    """A cost that was measured before, in this process or another one."""
    if key in _known:
        return _known[key]
    path = _path(key)
    try:
        found = read_json(path)["draft_cost"] if path else None
    except (OSError, ValueError, KeyError):
        return None
    if not isinstance(found, float) or not 0 < found < 1e6:
        return None
    _known[key] = found
    return found


def keep(key: str, cost: float) -> None:
    """Remember a cost; where there is a directory for compiled programs, on disk."""
    _known[key] = cost
    path = _path(key)
    if path is None:
        return
    with contextlib.suppress(OSError):  # a full or read-only disk: measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"draft_cost": cost})


def _path(key: str) -> Path | None:
    folder = compilation_cache.directory()
    return folder / "draft_costs" / f"{key}.json" if folder else None


def measured(state: DecodeState, program: Program, decode: Decode) -> tuple[DecodeState, float]:
    """The state as it was, and c: seconds that a draft step adds to a round over those of a plain
    step.

    Args:
      state: donated.
      decode: runs so many rounds of a program; returns the state and the seconds.
    """
    cache, g = state.cache, program.cache.group_size
    before = jax.tree.map(
        jnp.copy,
        {
            "small": {name: getattr(state, name) for name in SMALL},
            "limit": state.requests.limit,
            "lengths": (cache.length, cache.quantized_length),
            "buffers": [(x.key_buffer, x.value_buffer) for x in cache.layers],
        },
    )

    def begun(state: DecodeState) -> DecodeState:
        requests = dataclasses.replace(
            state.requests, limit=jnp.full_like(before["limit"], ENDLESS)
        )
        cache = dataclasses.replace(state.cache, length=before["lengths"][0] // g * g)
        nobody = jnp.zeros_like(state.finished)
        return dataclasses.replace(state, cache=cache, requests=requests, finished=nobody)

    plain, drafting = without_copies(program, 0), without_copies(program, min(TRIAL_GAMMA, g - 2))

    def spent(rounds: int, trial: Program) -> float:
        nonlocal state
        state, seconds = decode(begun(state), rounds, trial)
        return seconds

    def of_a_round(trial: Program) -> float:
        """Without what a call costs before its first round: several milliseconds on a GPU."""
        one = min(spent(1, trial) for _ in range(2))  # what runs for the first time takes longer
        most = min(MOST_ROUNDS, (g - 1) // (trial.gamma + 1))
        rounds = min(most, math.ceil(LEAST_SECONDS / max(one, 1e-9)))
        if rounds == 1:
            return one
        spent(rounds, trial)  # a first run of so many rounds, too, may take longer
        runs = [(spent(1, trial), spent(rounds, trial)) for _ in range(REPEATS)]
        short, long = map(min, zip(*runs, strict=True))
        return max(long - short, 1e-9) / (rounds - 1)

    seconds = [of_a_round(trial) for trial in (plain, drafting)]
    cost = (seconds[1] - seconds[0]) / drafting.gamma / seconds[0]

    layers = tuple(
        dataclasses.replace(layer, key_buffer=keys, value_buffer=values)
        for layer, (keys, values) in zip(state.cache.layers, before["buffers"], strict=True)
    )
    length, quantized = before["lengths"]
    restored = dataclasses.replace(
        state,
        cache=dataclasses.replace(
            state.cache, layers=layers, length=length, quantized_length=quantized
        ),
        requests=dataclasses.replace(state.requests, limit=before["limit"]),
        **before["small"],
    )
    return restored, min(max(cost, 0.01), 100.0)
