"""`quantspec bench decode`: what it counts, and what a simulated acceptance does."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantspec_jax import cost, memory
from quantspec_jax.bench import decode as bench
from quantspec_jax.bench import record
from quantspec_jax.bench.kernels import shapes_of
from quantspec_jax.bench.launches import launches_a_round
from quantspec_jax.bench.simulated import Simulated
from quantspec_jax.cli import main, make_parser
from quantspec_jax.cost import Costs, Reading, best_reading, bytes_read
from quantspec_jax.engine import prepare
from quantspec_jax.loading import Model
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.module import init_params
from quantspec_jax.models.parameters import parameter_shapes
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.sizes import draft_bytes

TINY = ModelConfig("llama", 300, 64, 128, 1, 4, 2, 32, 4096)


@pytest.fixture
def render():
    path = Path(__file__).parents[2] / "benchmarks" / "render.py"
    spec = importlib.util.spec_from_file_location("render", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "tiny", TINY)


def test_shapes_of_a_model_are_those_of_its_layers():
    found = shapes_of("tiny", TINY, 1024, 32)
    layer = parameter_shapes(TINY)
    *products, (inputs, outputs) = found.matmul.values()
    assert (inputs, *outputs) == layer["lm_head.kernel"].shape
    for names, (inputs, outputs) in zip(
        (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)), products, strict=True
    ):
        assert [(inputs, n) for n in outputs] == [
            layer[f"layers.0.{name}.kernel"].shape for name in names
        ]
    assert {row[1:3] for row in found.attention} == {(1024, TINY.num_kv_heads)}
    assert (found.heads, found.head_dim, found.group) == (TINY.num_heads, TINY.head_dim, 32)


@pytest.mark.parametrize("alphas", [(0.0,), (0.3,), (1.0,), (0.95, 0.8, 0.6)])
def test_simulated_acceptance_is_a_run_of_successes(alphas):
    """Each with the probability of its place."""
    gamma, draws = 4, 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    best = jnp.full((draws, gamma + 1), 7, jnp.int32)
    none_right = jnp.zeros((draws, gamma), jnp.int32)
    rest = (none_right, jnp.full(draws, gamma), keys, jnp.ones(draws, jnp.int32))
    verdict = Simulated(alphas).greedy(best, *rest)
    reached = np.cumprod([alphas[min(i, len(alphas) - 1)] for i in range(gamma)])
    for i, share in enumerate(reached):
        assert float((verdict.accepted > i).mean()) == pytest.approx(share, abs=0.015)
    assert int(verdict.accepted.max()) <= gamma
    assert (verdict.token == 7).all()


def test_what_drafts_read_is_what_generate_would_choose(tiny_preset, monkeypatch, capsys):
    """By the context and by how many are drafted; named, it is what was asked for."""
    few = (Reading(), Reading("top-pages", 0.25, 0.9))
    chosen = functools.partial(best_reading, readings=few)
    monkeypatch.setattr(prepare, "best_reading", chosen)
    monkeypatch.setattr(cost, "LAYER_BYTES", 0.0)
    model = Model(TINY, init_params(TINY, jax.random.key(0), jnp.float32), draft=DraftConfig())

    def shares(*options):
        line = ["bench", "decode", "--preset", "tiny", "--context", "640", *options]
        setting = bench.Setting(model, make_parser().parse_args(line))
        calls = ((640, 4), (4096, 4), (4096, 0))
        return [setting.policy(context, drafted).share for context, drafted in calls]

    assert shares("--draft-policy", "auto") == [1, 0.25, 1]
    assert shares("--draft-policy", "top-pages", "--draft-share", "0.5") == [0.5, 0.5, 1]
    assert shares() == [1, 1, 1]
    both = ["--draft-policy", "auto", "--draft-share", "0.5"]
    assert main(["bench", "decode", "--preset", "tiny", "--context", "640", *both]) == 2
    assert "draft_share is 0.5" in capsys.readouterr().err


def test_a_run_reports_every_mode_beside_the_baseline(tiny_preset, capsys, tmp_path):
    options = "--context 640 --mode full quantspec --gamma 2 --rounds 8 --repeat 2 --draft-group 32"
    arguments = [*options.split(), "--dtype", "float32", "--simulate-acceptance", "0.8", "--json"]
    arguments += ["--output", str(tmp_path / "decode-tiny.json")]
    arguments += ["--plot", str(tmp_path / "decode.svg")]
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
    assert (full["drafted_a_round"], quantspec["drafted_a_round"]) == (0, 2)
    assert quantspec["tokens_a_round"] == pytest.approx(1 + 2 * quantspec["acceptance"], abs=0.25)
    ratio = quantspec["tokens_per_second"] / full["tokens_per_second"]
    assert quantspec["speed_up"] == pytest.approx(ratio)
    for row in result["rows"]:
        a_round, inside = row["milliseconds_a_round"], row["milliseconds_without_call"]
        assert a_round == pytest.approx(inside + row["milliseconds_a_call"] / 8)
        assert row["percent_of_floor_without_call"] * inside == pytest.approx(
            row["percent_of_floor"] * a_round
        )
    (predicted,) = result["predictions"]
    assert predicted["acceptance"] == 0.8
    costs = bytes_read(TINY, DraftConfig(group_size=32), 640, itemsize=4)
    assert predicted["gamma_by_bytes"] == costs.best_gamma(0.8)
    assert "gamma_by_milliseconds" not in predicted
    recorded = json.loads((tmp_path / "decode-tiny.json").read_text())
    assert recorded["rows"] == result["rows"]
    assert "--context 640" in recorded["command"]
    assert str(tmp_path) not in recorded["command"]
    drawn = (tmp_path / "decode.svg").read_text()
    assert all(f"<!-- {row['mode']} -->" in drawn for row in result["rows"])


def test_auto_is_adaptive_and_as_wide_as_the_most_that_it_drafts():
    verify, fixed, auto = bench.cases(["verify"], ["auto"]) + bench.cases(
        ["quantspec"], [2, "auto"]
    )
    assert (verify.width, verify.gamma) == (auto.width, 0)
    assert (fixed.gamma, fixed.width, fixed.adaptive) == (2, 3, False)
    assert (auto.gamma, auto.adaptive) == (auto.width - 1, True)


def test_runs_with_floors_make_a_roofline(render):
    row = {"context": 4096, "mode": "draft step", "floor_milliseconds": 1.5, "speed_up": 2.25}
    run = {"preset": "llama-2-7b", "device": "some GPU", "rows": [row, {"milliseconds": 3.0}]}
    without = render.Run(Path("b.json"), {"device": "a CPU", "rows": [{"milliseconds": 3.0}]})
    lines = render.roofline([render.Run(Path("a.json"), run), without])
    (line,) = "\n".join(lines).splitlines()[4:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["llama-2-7b", "4,096", "", "draft step", "1.5"]
    assert cells[-2:] == ["2.25", "some GPU"]
    assert render.roofline([without]) == []


def test_best_gamma_is_predicted_from_what_was_measured():
    modes = {"autoregressive full": 10.0, "draft step": 2.0, "verify step, gamma 4": 5.0}
    rows = [
        {"mode": mode, "milliseconds_a_round": ms, "acceptance": None, "drafted_a_round": 0}
        for mode, ms in modes.items()
    ]
    assert bench.prediction(rows, Costs(1, 1, 1), 1024, None) is None, "nothing was accepted"
    share = (0.9 + 0.9**2 + 0.9**3) / 3
    round_of_three = {"mode": "quantspec, gamma 3", "acceptance": share, "drafted_a_round": 3}
    rows.append({"milliseconds_a_round": 11.0} | round_of_three)
    found = bench.prediction(rows, Costs(1, 1, 1), 1024, None)
    assert found["acceptance"] == pytest.approx(0.9)
    assert found["gamma_by_milliseconds"] == Costs(10, 2, 5).best_gamma(0.9) > 1
    assert found["gamma_by_bytes"] == 1


def test_a_calls_own_time_is_what_a_shorter_one_says():
    args = types.SimpleNamespace(rounds=16)
    assert bench.lengths(args) == (16, 2)
    assert bench.call_and_round({16: 7.0 + 16 * 1.5, 2: 7.0 + 2 * 1.5}) == (7.0, 1.5)
    args.rounds = 7
    assert bench.lengths(args) == (7,)
    assert bench.call_and_round({7: 20.0}) == (None, None)


def launches_with(steps, chunks=()):
    """Of a loop of rounds in a loop of flushes, each round so many steps and a bit more, and loops
    of unknown length, whose turns are `chunks` steps."""

    def advance(n, x):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x @ x), x)

    def one_round(carry):
        x, i = carry
        x = advance(steps, x)
        for n in chunks:
            x = jax.lax.fori_loop(0, i, lambda _, x, n=n: advance(n, x), x)
        return jnp.cos(x), i + 1

    def until_flush(carry):
        x, i = jax.lax.while_loop(lambda c: c[0].sum() < 3, one_round, carry)
        return x * 2, i + 1

    def loop(x, n):
        return jax.lax.while_loop(lambda c: c[1] < n, until_flush, (x, 0))

    compiled = jax.jit(loop).lower(jnp.ones((32, 32)), 9).compile()
    return launches_a_round(compiled.as_text())


def test_launches_are_counted_by_the_turns_of_loops():
    few, many = launches_with(4), launches_with(9)
    step = (many - few) / 5
    assert step == int(step) >= 1
    assert few > 4 * step
    # A loop of unknown length counts once, whatever its turn is.
    one, other = launches_with(4, (4,)), launches_with(4, (9,))
    assert other - one == 5 * step
    assert one >= few + 4 * step
    assert launches_a_round(jax.jit(jnp.sin).lower(1.0).compile().as_text()) is None


@pytest.mark.parametrize("lacking", ["weights", "cache"])
def test_what_does_not_fit_is_refused_before_it_is_made(tiny_preset, monkeypatch, capsys, lacking):
    weights = memory.tree_bytes(init_params(TINY, jax.random.key(0), "bfloat16"))
    present = weights + draft_bytes(TINY, DraftConfig(group_size=128))
    limits = {"weights": weights, "cache": present + 100_000}
    made = []

    def counted(*given):
        made.append(init_params(*given))
        return made[0]

    def memory_stats():
        return {"bytes_limit": limits[lacking], "bytes_in_use": present if made else 0}

    device = types.SimpleNamespace(device_kind="a device", memory_stats=memory_stats)
    monkeypatch.setattr(bench, "init_params", counted)
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
    weights = memory.tree_bytes(init_params(TINY, jax.random.key(0), "float32"))
    assert row["peak_bytes"] == weights + row["state_bytes"] + row["temporary_bytes"]
    assert row["attention"] == "xla"
    # Two multiplications and additions a weight and token; attention comes on top.
    shapes = parameter_shapes(TINY)
    linear = sum(s.size for name, s in shapes.items() if name.startswith("layers")) / 1e12
    tera = row["tflop_per_second"] * row["milliseconds"] / 1e3
    assert 2 * linear * 600 < tera < 4 * linear * 600


@pytest.mark.parametrize(
    "wrong",
    [
        ["--simulate-acceptance", "1.5"],
        ["--batch", "0"],
        ["--gamma", "0"],
        ["--context", "10"],
        ["--plot", "speed.txt"],
    ],
)
def test_bad_options_are_refused(wrong, tiny_preset, capsys):
    assert main(["bench", "decode", "--preset", "tiny", *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err


def test_the_recorded_command_gives_the_same_options():
    """An empty list is no option, and a zero is one."""
    for line in (
        "kernels --kernel attention",
        "decode --simulate-acceptance 0 --context 512",
        "decode --mesh tp=2,cp=4",
    ):
        given = make_parser().parse_args(["bench", *line.split()])
        typed = record.command(f"quantspec bench {given.bench}", given).split()[1:]
        assert make_parser().parse_args(typed) == given
