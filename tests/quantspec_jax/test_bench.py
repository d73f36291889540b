"""`quantspec bench decode`: what it counts, and what a simulated acceptance does."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantspec_jax import memory
from quantspec_jax.bench import decode as bench
from quantspec_jax.cli import main
from quantspec_jax.config import DraftConfig, ModelConfig
from quantspec_jax.draft import draft_bytes
from quantspec_jax.generate.accept import Verdict, simulate
from quantspec_jax.models.parameters import parameter_shapes

TINY = ModelConfig("llama", 300, 64, 128, 2, 4, 2, 32, 4096)


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "tiny", TINY)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_simulated_acceptance_is_a_run_of_successes(alpha):
    gamma, draws = 4, 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    found = Verdict(jnp.zeros(draws, jnp.int32), jnp.full(draws, 7, jnp.int32))
    verdict = simulate(found, jnp.full(draws, gamma), keys, jnp.zeros(draws, jnp.int32), alpha)
    expected = sum(alpha ** (i + 1) for i in range(gamma))
    assert float(verdict.accepted.mean()) == pytest.approx(expected, abs=0.04)
    assert int(verdict.accepted.max()) <= gamma
    np.testing.assert_array_equal(verdict.token, found.token)


def test_a_run_reports_every_mode_beside_the_baseline(tiny_preset, capsys):
    options = "--context 640 --mode full quantspec --gamma 2 --rounds 8 --repeat 2 --draft-group 32"
    arguments = [*options.split(), "--dtype", "float32", "--simulate-acceptance", "0.8", "--json"]
    assert main(["bench", "decode", "--preset", "tiny", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    full, quantspec = result["rows"]
    assert result["simulated_acceptance"] == 0.8
    assert (full["mode"], full["tokens_a_round"], full["speed_up"]) == (
        "autoregressive full",
        1.0,
        1.0,
    )
    assert full["acceptance"] is None
    assert not full["acceptance_is_simulated"]
    assert quantspec["acceptance_is_simulated"]
    assert 0.3 < quantspec["acceptance"] <= 1
    assert quantspec["tokens_a_round"] == pytest.approx(1 + 2 * quantspec["acceptance"], abs=0.25)
    ratio = quantspec["tokens_per_second"] / full["tokens_per_second"]
    assert quantspec["speed_up"] == pytest.approx(ratio)


@pytest.mark.parametrize("lacking", ["weights", "cache"])
def test_what_does_not_fit_is_refused_before_it_is_made(tiny_preset, monkeypatch, capsys, lacking):
    weights = memory.tree_bytes(bench.random_params(TINY, "bfloat16"))
    present = weights + draft_bytes(TINY, DraftConfig(group_size=128))
    limits = {"weights": weights, "cache": present + 100_000}
    made = []

    def random_params(*given):
        made.append(bench_random_params(*given))
        return made[0]

    def memory_stats():
        return {"bytes_limit": limits[lacking], "bytes_in_use": present if made else 0}

    bench_random_params = bench.random_params
    device = types.SimpleNamespace(device_kind="a device", memory_stats=memory_stats)
    monkeypatch.setattr(bench, "random_params", random_params)
    monkeypatch.setattr(memory, "device", lambda: device)
    monkeypatch.setattr(bench, "read_ceiling", lambda: 1.0)
    options = ["--preset", "tiny", "--context", "3000", "--mode", "full"]
    assert main(["bench", "decode", *options]) == 2
    error = capsys.readouterr().err
    assert f"a device has {limits[lacking]:,} bytes" in error
    assert lacking in error
    assert bool(made) == (lacking == "cache")


def test_a_prefill_is_timed_and_its_memory_counted(tiny_preset, capsys):
    options = ["--preset", "tiny", "--context", "300", "--repeat", "1", "--dtype", "float32"]
    assert main(["bench", "prefill", *options, "--batch", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = result["rows"]
    assert row["tokens_per_second"] == pytest.approx(600 / row["milliseconds"] * 1e3)
    weights = memory.tree_bytes(bench.random_params(TINY, "float32"))
    assert row["peak_bytes"] == weights + row["state_bytes"] + row["temporary_bytes"]
    assert row["attention"] == "xla"
    # Two multiplications and additions a weight and token; attention comes on top.
    shapes = parameter_shapes(TINY)
    linear = sum(s.size for name, s in shapes.items() if name.startswith("layers")) / 1e12
    tera = row["tflop_per_second"] * row["milliseconds"] / 1e3
    assert 2 * linear * 600 < tera < 4 * linear * 600


@pytest.mark.parametrize(
    "wrong",
    [["--simulate-acceptance", "1.5"], ["--batch", "0"], ["--gamma", "0"], ["--context", "10"]],
)
def test_bad_options_are_refused(wrong, tiny_preset, capsys):
    assert main(["bench", "decode", "--preset", "tiny", *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err
