"""Which attention a prompt runs in, and that cuDNN's lowers for CUDA without a GPU."""

from __future__ import annotations

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from pallas_kernels import dispatch
from quantspec_jax.models.attention import causal_attention, prompt_attention, uses_cudnn


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
