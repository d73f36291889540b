"""Every kernel becomes machine code for every generation of GPUs. `pytest -m assemble`, no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels import devices

pytestmark = pytest.mark.assemble


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_every_kernel_assembles(capability):
    """A process each: an older JAX ends it where it cannot."""
    assert importlib.util.find_spec("jax_plugins.xla_cuda12"), "pip install .[assemble]"
    major, minor = map(int, capability.split("."))
    if (reason := devices.generation((major, minor)).unsupported) is not None:
        pytest.skip(f"{reason}: {jax.__version__}")
    script = Path(__file__).with_name("assembled.py")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    ran = subprocess.run(
        [sys.executable, script, capability], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-3000:]
    found = [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("assembled")]
    clustered = {"logit_filter"} if devices.generation((major, minor)).clusters else set()
    assert {*found} == clustered | {
        "add_rms_norm", "all_gather", "all_reduce", "bf16_matmul", "int4_matmul", "kv_attention",
        "merge", "most_voted", "page_votes", "quantize_keys", "quantize_values", "rms_norm",
        "rope_append", "in_place",
    }  # fmt: skip
