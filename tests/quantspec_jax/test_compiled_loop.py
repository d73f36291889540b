"""How many launches a round is, as XLA compiles it for a GPU. `pytest -m assemble`, no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.assemble


@pytest.fixture(scope="module")
def launches() -> dict[tuple[str, int], dict]:
    """By policy and number of layers."""
    assert importlib.util.find_spec("jax_plugins.xla_cuda12"), "pip install .[assemble]"
    script = Path(__file__).with_name("compiled_loop.py")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    # What is chosen by running it cannot be chosen here.
    environment["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    paths = [
        str(script.parents[1] / "pallas_kernels"),
        *environment.get("PYTHONPATH", "").split(":"),
    ]
    environment["PYTHONPATH"] = ":".join(filter(None, paths))
    ran = subprocess.run(
        [sys.executable, script, "9.0"], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-3000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return {(row["policy"], row["layers"]): row for row in rows}


def test_top_pages_adds_three_launches_to_a_round(launches):
    """Votes, the choice, and how many pages there are: however many layers there are."""
    for layers in (2, 3):
        added = launches["top-pages", layers]["round"] - launches["all", layers]["round"]
        assert 2 <= added <= 3


def test_a_layer_of_a_draft_is_seven_launches(launches):
    """Whichever pages it reads: q, k and v; RoPE; attention and its merge; o; gate and up; down."""
    for policy in ("all", "window", "top-pages"):
        steps = [launches[policy, layers]["draft_step"] for layers in (2, 3)]
        assert steps[1] - steps[0] == 7


def test_what_a_draft_step_pays_outside_of_its_layers(launches):
    """Position, cos and sin, embedding, lm_head, argmax in two, the token twice, and the turn."""
    for policy in ("all", "window", "top-pages"):
        assert launches[policy, 2]["draft_step"] - 2 * 7 <= 10
