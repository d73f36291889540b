"""The decoder's parts: RoPE, norms, attention, parameter tree, axis names, full-size shapes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from convert.hf_config import parse_hf_config
from pallas_kernels.rope_append.heads import rotate
from quantspec_jax.cache import cache_bytes, create
from quantspec_jax.cache.cache import logical_axes as cache_axes
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.prefill import prefill
from quantspec_jax.generate.requests import requests
from quantspec_jax.generate.state import Program
from quantspec_jax.loading import full_logits
from quantspec_jax.models.attention import KEY_BLOCK, QUERY_BLOCK, causal_attention
from quantspec_jax.models.config import FAMILIES, ModelConfig, RopeConfig
from quantspec_jax.models.decoder import rms_norm
from quantspec_jax.models.module import Decoder, init_params, logical_axes
from quantspec_jax.models.parameters import (
    check_params,
    flatten,
    nest,
    parameter_count,
    parameter_shapes,
)
from quantspec_jax.models.rope import rope_frequencies, rope_tables
from quantspec_jax.weights.entries import merge, quantize_params
from quantspec_jax.weights.formats import DraftConfig

# RoPE against transformers' own initialisation.

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def transformers_config(head_dim: int, context: int, rope: dict[str, Any]):
    return transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_hidden_layers=1,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters=rope,
    )


def transformers_frequencies(
    head_dim: int, context: int, rope: dict[str, Any], length: int
) -> tuple[np.ndarray, float]:
    config = transformers_config(head_dim, context, rope)
    if rope["rope_type"] == "default":
        frequencies, attention = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        initialise = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        frequencies, attention = initialise(config, seq_len=length)
    return frequencies.numpy(), attention


factors = st.floats(1, 64)
contexts = st.integers(32, 131072)
rope_settings = st.one_of(
    st.just({"rope_type": "default"}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factors}),
    st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": factors}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": factors,
            "original_max_position_embeddings": contexts,
            "low_freq_factor": st.floats(0.25, 1.5),
            "high_freq_factor": st.floats(4, 32),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": factors,
            "original_max_position_embeddings": contexts,
        },
        optional={
            "beta_fast": st.floats(4, 64),
            "beta_slow": st.floats(0.25, 2),
            "attention_factor": st.floats(0.5, 2),
            "mscale": st.floats(0.1, 2),
            "mscale_all_dim": st.floats(0.1, 2),
            "truncate": st.booleans(),
        },
    ),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rope=rope_settings,
    theta=st.floats(1e3, 1e8),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    context=contexts,
    length=st.integers(1, 262144),
)
@example(  # a ramp of no width
    rope={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 6},
    theta=1e4,
    head_dim=64,
    context=32,
    length=1,
)
def test_rope_frequencies_are_those_of_transformers(rope, theta, head_dim, context, length):
    rope = {"rope_theta": theta, **rope}
    expected, expected_factor = transformers_frequencies(head_dim, context, rope, length)
    ours = parse_hf_config({**HF_CONFIG, "max_position_embeddings": context, "rope_scaling": rope})
    actual, factor = rope_frequencies(ours.rope, head_dim, length)
    assert actual.dtype == np.float32
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PUBLISHED_ROPES = {
    "Llama 2": {"rope_type": "default", "rope_theta": 1e4},
    "Llama 3.1": {"rope_theta": 5e5, **LLAMA3},
    "Qwen 2.5, 128K": {"rope_theta": 1e6, **YARN},
    "LongChat": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
}


@pytest.mark.parametrize("rope", PUBLISHED_ROPES.values(), ids=PUBLISHED_ROPES)
def test_angles_far_into_the_context_are_those_of_transformers(rope):
    """At position 131,071 the last bit of a frequency is up to 0.008 radians: all but a few bits
    have to agree."""
    positions = np.asarray([[0, 1, 4095, 32767, 131071]])
    module = LlamaRotaryEmbedding(transformers_config(128, 131072, rope))
    theirs = module(torch.zeros(1), torch.from_numpy(positions))
    ours = parse_hf_config({**HF_CONFIG, "rope_scaling": rope}).rope
    tables = rope_tables(*rope_frequencies(ours, 128, 131072), jnp.asarray(positions))
    for actual, expected in zip(tables, theirs, strict=True):
        error = np.abs(np.asarray(actual)[:, :, 0] - expected.numpy())
        assert error.max() < 0.01
        assert np.mean(error < 1e-6) > 0.98


def test_dynamic_ntk_has_one_factor_a_generation():
    rope = RopeConfig("dynamic", factor=4.0, original_max_position=1024)
    within = [rope_frequencies(rope, 64, n)[0] for n in (1, 512, 1024)]
    for frequencies in within:
        np.testing.assert_array_equal(frequencies, rope_frequencies(RopeConfig(), 64, 1)[0])
    longer = [rope_frequencies(rope, 64, n)[0][-1] for n in (1024, 1025, 2048, 4096)]
    assert all(a > b for a, b in itertools.pairwise(longer))
    # At factor times the context, the slowest plane turns `factor` times slower or more.
    assert longer[-1] * 4.0 < longer[0]


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({**YARN, "original_max_position_embeddings": 4096}, 16384),
        ({**YARN, "original_max_position_embeddings": 512}, 4096),
        ({**LLAMA3, "original_max_position_embeddings": 1024}, 4096),
    ],
)
def test_the_context_limit_counts_the_scaling_once(rope, limit):
    config = parse_hf_config({**HF_CONFIG, "max_position_embeddings": 4096, "rope_scaling": rope})
    assert config.max_context == limit


def test_rotation_keeps_norms_and_depends_on_distance_alone():
    """q·k after RoPE is a function of how far apart they are."""
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 64)) for i in (0, 1))
    frequencies = rope_frequencies(RopeConfig(), 64, 1)

    def at(x: jax.Array, position: int) -> jax.Array:
        return rotate(x, *rope_tables(*frequencies, jnp.full((1, 1), position)))

    np.testing.assert_allclose(jnp.linalg.norm(at(q, 777)), jnp.linalg.norm(q), rtol=1e-6)
    products = [float(jnp.sum(at(q, p + 40) * at(k, p))) for p in (0, 7, 500, 3000)]
    np.testing.assert_allclose(products, products[0], atol=5e-3)
    assert abs(jnp.sum(at(q, 41) * at(k, 0)) - products[0]) > 0.05


# Precision.

TINY = ModelConfig("qwen3", 64, 32, 48, 2, 4, 2, 8, 4096, qk_norm=True)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_norms_are_computed_in_float32(scale):
    """bf16 in and out, nothing rounded on the way: half a unit in the last place."""
    x = (scale * jax.random.normal(jax.random.key(0), (4, 1000))).astype(jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), (1000,)).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    exact = (
        wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-6) * np.asarray(weight, np.float64)
    )
    actual = rms_norm(x, weight, 1e-6)
    assert actual.dtype == jnp.bfloat16
    error = np.abs(np.asarray(actual, np.float64) - exact)
    assert np.all(error <= 2.0**-8 * 1.001 * np.abs(exact))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotation_is_computed_in_float32(dtype):
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 64)).astype(dtype)
    positions = jnp.asarray([[0, 5, 9000]])
    cos, sin = rope_tables(*rope_frequencies(RopeConfig(), 64, 1), positions)
    assert cos.dtype == sin.dtype == jnp.float32
    wide = np.asarray(x, np.float64)
    a, b = wide[..., :32], wide[..., 32:]
    c, s = (np.asarray(t, np.float64)[..., :32] for t in (cos, sin))
    exact = np.concatenate([a * c - b * s, b * c + a * s], -1)
    actual = rotate(x, cos, sin)
    assert actual.dtype == dtype
    last_place = {"float32": 2.0**-22, "bfloat16": 2.0**-8}[dtype]
    bound = last_place * 1.001 * np.abs(exact) + 2.0**-22 * np.abs(wide).max()
    assert np.all(np.abs(np.asarray(actual, np.float64) - exact) <= bound)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Of a jaxpr and of all inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_products_of_a_float32_model_are_float32_on_every_backend():
    """A GPU would take TF32 where nothing is asked for."""
    params = jax.eval_shape(lambda: init_params(TINY, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    jaxpr = jax.make_jaxpr(full_logits, static_argnums=2)(params, tokens, TINY)
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 1 + TINY.num_layers * (7 + 2)
    highest = jax.lax.Precision.HIGHEST
    assert {e.params["precision"] for e in products} == {(highest, highest)}


# Attention.


def naive_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The formula in float64, with the whole matrix of scores."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    length, repeat = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, repeat, axis=2) for x in (k, v))
    scores = np.einsum("bshd,bthd->bhst", q, k) / math.sqrt(q.shape[-1])
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhst,bthd->bshd", weights, v)


def random_qkv(length: int, *, heads: int = 2, kv_heads: int = 1, dim: int = 8, batch: int = 1):
    rng = np.random.default_rng(length)
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return 3 * q, k, v  # 3: some rows attend to almost one key


attend = jax.jit(causal_attention, static_argnums=3)

LENGTHS = sorted(
    {1, 2, 3, 17} | {n + i for n in (QUERY_BLOCK, KEY_BLOCK, 2 * KEY_BLOCK) for i in (-1, 0, 1)}
)


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_is_the_formula(length):
    q, k, v = random_qkv(length)
    actual = attend(q, k, v, 8**-0.5)
    np.testing.assert_allclose(actual, naive_attention(q, k, v), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "batch"), [(4, 4, 16, 1), (6, 2, 80, 2), (4, 1, 256, 3)]
)
def test_attention_of_head_groups_and_batches(heads, kv_heads, dim, batch):
    q, k, v = random_qkv(300, heads=heads, kv_heads=kv_heads, dim=dim, batch=batch)
    actual = attend(q, k, v, dim**-0.5)
    np.testing.assert_allclose(actual, naive_attention(q, k, v), atol=2e-5, rtol=0)


def test_attention_computes_in_float32_for_bfloat16():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(600))
    actual = attend(q, k, v, 8**-0.5)
    assert actual.dtype == jnp.bfloat16
    exact = naive_attention(*(np.asarray(x, np.float32) for x in (q, k, v)))
    error = np.abs(np.asarray(actual, np.float32) - exact)
    assert np.all(error <= 2.0**-8 * 1.001 * np.abs(exact) + 1e-5)


@pytest.mark.parametrize("length", [1, 100, QUERY_BLOCK, QUERY_BLOCK + 1, KEY_BLOCK + 3])
def test_attention_does_not_see_padding(length):
    """What stands behind a row changes no bit of it, however large."""
    q, k, v = random_qkv(700)
    other = [x.copy() for x in (q, k, v)]
    for x in other:
        x[:, length:] = 1e4 * x[:, length:][:, ::-1] - 7
    one, two = attend(q, k, v, 8**-0.5), attend(*other, 8**-0.5)
    np.testing.assert_array_equal(one[:, :length], two[:, :length])
    np.testing.assert_allclose(
        one[:, :length],
        naive_attention(q[:, :length], k[:, :length], v[:, :length]),
        atol=2e-5,
        rtol=0,
    )


def test_attention_of_large_scores_is_finite():
    q, k, v = random_qkv(600)
    actual = attend(100 * q, 100 * k, v, 8**-0.5)
    assert np.all(np.isfinite(actual))
    assert np.abs(actual).max() <= np.abs(v).max() * (1 + 1e-6)


def test_prefill_does_not_see_padding():
    """Prompts of different lengths in one batch: whatever the padding, every array is the same."""
    lengths = jnp.asarray([1, 130, 300], jnp.int32)
    params = init_params(TINY, jax.random.key(0))
    program = Program(TINY, CacheConfig(512, 16), gamma=4)
    padding = np.arange(320) >= np.asarray(lengths)[:, None]
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 3, 320))
    settings = GenerateConfig(temperature=1.0, repetition_penalty=1.3, max_new_tokens=8)
    wants = requests(settings, jax.random.key(1), (), 3)
    run = jax.jit(prefill, static_argnames=("program", "capacity"))

    def state(filling: np.ndarray) -> list[np.ndarray]:
        prompts = jnp.asarray(np.where(padding, filling, tokens[0]), jnp.int32)
        result = run(params, prompts, lengths, wants, program=program.prompt, capacity=8)
        raw = dataclasses.replace(result.requests, keys=jax.random.key_data(result.requests.keys))
        result = dataclasses.replace(result, requests=raw)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]

    for one, two in zip(state(tokens[1]), state(tokens[2]), strict=True):
        np.testing.assert_array_equal(one, two)


def temporary_bytes(function: Any, *shapes: Any) -> int:
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_attention_is_linear_in_the_length():
    def needed(length: int) -> int:
        q, k = (jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (4, 2))
        return temporary_bytes(lambda q, k, v: causal_attention(q, k, v, 0.25), q, k, k)

    one, two, four = (needed(1024 * n) for n in (1, 2, 4))
    assert four - two <= 2 * (two - one) * 1.01
    assert four < 4 * one
    assert four < 4 * 4096**2  # one head's scores alone would be as much


# The tree and its axes.


def family_config(family: str) -> ModelConfig:
    """Every parameter that the family may have."""
    return ModelConfig(
        family,  # type: ignore[arg-type]
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_context=512,
        tie_embeddings=family == "mistral",
        qkv_bias=family in ("llama", "qwen2"),
        output_bias=family == "llama",
        mlp_bias=family == "llama",
        qk_norm=family == "qwen3",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_has_the_declared_parameters_with_their_axes(family):
    config = family_config(family)
    state = nnx.split(Decoder(config, rngs=nnx.Rngs(params=0)))[1]
    shapes = {path: spec.shape for path, spec in parameter_shapes(config).items()}
    axes = {path: spec.axes for path, spec in parameter_shapes(config).items()}
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    assert {path: leaf.shape for path, leaf in leaves.items()} == shapes
    specs = nnx.to_flat_state(nnx.get_partition_spec(state))
    assert {".".join(map(str, path)): tuple(leaf.get_value()) for path, leaf in specs} == axes

    params = init_params(config, jax.random.key(0), jnp.bfloat16)
    check_params(config, params)
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == shapes
    assert {leaf.dtype.name for leaf in flatten(params).values()} == {"bfloat16"}
    assert sum(leaf.size for leaf in flatten(params).values()) == parameter_count(config)


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_random_parameters_are_made_one_at_a_time(monkeypatch):
    """Whenever one is drawn, those before it lie there and nothing else: full size fits, too."""
    shapes = [spec for path, spec in parameter_shapes(TINY).items() if not path.endswith("norm")]
    normal, found = jax.random.normal, []

    def drawn(key, shape, dtype):
        found.append((tuple(shape), live_bytes()))
        return normal(key, shape, dtype)

    monkeypatch.setattr(jax.random, "normal", drawn)
    params = init_params(TINY, jax.random.key(0), jnp.bfloat16)
    assert [shape for shape, _ in found] == [spec.shape for spec in shapes]
    first, rest = 2 * shapes[0].size, 2 * parameter_count(TINY)
    few = 1024  # keys, and norms that are made between
    assert found[1][1] - found[0][1] < first + few
    assert found[-1][1] - found[0][1] < rest - 2 * shapes[-1].size + few
    assert live_bytes() - found[0][1] < rest + few
    del params


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_axis_name_a_dimension(family):
    config = family_config(family)
    axes = flatten(logical_axes(config))
    shapes = parameter_shapes(config)
    assert axes.keys() == shapes.keys()
    sizes: dict[str, set[int]] = {}
    for path, names in axes.items():
        assert len(names) == len(shapes[path].shape)
        assert len(set(names)) == len(names)
        for name, size in zip(names, shapes[path].shape, strict=True):
            sizes.setdefault(name, set()).add(size)
    assert sizes.pop("head_dim", {16}) == {16}
    assert sizes == {"vocab": {64}, "embed": {32}, "mlp": {48}, "heads": {64}, "kv_heads": {32}}


@pytest.mark.parametrize("view", ["int8", "full"])
def test_every_cache_array_has_one_axis_name_a_dimension(view):
    config = family_config("llama")
    cache = jax.eval_shape(lambda: create(config, CacheConfig(1024, 128, view=view), 3))
    axes = cache_axes(cache)

    def is_names(x: Any) -> bool:
        return isinstance(x, tuple) and all(isinstance(name, str) for name in x)

    arrays = jax.tree.leaves(cache)
    names = jax.tree.leaves(axes, is_leaf=is_names)
    assert len(arrays) == len(names) == 2 * (10 if view == "int8" else 2) + 2
    sizes: dict[str, set[int]] = {}
    for array, axis in zip(arrays, names, strict=True):
        assert len(axis) == array.ndim
        for name, size in zip(axis, array.shape, strict=True):
            sizes.setdefault(name, set()).add(size)
    assert (sizes["batch"], sizes["kv_heads"]) == ({3}, {2})
    assert 16 in sizes["head_dim"]


def test_a_tree_that_does_not_fit_is_refused_by_the_name_of_the_entry():
    params = init_params(TINY, jax.random.key(0))
    flat = flatten(params)
    for path, changed in {
        "layers.1.down.kernel": None,
        "layers.0.q.bias": jnp.zeros(32),
        "embedding": jnp.zeros((32, 64)),
    }.items():
        other = {**flat, path: changed}
        if changed is None:
            del other[path]
        with pytest.raises(ValueError, match=path.replace(".", r"\.")):
            check_params(TINY, nest(other))


# Full-size models, by their shapes alone.

CONTEXT = 131072
MODELS = {
    "Llama-2-7B": (
        ModelConfig("llama", 32000, 4096, 11008, 32, 32, 32, 128, CONTEXT),
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        ModelConfig(
            "llama", 128256, 4096, 14336, 32, 32, 8, 128, CONTEXT,
            rope=RopeConfig("llama3", 5e5, 8.0, 8192),
        ),
        8_030_261_248,
    ),
    "Mistral-7B": (
        ModelConfig("mistral", 32768, 4096, 14336, 32, 32, 8, 128, CONTEXT),
        7_248_023_552,
    ),
    "Qwen2.5-7B": (
        ModelConfig(
            "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, CONTEXT,
            rope=RopeConfig("yarn", 1e6, 4.0, 32768), qkv_bias=True,
        ),
        7_615_616_512,
    ),
    "Qwen3-8B": (
        ModelConfig(
            "qwen3", 151936, 4096, 12288, 36, 32, 8, 128, CONTEXT,
            rope=RopeConfig("yarn", 1e6, 4.0, 32768), qk_norm=True,
        ),
        8_190_735_360,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "count"), MODELS.values(), ids=MODELS)
def test_full_size_models_at_131072_tokens(config, count):
    """The published number of parameters; prefill and the decoding loop fit together, and planning
    them takes no memory. One model in full depth, of the others two layers."""
    assert parameter_count(config) == count
    if config is not MODELS["Llama-3.1-8B"][0]:
        config = dataclasses.replace(config, num_layers=2)
    batch, new = 1, 256
    program = Program(config, CacheConfig(CONTEXT, dtype="bfloat16"), gamma=4)

    def prefilled(params, prompts, lengths):
        wants = requests(GenerateConfig(max_new_tokens=new), None, (), batch)
        return prefill(params, prompts, lengths, wants, program=program.prompt, capacity=new)

    def decoded(params, state):
        draft = merge(params, quantize_params(params, DraftConfig()))
        return generate_tokens(params, draft, state, 16, program=program)

    resident = psutil.Process().memory_info().rss
    params = jax.eval_shape(lambda key: init_params(config, key, jnp.bfloat16), jax.random.key(0))
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    assert sum(sizes) == parameter_count(config)
    prompts = jax.ShapeDtypeStruct((batch, CONTEXT - new), jnp.int32)
    state = jax.eval_shape(prefilled, params, prompts, jax.ShapeDtypeStruct((batch,), jnp.int32))
    after = jax.eval_shape(decoded, params, state)
    assert psutil.Process().memory_info().rss - resident < 2**29

    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(state)
    ]
    assert state.tokens.shape == (batch, new)
    sizes = cache_bytes(state.cache, CONTEXT)
    planes = sizes["upper"] + sizes["lower"] + sizes["scales"]
    assert planes <= 8.26 / 16 * sizes["bf16_equivalent"]
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    assert sizes["upper"] == sizes["lower"] == CONTEXT * per_token // 2
    # Everything on the device is counted: nothing holds flushed tokens a second time.
    arrays = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    assert arrays == sizes["total"]
