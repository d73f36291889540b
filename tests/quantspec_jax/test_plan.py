"""Plans follow from the cost model, change as they must, and say why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from quantspec_jax import cli
from quantspec_jax.axes import Axes
from quantspec_jax.cache import create
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.commands.options import draft_config
from quantspec_jax.commands.plan import candidates_and_source as candidates
from quantspec_jax.commands.plan import meeting_microseconds, over_mesh, with_whole_groups
from quantspec_jax.cost import (
    ALL_PAGES,
    READINGS,
    Reading,
    bytes_read,
    linear_weights,
    tokens_a_round,
)
from quantspec_jax.models.parameters import nest, parameter_shapes
from quantspec_jax.models.presets import PRESETS
from quantspec_jax.planning.candidates import (
    DEFAULT_FORMATS,
    Candidate,
    default_candidates,
    reading_less,
)
from quantspec_jax.planning.devices import DEVICES, Device, Efficiency
from quantspec_jax.planning.plan import plan, recommendation
from quantspec_jax.planning.recorded import measured_readings, measured_speed
from quantspec_jax.planning.report import notes, reasons
from quantspec_jax.planning.setting import GIB, Setting
from quantspec_jax.sharding import abstract_mesh, cache_shardings, param_shardings
from quantspec_jax.weights.entries import quantize_params
from quantspec_jax.weights.formats import DraftConfig, WeightFormat
from quantspec_jax.weights.sizes import bits_per_weight, draft_bytes

LLAMA = dataclasses.replace(PRESETS["llama-2-7b"], num_layers=4)
WEIGHTS = linear_weights(LLAMA)
DEVICE = Device(None, 1000)
FOUR_BITS = DraftConfig(group_size=64)
CACHE_ALONE = DraftConfig(bits=None)


def candidate(acceptance: float, config: DraftConfig = FOUR_BITS) -> Candidate:
    return Candidate(config.describe(), acceptance, config)


def recommend(context=32768, acceptance=0.9, config=FOUR_BITS, **setting):
    setting = Setting(LLAMA, context, **{"device": DEVICE, **setting})
    return recommendation(plan(setting, [candidate(acceptance, config)]).chosen)


def test_times_are_bytes_over_bandwidth():
    found = plan(Setting(LLAMA, 32768, DEVICE), [candidate(0.9)]).to_dict()
    costs = bytes_read(LLAMA, FOUR_BITS, 32768)
    assert found["plain"]["full"]["milliseconds_a_token"] == pytest.approx(costs.plain / 1e9)
    assert found["plain"]["int8"]["milliseconds_a_token"] == pytest.approx(costs.verify / 1e9)
    (row,) = found["candidates"]
    assert row["draft_milliseconds"] == pytest.approx(costs.draft / 1e9)
    for each in row["gammas"]:
        gamma = each["gamma"]
        spent = (gamma * costs.draft + costs.verify) / 1e9
        assert each["milliseconds_a_token"] == pytest.approx(spent / tokens_a_round(0.9, gamma))
        assert each["speed_up"] == pytest.approx(costs.speed_up(0.9, gamma))
    assert row["gamma"] == costs.best_gamma(0.9)


def test_the_fastest_of_all_formats_and_gammas_is_recommended():
    formats = [candidate(0.7), candidate(0.97, CACHE_ALONE), candidate(0.9, DraftConfig(bits=8))]
    for context in (1024, 8192, 131072):
        found = plan(Setting(LLAMA, context, DEVICE), formats).to_dict()
        every = [g["milliseconds_a_token"] for row in found["candidates"] for g in row["gammas"]]
        every += [row["milliseconds_a_token"] for row in found["plain"].values()]
        assert found["recommendation"]["milliseconds_a_token"] == min(every)


def test_poor_acceptance_means_few_proposals_and_then_none():
    gammas = [recommend(acceptance=a)["gamma"] for a in (0.97, 0.9, 0.8, 0.5)]
    assert gammas == sorted(gammas, reverse=True)
    assert gammas[0] > gammas[-1] == 1
    plain = recommend(acceptance=0.05)
    assert (plain["mode"], plain["gamma"], plain["draft"]) == ("autoregressive", None, None)
    assert plain["options"] == "--mode autoregressive --kv int8"


def test_a_four_bit_cache_alone_pays_at_long_contexts_only():
    assert recommend(1024, 0.97, CACHE_ALONE)["mode"] == "autoregressive"
    long = recommend(131072, 0.97, CACHE_ALONE)
    assert long["mode"] == "quantspec"
    assert long["options"] == f"--draft-bits none --gamma {long['gamma']}"


def test_slow_drafts_are_given_less_to_do():
    fast = recommend(acceptance=0.93)
    slow = recommend(acceptance=0.93, efficiency=Efficiency(draft=0.7))
    assert slow["gamma"] < fast["gamma"]
    assert slow["speed_up"] < fast["speed_up"]
    # What slows every pass changes nothing but the time.
    half = recommend(acceptance=0.93, efficiency=Efficiency(0.5, 0.5, 0.5))
    assert half["gamma"] == fast["gamma"]
    assert half["milliseconds_a_token"] == pytest.approx(2 * fast["milliseconds_a_token"])


def test_large_batches_are_bound_by_arithmetic():
    """γ + 1 rows a sequence cost as many products: at a large batch proposals are not free."""
    slow_products = dataclasses.replace(DEVICE, teraflops=100)
    gammas = [recommend(1024, 0.95, device=slow_products, batch=b)["gamma"] for b in (1, 64)]
    assert gammas[1] is None or gammas[1] < gammas[0]
    unlimited = [recommend(1024, 0.95, batch=b)["gamma"] for b in (1, 64)]
    assert unlimited[1] > 1


def test_what_does_not_fit_is_not_recommended():
    formats = [candidate(0.9), candidate(0.97, CACHE_ALONE)]
    free = plan(Setting(LLAMA, 32768, Device(1000, 1000)), formats).to_dict()
    needed = {row["draft"]: row["needed_bytes"] for row in free["candidates"]}
    assert free["recommendation"]["draft"] == FOUR_BITS.describe()
    assert needed[FOUR_BITS.describe()] - needed["full weights"] == pytest.approx(
        bits_per_weight(LLAMA, FOUR_BITS) / 8 * WEIGHTS
    )
    between = (needed["full weights"] + needed[FOUR_BITS.describe()]) / 2 / GIB
    found = plan(Setting(LLAMA, 32768, Device(between, 1000)), formats)
    tight = found.to_dict()
    assert tight["recommendation"]["draft"] == "full weights"
    assert tight["plain"]["full"]["fits"] is False  # twice the cache
    assert tight["plain"]["int8"]["fits"] is True
    (reason,) = [r for r in reasons(found) if r.startswith(FOUR_BITS.describe())]
    assert f"{needed[FOUR_BITS.describe()]:,} bytes, and there are {int(between * GIB):,}" in reason
    nothing = plan(Setting(LLAMA, 32768, Device(1, 1000)), formats)
    assert nothing.to_dict()["recommendation"] is None
    assert len(reasons(nothing)) == 4


def test_unknown_memory_is_not_judged():
    found = plan(Setting(LLAMA, 32768, DEVICE), [candidate(0.9)])
    assert {row.fits for row in (*found.drafted, *found.plain)} == {None}


def test_a_given_acceptance_scales_the_other_formats():
    found, _ = candidates(0.9)
    given = {each.config: each.acceptance for each in found}
    known = {each.config: each.acceptance for each in default_candidates()}
    assert given[DraftConfig()] == pytest.approx(0.9)
    for config, acceptance in known.items():
        proportion = (1 - given[config]) / (1 - acceptance)
        assert proportion == pytest.approx(0.1 / (1 - known[DraftConfig()]))


def test_a_given_acceptance_is_that_of_the_stored_draft():
    for formats in ((), (("layers.0.q", WeightFormat(8)),)):
        stored = DraftConfig(group_size=32, method="gptq", formats=formats)
        found, source = candidates(0.9, stored=stored)
        assert found == [Candidate(stored.describe(), 0.9, stored)]
        assert stored.describe() in source
        (row,) = plan(Setting(LLAMA, 1024, DEVICE), found).to_dict()["candidates"]
        assert row["draft_bits_per_weight"] == bits_per_weight(LLAMA, stored)
        assert row["draft_read_bytes"] == bytes_read(LLAMA, stored, 1024).draft


def test_a_calibrated_draft_comes_with_what_makes_it():
    calibrated = DraftConfig(group_size=64, method="gptq")
    found = plan(Setting(LLAMA, 32768, DEVICE), [candidate(0.9, calibrated)])
    made = "quantspec convert --draft gptq --draft-bits 4 --draft-group 64"
    assert any(reason.endswith(made) for reason in reasons(found))
    found = plan(Setting(LLAMA, 32768, DEVICE), [candidate(0.9)])
    assert not any("convert" in reason for reason in reasons(found))


def test_acceptance_at_temperature_1_is_another():
    greedy, sampled = default_candidates(), default_candidates(sampled=True)
    assert all(s.acceptance > g.acceptance for g, s in zip(greedy, sampled, strict=True))


MIXED = DraftConfig(formats=(("layers.0.q", WeightFormat(8)), ("layers.39.o", WeightFormat(8))))


@pytest.fixture
def measured(tmp_path):
    """A sweep's file, with a mixed format made for another model."""
    drafts = [FOUR_BITS, MIXED]
    rows = [
        {
            "draft": draft.describe(),
            "draft_bits_per_weight": bits,
            "greedy_acceptance": greedy,
            "sampled_acceptance": 0.95,
        }
        for draft, bits, greedy in zip(drafts, (4.5, 5.0), (0.8, 0.93), strict=True)
    ]
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"rows": rows, "drafts": [d.to_dict() for d in drafts]}))
    return path


def test_measured_formats_are_the_candidates(measured):
    found, source = candidates(measured=str(measured))
    assert source == str(measured)
    assert [each.config for each in found] == [FOUR_BITS, MIXED]
    assert [each.acceptance for each in found] == [0.8, 0.93]
    assert {e.acceptance for e in candidates(measured=str(measured), sampled=True)[0]} == {0.95}
    rows = plan(Setting(LLAMA, 32768, DEVICE), found).to_dict()["candidates"]
    assert rows[0]["draft_bits_per_weight"] == bits_per_weight(LLAMA, FOUR_BITS)
    assert rows[1]["draft_bits_per_weight"] == 5.0
    more_bytes = rows[1]["draft_read_bytes"] - rows[0]["draft_read_bytes"]
    assert more_bytes == pytest.approx(WEIGHTS / 16)  # half a bit a weight
    assert found[1].options == ""  # it is stored with a checkpoint


def test_one_evaluation_is_a_candidate_too(tmp_path):
    path = tmp_path / "one.json"
    result = {"greedy_acceptance": 0.8, "draft": "a draft", "draft_bits_per_weight": 4.5}
    path.write_text(json.dumps(result))
    assert candidates(measured=str(path))[0] == [Candidate("a draft", 0.8, None, 4.5)]


def test_what_reading_less_costs_is_measured_with_the_drafts(tmp_path, measured):
    """Kept for all formats in the proportion that the sweep found for one."""
    run = json.loads(measured.read_text())
    assert measured_readings(str(measured)) == READINGS  # it says nothing of it
    less = {**run["rows"][0], "draft_policy": "top-pages", "draft_share": 0.25}
    run["rows"].append(less | {"greedy_acceptance": 0.72})
    run["drafts"].append(run["drafts"][0])
    path = tmp_path / "less.json"
    path.write_text(json.dumps(run))
    assert len(candidates(measured=str(path))[0]) == 2
    readings = measured_readings(str(path))
    assert readings == (ALL_PAGES, Reading("top-pages", 0.25, 0.72 / 0.8))
    found = reading_less(candidates(measured=str(path))[0], readings)
    assert [each.acceptance for each in found] == pytest.approx([0.8, 0.72, 0.93, 0.837])
    path.write_text(json.dumps(less))
    with pytest.raises(ValueError, match="a run with a draft that reads all of the cache"):
        candidates(measured=str(path))


def test_a_long_context_is_read_in_part_and_a_short_one_whole():
    """And what is recommended can be given to `generate`."""
    for context, whole in ((1024, True), (131072, False)):
        setting = Setting(PRESETS["llama-3.1-8b"], context, DEVICE)
        found = plan(setting, reading_less([candidate(0.93)]))
        advice = found.to_dict()["recommendation"]
        assert (advice["draft_share"] == 1) == whole
        assert ("--draft-policy" in advice["options"]) != whole
        assert len(found.formats) == 1
        best = min(found.drafted, key=lambda row: row.milliseconds_a_token)
        assert found.formats[0] is best


def write_speed(path, **more):
    modes = {"autoregressive full": 100, "draft step": 75, "verify step, gamma 4": 80}
    rows = [
        {"mode": mode, "context": context, "percent_of_floor": percent / divisor}
        for context, divisor in ((8192, 2), (131072, 1))
        for mode, percent in modes.items()
    ]
    path.write_text(json.dumps({"read_ceiling_gb_per_second": 4400, "rows": rows, **more}))
    return str(path)


def test_measured_speed_is_that_of_the_nearest_context(tmp_path):
    path = write_speed(tmp_path / "speed.json")
    assert measured_speed(path, 100_000) == (4400, Efficiency(1.0, 0.75, 0.8))
    assert measured_speed(path, 10_000) == (4400, Efficiency(0.5, 0.375, 0.4))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "allowed: one JSON object"),
        ("{}", "is not what `quantspec eval acceptance` writes: each of its rows has draft, "),
        ('{"rows": [1]}', "is not what `quantspec eval acceptance` writes"),
        ('{"draft": "d", "draft_bits_per_weight": 4, "greedy_acceptance": 7}', "acceptance is 7"),
    ],
)
def test_other_files_are_refused(text, words, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        candidates(measured=str(path))
    if words.startswith(("is not JSON", "allowed")):
        with pytest.raises(ValueError, match=re.escape(words)):
            measured_speed(str(path), 1000)


def test_speed_without_a_draft_step_is_refused(tmp_path):
    path = tmp_path / "speed.json"
    rows = [{"mode": "autoregressive full", "context": 8, "percent_of_floor": 90}]
    path.write_text(json.dumps({"read_ceiling_gb_per_second": 1, "rows": rows}))
    with pytest.raises(ValueError, match="lacks rows of mode 'draft step'"):
        measured_speed(str(path), 1000)


def test_devices_without_kernels_are_told(monkeypatch):
    def without(name: str, version: tuple[int, ...]) -> list[str]:
        monkeypatch.setattr(jax, "__version_info__", version)
        setting = Setting(LLAMA, 1, DEVICES[name])
        return [note for note in notes(setting) if "no kernel runs on this device" in note]

    assert "takes JAX 0.11 or later" in without("a100", (0, 10, 2))[0]
    assert not without("a100", (0, 11, 0))
    assert not without("h200", (0, 10, 2))


KINDS = ("greedy", "sampled")
DEFAULT_RUNS = (
    "draft-sweep-moby-dick-cpu-2026-11-22.json",
    "draft-sweep-pride-and-prejudice-cpu-2026-11-22.json",
)
CALIBRATED_RUN = "draft-weights-cpu-2026-11-22.json"
PLAN = ["plan", "--preset", "llama-2-7b", "--context", "32768"]


def test_json_is_all_of_standard_output(capsys):
    assert cli.main([*PLAN, "--device", "h200", "--acceptance", "0.9", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    result = json.loads(captured.out)
    assert result["model"] == "llama-2-7b"
    assert result["device"]["memory_gib"] == DEVICES["h200"].memory
    recommendation = result["recommendation"]
    assert recommendation["mode"] == "quantspec"
    options = recommendation["options"].split()
    arguments = ["generate", "--model", "m", "--prompt", "p", *options]
    parsed = cli.make_parser().parse_args(arguments)
    assert parsed.gamma == recommendation["gamma"]
    # A calibrated draft: the options that make it are those of `convert`.
    assert result["reasons"]
    (made,) = [r for r in result["reasons"] if "quantspec convert " in r]
    arguments = ["convert", "m", "out", *made.partition("quantspec convert ")[2].split()]
    parsed = cli.make_parser().parse_args(arguments)
    assert draft_config(parsed, parsed.draft).describe() == recommendation["draft"]


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 128, "symmetric": True, "layers": "mlp"},
        {"lm_head_bits": 4, "average_bits": 4.75},
    ],
)
def test_conversion_of_a_calibrated_draft_makes_it(options):
    calibrated = DraftConfig(method="gptq", **options)
    arguments = ["convert", "m", "out", *shlex.split(candidate(0.9, calibrated).conversion)]
    parsed = cli.make_parser().parse_args(arguments)
    assert draft_config(parsed, parsed.draft) == calibrated


def test_options_of_a_rounded_draft_make_it():
    for each in default_candidates():
        if each.options:
            options = shlex.split(each.options)
            arguments = ["generate", "--model", "m", "--prompt", "p", *options]
            parsed = cli.make_parser().parse_args(arguments)
            assert draft_config(parsed) == each.config


def test_the_table_shows_every_candidate_and_the_reasons(capsys):
    assert cli.main([*PLAN, "--device", "h200", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert cli.main([*PLAN, "--device", "h200"]) == 0
    text = capsys.readouterr().out
    for row in result["candidates"]:
        assert re.search(rf"\n{re.escape(row['draft'])}[ ,]", text)  # and what it reads
    for line in (*result["reasons"], *result["notes"]):
        assert f"- {line}" in text
    assert f"recommended: {result['recommendation']['draft']}" in text


def test_a_source_is_planned_without_its_weights(tiny_llama_dir, tmp_path, capsys):
    (tmp_path / "config.json").write_text((tiny_llama_dir / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    arguments = ["plan", str(tmp_path), "--context", "1024", "--bandwidth", "1", "--json"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["device"] == {
        "name": "the device",
        "bandwidth_gb_per_second": 1,
        "memory_gib": None,
    }
    assert result["recommendation"] is not None


def test_options_override_files_and_data_sheets(tmp_path, capsys):
    speed = write_speed(tmp_path / "speed.json")
    options = ["--device", "h100", "--speed", speed, "--memory", "40", "--draft-efficiency", "1"]
    assert cli.main([*PLAN, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["device"]["bandwidth_gb_per_second"] == 4400
    assert result["device"]["memory_gib"] == 40
    assert result["efficiency"] == {"plain": 0.5, "draft": 1.0, "verify": 0.4}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "--context", "1024"], "SOURCE --preset is required"),
        ([*PLAN], "--device is None; allowed: a100, "),
        ([*PLAN, "--device", "abacus"], "--device is 'abacus'; allowed: a100, "),
        ([*PLAN, "--bandwidth", "0"], "bandwidth is 0.0"),
        ([*PLAN, "--device", "h200", "--memory", "-1"], "memory is -1.0"),
        ([*PLAN, "--device", "h200", "--acceptance", "2"], "acceptance is 2.0"),
        ([*PLAN, "--device", "h200", "--batch", "0"], "batch is 0"),
        ([*PLAN, "--device", "h200", "--mesh", "tp=3"], "num_heads is 32; allowed: multiples of 3"),
        ([*PLAN, "--device", "h200", "--mesh", "dp=2"], "batch is 1; allowed: multiples of 2"),
        ([*PLAN, "--device", "h200", "--mesh", "tp=0"], "--mesh is {'tp': 0}"),
        ([*PLAN, "--device", "h200", "--draft-efficiency", "1.5"], "draft efficiency is 1.5"),
        ([*PLAN, "--device", "h200", "--measured", "gone.json"], "gone.json: No such file"),
        ([*PLAN, "--device", "h200", "--measured", "f", "--acceptance", "1"], "not allowed with"),
        ([*PLAN[:3], "--context", "200000", "--device", "h200"], "context is 200000; allowed: 1"),
        (["plan", "--preset", "gpt", "--context", "9", "--device", "h200"], "--preset is 'gpt'"),
        (["plan", "nowhere", "--context", "9", "--device", "h200"], "nowhere"),
    ],
)
def test_wrong_options_are_named(argv, words, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(("tp", "groups"), [(2, {64, 128}), (4, {64}), (8, set())])
def test_drafts_whose_groups_a_mesh_would_split_are_no_candidates(tp, groups):
    """11,008 channels of Llama-2-7B's MLP are 86 groups of 128, and 172 of 64."""
    model, _ = over_mesh(PRESETS["llama-2-7b"], {"tp": tp})
    found = with_whole_groups(default_candidates(), model, {"tp": tp})
    assert {each.config.group_size for each in found if each.config.bits} == groups
    assert any(each.config.bits is None for each in found)
    unknown = Candidate("somebody's", 0.9, bits=4.5)
    assert with_whole_groups([unknown], model, {"tp": tp}) == [unknown]


@pytest.mark.parametrize(
    ("channels", "words"), [(11_008, "2752 .*: 64, 32, 16, 8"), (11_004, "2751 .*: none, but bits")]
)
def test_a_stored_draft_that_a_mesh_would_split_is_refused(channels, words):
    model = dataclasses.replace(PRESETS["llama-2-7b"], intermediate_size=channels)
    stored = [Candidate("the checkpoint's", 0.9, DraftConfig(group_size=128))]
    with pytest.raises(ValueError, match=f"^draft group_size is 128; .* divides the {words}"):
        with_whole_groups(stored, model, {"tp": 4})


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"cp": 4}, {"tp": 16, "cp": 2}])
def test_memory_of_a_mesh_is_what_its_arrays_take_on_a_device(sizes):
    """16 devices have the 8 key-value heads twice."""
    shapes = dataclasses.replace(PRESETS["llama-3.1-70b"], num_layers=2)
    mesh = abstract_mesh(sizes)
    model, axes = over_mesh(shapes, sizes)
    setting = Setting(model, 131072, DEVICE, axes=axes)
    draft = DraftConfig(group_size=64)
    params = nest(
        {
            path: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)
            for path, spec in parameter_shapes(model).items()
        }
    )
    own = jax.eval_shape(lambda: quantize_params(params, draft))
    for view, drafts in (("int8", own), ("full", {})):
        config = CacheConfig(131072, 128, view, dtype=jnp.bfloat16)
        if view == "full":  # without room for a pass
            config = dataclasses.replace(config, max_length=131072 - config.pass_width)
        cache = jax.eval_shape(lambda config=config: create(model, config, 1))
        where = cache_shardings(cache, mesh)
        parts = [(cache, where), (params, param_shardings(model, params, mesh))]
        parts.append((drafts, param_shardings(model, drafts, mesh)))
        taken = sum(
            math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
            for tree, places in parts
            for x, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
        )
        needed = setting.needed_bytes(draft_bytes(model, draft) if drafts else 0, view)
        assert needed == pytest.approx(taken, rel=1e-3)


def test_devices_read_their_parts_and_meet():
    one, four = Setting(LLAMA, 32768, DEVICE), Setting(LLAMA, 32768, DEVICE, axes=Axes(tp=4))
    alone, together = (plan(setting, [candidate(0.9)]) for setting in (one, four))
    meeting = four.meeting_milliseconds
    assert meeting == (2 * 4 + 2) * 0.007
    assert one.meeting_milliseconds == 0
    for row, part in zip(alone.plain, together.plain, strict=True):
        quarter = row.milliseconds_a_token / 4
        assert part.milliseconds_a_token == pytest.approx(quarter + meeting)
        assert part.fits is None
    draft, part = alone.drafted[0], together.drafted[0]
    assert part.draft_milliseconds == pytest.approx(draft.draft_milliseconds / 4 + meeting)
    assert part.best.gamma <= draft.best.gamma
    split = Setting(LLAMA, 32768, DEVICE, axes=Axes(cp=2))
    assert split.meeting_milliseconds == 4 * 0.007
    poor = plan(split, [candidate(0.0)])
    assert poor.chosen is poor.plain[1], "a cache that is not coded is not split by `generate`"


def test_speed_measured_over_the_mesh_counts_meetings(tmp_path, capsys):
    speed = write_speed(tmp_path / "speed.json", mesh={"tp": 2})
    options = ["--device", "h100", "--speed", speed, "--json"]
    assert cli.main([*PLAN, *options, "--mesh", "tp=2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["mesh"], result["meeting_microseconds"]) == ({"tp": 2}, 0.0)
    assert any("each of 2 devices, which meet 66 times a pass" in note for note in result["notes"])
    for mesh, given, found in (({"tp": 4}, None, {}), ({"tp": 2}, 5.0, 5.0), (None, None, {})):
        args = argparse.Namespace(speed=speed, mesh=mesh, meeting_microseconds=given)
        assert meeting_microseconds(args) == (found and {"meeting_microseconds": found})


def test_default_acceptance_is_that_of_the_recorded_sweeps():
    """The mean over the texts, in three decimals."""
    folder = Path(__file__).parents[2] / "benchmarks"
    runs = [json.loads((folder / name).read_text()) for name in DEFAULT_RUNS]
    calibrated = json.loads((folder / CALIBRATED_RUN).read_text())["rows"]
    for config, *acceptance in DEFAULT_FORMATS:
        if config.method == "gptq":
            rows = [r for r in calibrated if r["method"] == "calibrated, asymmetric 64"]
            means = [sum(row[f"{kind}_acceptance"] for row in rows) / len(rows) for kind in KINDS]
            assert {row["measured_on"] for row in rows} == {"moby-dick", "pride-and-prejudice"}
            assert acceptance == pytest.approx(means, abs=6e-4)
            continue
        rows = [r for run in runs for r in run["rows"] if r["draft"] == config.describe()]
        assert len(rows) == len(runs)
        means = [sum(row[f"{kind}_acceptance"] for row in rows) / 2 for kind in KINDS]
        assert acceptance == pytest.approx(means, abs=6e-4)
