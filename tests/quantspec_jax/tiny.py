"""A tiny random model and a way to run the pure functions on it, for tests of cache and loop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from quantspec_jax.cache import KVCache
from quantspec_jax.cache.codecs import CODECS
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.prefill import prefill
from quantspec_jax.generate.requests import Requests, sampling_arrays
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.module import init_params
from quantspec_jax.weights.entries import merge, quantize_params
from quantspec_jax.weights.formats import DraftConfig

VOCABULARY = 97
G = 16
# Where a program computes for longer than it compiles: other tests' are compiled without LLVM's
# passes.
OPTIMIZED = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": False}


@functools.cache
def tiny_model(seed: int = 0, head_dim: int = 16, layers: int = 2):
    """(config, params, draft params): grouped queries, weights large enough that the draft is often
    wrong."""
    config = ModelConfig("llama", VOCABULARY, 32, 64, layers, 4, 2, head_dim, 4096)
    params = init_params(config, jax.random.key(seed))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    own = quantize_params(params, DraftConfig(group_size=32, symmetric=True))
    return config, params, merge(params, own)


def prompts(lengths, seed: int = 0) -> np.ndarray:
    """Random prompts, padded to a multiple of G with random ids too: padding must not matter."""
    longest = -(-max(lengths) // G) * G
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, VOCABULARY, (len(lengths), longest))
    return rows.astype(np.int32)


def program(
    gamma: int,
    view: str = "int8",
    width: int | None = None,
    max_length: int = 512,
    layers: int = 2,
    **options,
):
    """A program for the tiny model of so many layers, group size G."""
    config, _, _ = tiny_model(layers=layers)
    cache = CacheConfig(max_length, G, view, width or gamma + 1)
    return Program(config, cache, gamma, **options)


@functools.partial(jax.jit, static_argnames=("program", "capacity", "lookup"))
def _prefill(params, *args, **static):
    return prefill(params, *args, **static)


@functools.partial(jax.jit, static_argnames="program")
def _decode(*args, program):
    return generate_tokens(*args, program=program)


def wants(batch: int, new: int, sampling=None, keys=None, eos=()) -> Requests:
    """What `batch` sequences want: greedy tokens, unless `sampling` says otherwise."""
    if keys is None:
        keys = jax.random.split(jax.random.key(7), batch)
    ends = jnp.tile(jnp.asarray([*eos, -1], jnp.int32), (batch, 1))
    limit = jnp.full(batch, new, jnp.int32)
    return Requests(sampling or sampling_arrays(GenerateConfig(), batch), keys, ends, limit)


def start(program: Program, rows: np.ndarray, lengths, new: int, *options, params=None, **more):
    """The state after the prefill; options as in `wants`."""
    return _prefill(
        tiny_model(layers=program.model.num_layers)[1] if params is None else params,
        jnp.asarray(rows),
        jnp.asarray(lengths, jnp.int32),
        wants(len(lengths), new, *options, **more),
        program=program.prompt,
        capacity=256,
        lookup=program.lookup,
    )


def decode(program: Program, state: DecodeState, max_rounds=10_000, params=None, draft=None):
    """Run the loop."""
    _, target, draft_params = tiny_model(layers=program.model.num_layers)
    return _decode(
        target if params is None else params,
        draft_params if draft is None else draft,
        state,
        jnp.asarray(max_rounds, jnp.int32),
        program=program,
    )


def state_of(seen, sampling, keys, length) -> DecodeState:
    """A state of which an acceptance reads all there is."""
    cache = KVCache((), length, jnp.zeros_like(length), G, CODECS["hierarchical"])
    requests = Requests(sampling, keys, jnp.zeros((0, 1)), jnp.zeros(0))
    return DecodeState(cache, requests, (), seen, *[jnp.zeros(0)] * 7)


def total(by_place) -> np.ndarray:
    """[B, places] proposals or accepted ones → [B]."""
    return np.asarray(by_place).sum(-1)


def new_tokens(state: DecodeState) -> list[list[int]]:
    """The new tokens of each sequence."""
    return [
        row[:count].tolist()
        for row, count in zip(np.asarray(state.tokens), np.asarray(state.count), strict=True)
    ]
