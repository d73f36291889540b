"""Attention of whole sequences: which one a prompt runs in, that cuDNN's lowers for CUDA without a
GPU, and what each position of a text reads."""

from __future__ import annotations

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from pallas_kernels import dispatch
from pallas_kernels.kv_attention.read import Read
from pallas_kernels.kv_attention.xla import dequantize_keys, dequantize_values
from pallas_kernels.quantize_pack.xla import quantize_keys, quantize_values
from quantspec_jax.cache.sequence import attend_coded
from quantspec_jax.models.attention import (
    KEY_BLOCK,
    QUERY_BLOCK,
    Tokens,
    causal_attention,
    part_of_prompt_attention,
    prompt_attention,
    uses_cudnn,
)


@pytest.fixture
def h200(monkeypatch):
    device = types.SimpleNamespace(
        core_count=132, device_kind="NVIDIA H200", compute_capability="9.0"
    )
    monkeypatch.setattr(dispatch, "device", lambda: device)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "backend", "expected"),
    [
        ("bfloat16", 128, "auto", True),
        ("bfloat16", 64, "mosaic_gpu", True),
        ("bfloat16", 128, "xla", False),
        ("float32", 128, "auto", False),
        ("bfloat16", 256, "auto", False),
        ("bfloat16", 36, "auto", False),
    ],
)
def test_the_rule(h200, dtype, head_dim, backend, expected):
    assert uses_cudnn(jnp.dtype(dtype), head_dim, backend) is expected


def test_cudnns_attention_is_causal_and_repeats_no_keys(h200, monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    q, k = (jax.ShapeDtypeStruct((2, 300, n, 64), jnp.bfloat16) for n in (8, 2))
    traced = jax.jit(lambda q, k, v: prompt_attention(q, k, v, 0.1)).trace(q, k, k)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = re.findall(r"stablehlo.custom_call @__cudnn\$fmhaSoftmax.*", text)
    assert re.search(r"mask_type[^A-Z]*CAUSAL\b", call)
    assert "tensor<2x300x2x64xbf16>" in call, "keys are not repeated for the queries of a group"


def test_without_such_a_device_it_is_the_blocked_one():
    if dispatch.device() is not None:
        pytest.skip("there is a CUDA device")
    assert not uses_cudnn(jnp.bfloat16, 128)
    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, 40, n, 16)) for i, n in enumerate((4, 2, 2))
    )
    np.testing.assert_array_equal(
        prompt_attention(q, k, v, 0.25, "auto"), causal_attention(q, k, v, 0.25)
    )


@pytest.mark.parametrize("run", [24, 2 * QUERY_BLOCK])
def test_parts_of_a_prompt_make_the_whole(run):
    """Four runs of rows on two devices: the outer two, and the inner two."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, 4 * run, n, 16)) for i, n in enumerate((4, 2, 2))
    )
    whole = causal_attention(q, k, v, 0.25).reshape(4, run, 4, 16)
    for part, runs in enumerate(([0, 3], [1, 2])):
        rows = q.reshape(4, run, 4, 16)[np.array(runs)].reshape(1, 2 * run, 4, 16)
        found = part_of_prompt_attention(rows, k, v, 0.25, jnp.int32(part), 2)
        expected = whole[np.array(runs)].reshape(found.shape)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


# A whole text's attention, as evaluation and calibration have it.

G = 16


@functools.partial(jax.jit, static_argnames=("length", "dtype", "batch"))
def text(length: int, dtype=jnp.float32, batch: int = 1):
    """Queries of 4 heads, own tokens and past tokens of 2, [B, S, ·, 16]."""
    keys = jax.random.split(jax.random.key(length), 5)
    q, *rest = (
        jax.random.normal(key, (batch, length, heads, 16)).astype(dtype)
        for key, heads in zip(keys, (4, 2, 2, 2, 2), strict=True)
    )
    return 2 * q, Tokens(*rest[:2]), Tokens(*rest[2:])


def by_the_formula(q, own, past, read, sm_scale):
    """[S, S] scores at once, from `read`: the past in planes, as the view has it."""
    s = q.shape[1]
    t = np.arange(s)
    coded = t < (G * np.maximum(0, t // G - 1))[:, None]  # [query, token]
    before, itself = t < t[:, None], np.eye(s, dtype=bool)

    def dot(x):
        wide = np.repeat(np.asarray(x, np.float64), 2, 2)
        return np.einsum("bshd,bthd->bhst", np.asarray(q, np.float64), wide)

    scores = np.where(coded, dot(read.keys), dot(past.keys))
    scores = np.where(itself, dot(own.keys), np.where(before, scores, -np.inf)) * sm_scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = 0
    for mask, tokens in ((coded, read), (~coded & before, past), (itself, own)):
        values = np.repeat(np.asarray(tokens.values, np.float64), 2, 2)
        out += np.einsum("bhst,bthd->bshd", np.where(mask, weights, 0), values)
    return out


@functools.partial(jax.jit, static_argnames="view")  # op by op it takes four times as long
def as_read(past, view):
    if view == "full":
        return past
    pairs = ((quantize_keys, dequantize_keys), (quantize_values, dequantize_values))
    padding = ((0, 0), (0, -past.keys.shape[1] % G), (0, 0), (0, 0))
    read = [
        dequantize(quantize(jnp.pad(x, padding).swapaxes(1, 2), G), view)
        for x, (quantize, dequantize) in zip(past, pairs, strict=True)
    ]
    return Tokens(*(x.swapaxes(1, 2)[:, : past.keys.shape[1]] for x in read))


@pytest.mark.parametrize("view", ["full", "int8", "int4"])
@pytest.mark.parametrize(
    ("length", "batch"), [(1, 1), (3 * G + 1, 2), (KEY_BLOCK, 1), (KEY_BLOCK + QUERY_BLOCK + 5, 1)]
)
def test_each_position_of_a_text_reads_what_the_schedule_says(view, length, batch):
    q, own, past = text(length, batch=batch)
    attend = jax.jit(functools.partial(attend_coded, read=Read(view), group_size=G, sm_scale=0.25))
    wanted = by_the_formula(q, own, past, as_read(past, view), 0.25)
    np.testing.assert_allclose(attend(q, own, past), wanted, atol=2e-5)


def test_a_text_of_bfloat16_is_multiplied_in_it_and_summed_in_float32():
    """So that tensor cores do it; and the result is no worse for it than its operands are."""
    q, own, past = text(5 * G, jnp.bfloat16)
    attend = functools.partial(attend_coded, read=Read("int4"), group_size=G, sm_scale=0.25)
    lowered = jax.jit(attend).lower(q, own, past).as_text()
    types = r"dot_general.*: \((tensor<.*?>), (tensor<.*?>)\) -> (tensor<.*>)"
    products = re.findall(types, lowered)
    assert len(products) == 2, "one of queries and keys, one of weights and values"
    for left, right, sums in products:
        assert left.endswith("xbf16>")
        assert right.endswith("xbf16>")
        assert sums.endswith("xf32>")
    wanted = by_the_formula(q, own, past, as_read(past, "int4"), 0.25)
    np.testing.assert_allclose(jax.jit(attend)(q, own, past), wanted, atol=0.06)


def test_a_text_s_attention_takes_memory_in_proportion_to_its_length():
    attend = functools.partial(attend_coded, read=Read("int4"), group_size=G, sm_scale=0.25)

    def needed(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        tokens = Tokens(shape, shape)
        compiled = jax.jit(attend).lower(shape, tokens, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, two, four = (needed(n * 1024) for n in (1, 2, 4))
    assert four - two <= 2 * (two - one) * 1.05
    assert four < 4 * 4096**2  # one head's scores alone would be as much
