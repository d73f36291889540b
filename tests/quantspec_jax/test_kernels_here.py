"""Which kernels are said to run on the device at hand, for a model's shapes, and why not."""

from __future__ import annotations

import dataclasses
import types

import jax
import pytest

from pallas_kernels import dispatch
from quantspec_jax.dtypes import FLOAT32
from quantspec_jax.kernels import kernels_here, lines
from quantspec_jax.models.presets import PRESETS

LLAMA = PRESETS["llama-3.1-8b"]


@pytest.fixture
def on(monkeypatch):
    """Takes the default device for one of a compute capability, under a version of JAX."""

    def pretend(capability: str, version: str) -> None:
        device = types.SimpleNamespace(
            device_kind="NVIDIA A", compute_capability=capability, core_count=7
        )
        monkeypatch.setattr(dispatch, "cuda_device", lambda: device)
        monkeypatch.setattr(jax, "__version__", version)
        numbers = tuple(map(int, version.split(".")))
        monkeypatch.setattr(jax, "__version_info__", numbers)

    return pretend


@pytest.mark.parametrize(
    ("capability", "copies", "kib"),
    [("8.0", "by the threads", 163), ("9.0", "in bulk", 227), ("12.0", "in bulk", 99)],
)
def test_all_kernels_run_for_a_common_model(on, capability, copies, kib):
    on(capability, "0.11.0")
    found = kernels_here(LLAMA)
    clusters = "it takes clusters, compute capability 9.0 or later"
    without = {"logit_filter": clusters} if capability == "8.0" else {}
    assert found["kernels"] == dict.fromkeys(dispatch.KERNELS) | without
    device, kernels, *left = lines(found)
    assert left == [f"in XLA: {name}; {reason}" for name, reason in without.items()]
    assert f"compute capability {capability}), 7 multiprocessors, {kib} KiB" in device
    assert all((name in kernels) != (name in without) for name in dispatch.KERNELS)
    assert f"copies {copies}, configurations by rule" in kernels


@pytest.mark.parametrize(
    ("capability", "version", "why"),
    [
        ("7.5", "0.11.0", "takes compute capability 8.0 or later"),
        ("8.9", "0.10.2", "it takes JAX 0.11 or later to compile them, and this is 0.10.2"),
    ],
)
def test_a_device_without_kernels_says_why(on, capability, version, why):
    on(capability, version)
    _, reason = lines(kernels_here(LLAMA))
    assert reason.startswith("in XLA: " + ", ".join(dispatch.KERNELS))
    assert why in reason


def test_a_models_shapes_decide(on):
    on("12.0", "0.11.0")
    wide = dataclasses.replace(LLAMA, head_dim=256, num_heads=16)
    assert kernels_here(wide)["kernels"]["kv_attention"] == (
        "no configuration fits the shape into shared memory"
    )
    odd = kernels_here(dataclasses.replace(LLAMA, head_dim=80, intermediate_size=14344))
    assert "14344 outputs" in odd["kernels"]["int4_matmul"]
    assert "head_dim is 80" in odd["kernels"]["kv_attention"]
    assert "head_dim is 80" in odd["kernels"]["quantize_pack"]
    assert odd["kernels"]["rope_append"] is None
    assert len(lines(odd)) == 5
    wide = kernels_here(LLAMA, None, FLOAT32)["kernels"]
    assert wide.pop("page_choice") is wide.pop("logit_filter") is None  # float32 in any case
    assert all("bfloat16" in why for why in wide.values())
