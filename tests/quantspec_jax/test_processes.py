"""Several processes: the command line's, two of four virtual devices each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quantspec_jax as qs

DEVICES = "--xla_force_host_platform_device_count="
DECODING = ("--max-new-tokens", "8", "--gamma", "2", "--ignore-eos", "--json")
PROMPTS = ("The cache is stored once", "in two planes of four bits each.")


def start(model: Path, devices: int, *options: str) -> subprocess.Popen[str]:
    call = [sys.executable, "-m", "quantspec_jax.cli", "generate", "--model", str(model)]
    call += [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}{devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*call, *DECODING, *options], env=environment, text=True, **pipes)


def coordinator() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def several(number: int, where: str, index: int) -> tuple[str, ...]:
    which = ("--num-processes", str(number), "--process-id", str(index))
    return ("--mesh", "dp=2,cp=2,tp=2", "--coordinator", where, *which)


def test_two_processes_make_what_one_device_makes(converted):
    where = coordinator()
    both = [start(converted, 4, *several(2, where, i)) for i in range(2)]
    config = qs.GenerateConfig(max_new_tokens=8, gamma=2, ignore_eos=True)
    wanted = qs.generate(qs.load(str(converted), dtype="float32"), PROMPTS, config).tokens
    (out, said), (nothing, silence) = (each.communicate(timeout=200) for each in both)
    assert [each.returncode for each in both] == [0, 0], said + silence
    assert nothing == ""
    assert "quantspec:" in said
    assert "quantspec:" not in silence
    assert [each["tokens"] for each in json.loads(out)["outputs"]] == wanted
    assert [len(tokens) for tokens in wanted] == [8, 8]


def test_a_process_that_does_not_come_is_no_hang(converted):
    began = time.monotonic()
    waiting = start(converted, 4, *several(2, coordinator(), 1), "--process-timeout", "3")
    _, said = waiting.communicate(timeout=60)
    assert waiting.returncode == 1
    assert "error: not all processes met at" in said.splitlines()[-1]
    assert time.monotonic() - began < 30


def test_a_process_that_fails_ends_the_others(converted, tmp_path):
    """One of the two has no model."""
    where, short = coordinator(), ("--process-timeout", "5")
    whole = start(converted, 4, *several(2, where, 0), *short)
    failing = start(tmp_path / "none", 4, *several(2, where, 1), *short)
    _, why = failing.communicate(timeout=60)
    assert failing.returncode == 2
    assert "does not exist" in why
    began = time.monotonic()
    _, said = whole.communicate(timeout=60)
    assert whole.returncode not in (0, None)
    assert "another task died" in said or "error:" in said
    assert time.monotonic() - began < 45


@pytest.fixture(scope="module")
def converted(make_tiny_llama, tmp_path_factory) -> Path:
    import convert
    from quantspec_jax.weights.formats import DraftConfig

    folder = tmp_path_factory.mktemp("processes")
    (folder / "source").mkdir()
    source = make_tiny_llama(folder / "source", num_hidden_layers=1)
    draft = DraftConfig(group_size=16)
    return convert.convert(source, folder / "model", draft=draft, progress=False)
