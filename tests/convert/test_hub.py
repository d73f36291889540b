"""Hub ids without the hub: from the local cache, or an error within seconds."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import sys
sys.modules["torch"] = None  # where users run it is not there; to import it takes seconds
import convert
checkpoint = convert.open_source("owner/tiny-model")
print(type(checkpoint).__name__, checkpoint.config.family, checkpoint.source_dtype.name)
print(len(checkpoint.load("float32")))
"""


@pytest.fixture
def cache(llama_dir, tmp_path) -> Path:
    """A hub cache that holds owner/tiny-model, as a download leaves it."""
    repo = tmp_path / "hub" / "models--owner--tiny-model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(llama_dir, repo / "snapshots" / COMMIT)
    return tmp_path / "hub"


def run(cache: Path, endpoint: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """The program in a process of its own: the hub's client reads its settings when imported."""
    paths = {"HF_HUB_CACHE": str(cache), "HF_HOME": str(cwd), "HF_ENDPOINT": endpoint}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **paths, **environment},
        timeout=120,
    )


NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused


def test_a_cached_model_opens_without_network(cache, tmp_path):
    result = run(cache, NOBODY, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["HuggingFaceCheckpoint", "llama", "float32", "4"]


def test_a_cached_model_opens_in_offline_mode(cache, tmp_path):
    result = run(cache, "https://huggingface.co", tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr


def test_a_model_that_is_not_cached_is_an_error_at_once(tmp_path):
    start = time.monotonic()
    result = run(tmp_path / "empty", NOBODY, tmp_path)
    assert time.monotonic() - start < 30  # most of it imports
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "owner/tiny-model" in last
    assert "neither a path nor in the local hub cache" in last


def test_a_hub_that_does_not_answer_is_given_up_within_seconds(tmp_path):
    """The connection is made and nothing ever comes."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        result = run(tmp_path / "empty", endpoint, tmp_path)
        assert time.monotonic() - start < 40
    assert result.returncode != 0
    assert "out of reach" in result.stderr.strip().splitlines()[-1]


def test_weights_that_are_not_cached_are_an_error(cache, tmp_path):
    """The small files are there: opening works, loading names the trouble."""
    (weights,) = cache.rglob("model.safetensors")
    weights.unlink()
    result = run(cache, NOBODY, tmp_path)
    assert result.stdout.split()[0] == "HuggingFaceCheckpoint"
    assert "model.safetensors" in result.stderr.strip().splitlines()[-1]
