"""`quantspec bench text`: what its rows say, and what they are compared with."""

from __future__ import annotations

import dataclasses
import itertools
import json
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import quantspec_jax as qs
from pallas_kernels.timing import Kernel
from quantspec_jax.bench import reading, record
from quantspec_jax.bench import text as bench
from quantspec_jax.cli import main, make_parser
from quantspec_jax.engine.programs import PROGRAMS
from quantspec_jax.loading import Model

TEXT = Path(qs.__file__).parent / "demo.txt"
PLACES = [100, 900]
CONTEXT, NEW = 370, 24  # a flush lies between the prompt's end and the text's


def parse(*options: str) -> object:
    line = ["bench", "text", "--model", "M", "--text", str(TEXT), *options]
    return make_parser().parse_args(line)


@pytest.fixture(scope="module")
def model(one_layer_llama_dir: Path) -> Model:
    return qs.load(str(one_layer_llama_dir))


@pytest.fixture(scope="module")
def recorded(one_layer_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run, greedy and sampled, as its file has it."""
    output = tmp_path_factory.mktemp("run") / "text-tiny.json"
    options = ["--model", str(one_layer_llama_dir), "--text", str(TEXT), "--context", str(CONTEXT)]
    options += ["--skip-characters", *map(str, PLACES), "--new-tokens", str(NEW), "--gamma", "2"]
    options += ["--temperature", "0", "0.8", "--coupling", "rejection", "invariant"]
    assert main(["bench", "text", *options, "--output", str(output), "--json"]) == 0
    return json.loads(output.read_text())


def rows_of(run: dict, **wanted: object) -> list[dict]:
    """Its rows with these values."""
    return [row for row in run["rows"] if all(row[k] == v for k, v in wanted.items())]


KEYS = (
    *("model", "mode", "policy", "context", "gamma", "temperature", "tokens_per_second"),
    *("milliseconds_a_round", "acceptance_rate", "accepted_by_position", "tokens_per_round"),
    *("speed_up", "tokens_as_int8", "ties", "prefill_seconds", "peak_bytes", "draft_read_share"),
    *("coupling", "device", "prompts", "skip_characters"),
)


def test_a_row_a_prompt_and_one_of_all(recorded: dict) -> None:
    cases = [("full", None, 0), ("int8", None, 0), ("quantspec", "rejection", 0)]
    cases += [("full", None, 0.8), ("int8", None, 0.8)]
    cases += [("quantspec", "rejection", 0.8), ("quantspec", "invariant", 0.8)]
    places = [[PLACES[0]], [PLACES[1]], PLACES]
    found = [
        (row["mode"], row["coupling"], row["temperature"], row["skip_characters"])
        for row in recorded["rows"]
    ]
    assert found == [(*case, place) for case in cases for place in places]
    assert all(set(KEYS) <= set(row) for row in recorded["rows"])
    assert all(row["prompts"] == len(row["skip_characters"]) for row in recorded["rows"])


def test_what_is_drafted_has_an_acceptance_and_nothing_else_has(recorded: dict) -> None:
    for row in recorded["rows"]:
        drafts = row["mode"] == "quantspec"
        assert (row["acceptance_rate"] is not None) == drafts
        assert row["policy"] == ("auto" if drafts else None)
        assert row["draft_read_share"] == (1.0 if drafts else None)
        assert len(row["accepted_by_position"]) == (2 if drafts else 0)
        if not drafts:
            assert row["tokens_per_round"] == 1
    greedy = rows_of(recorded, mode="quantspec", temperature=0)[-1]
    first, second = greedy["accepted_by_position"]
    assert 0.2 < second <= first < 1
    assert greedy["tokens_per_round"] > 1.2


def test_what_the_target_makes_is_counted(recorded: dict) -> None:
    """In float32 a text of the target's own is its text; a draw with another noise is not compared,
    nor is decoding that reads another view."""
    for row in recorded["rows"]:
        alike = row["mode"] == "int8" or (
            row["mode"] == "quantspec"
            and (row["temperature"] == 0 or row["coupling"] == "invariant")
        )
        expected = (NEW, 0, 0) if alike else (None, None, None)
        assert (row["tokens_as_int8"], row["differences"], row["ties"]) == expected


def test_the_record_can_be_repeated(recorded: dict) -> None:
    given = make_parser().parse_args(recorded["command"].split()[1:])
    assert record.command("quantspec bench text", given) == recorded["command"]
    assert (given.context, given.skip_characters, given.new_tokens) == ([CONTEXT], PLACES, NEW)
    assert recorded["text"] == "demo"
    assert recorded["what"] == "text-tiny"


# Rates, of measurements that are given.


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """`generate` takes a second a token, more for prompts that begin with a larger token, less for
    speculation; how often it was called, by mode and first token."""
    calls: list[tuple[str, int]] = []

    def generate(model, ids, config, key):
        calls.append((config.target_view, ids[0]))
        drafts = config.mode == "quantspec"
        rounds = config.max_new_tokens - 1
        rounds = rounds // 2 if drafts else rounds
        shorter = calls.count(calls[-1])  # each time a bit faster
        stats = {
            "new_tokens": config.max_new_tokens,
            "rounds": rounds,
            "proposed": 2 * rounds if drafts else 0,
            "accepted": rounds if drafts else 0,
            "lookup_rounds": 0,
            "lookup_accepted": 0,
            "accepted_by_position": [0.75, 0.25] if drafts else [],
            "decode_seconds": (ids[0] + (ids[0] > 1) * drafts) * rounds - shorter / 1000,
            "prefill_seconds": float(ids[0]),
        }
        return types.SimpleNamespace(tokens=[[5] * config.max_new_tokens], stats=[stats])

    monkeypatch.setattr(bench.qs, "generate", generate)
    return calls


def run_given(*options: str, prompts: tuple[int, ...] = (1, 3)) -> list[dict]:
    given = [bench.Prompt(place, [place] * 8) for place in prompts]
    args = parse("--context", "8", "--new-tokens", "21", "--temperature", "0", *options)
    made = bench.Bench(types.SimpleNamespace(), given, args, "M").rows(8)
    return [row for rows in made for row in rows]


def test_a_prompt_is_compared_with_its_own_baseline(measured: list) -> None:
    """The speed-ups differ from prompt to prompt; that of all is of their sums."""
    rows = run_given("--gamma", "2")
    assert [row["speed_up"] for row in rows[:3]] == [1, 1, 1]
    one, three, both = rows[-3:]
    assert one["speed_up"] == pytest.approx(2, rel=1e-3)
    assert three["speed_up"] == pytest.approx(2 * 3 / 4, rel=1e-3)
    assert both["speed_up"] == pytest.approx((1 + 3) / ((1 + 4) / 2), rel=1e-3)
    assert both["tokens_per_second"] == pytest.approx(40 / 50, rel=1e-3)
    assert both["milliseconds_a_round"] == pytest.approx(2500, rel=1e-3)
    assert both["prefill_seconds"] == 2
    assert both["acceptance_rate"] == 0.5
    assert both["accepted_by_position"] == [0.75, 0.25]


def test_without_plain_decoding_nothing_is_compared(measured: list) -> None:
    (row,) = run_given("--mode", "quantspec", "--gamma", "2", prompts=(1,))
    assert row["prompts"] == 1
    assert (row["speed_up"], row["tokens_as_int8"]) == (None, None)


def test_the_first_call_of_a_case_is_not_measured(measured: list) -> None:
    """It compiles; of the others the median counts."""
    (row,) = run_given("--mode", "full", "--repeat", "3", prompts=(1,))
    assert len(measured) == 4
    assert row["tokens_per_second"] == pytest.approx(20 / (20 - 0.003))


def test_positions_are_averaged_over_the_prompts_that_reached_them() -> None:
    assert bench.by_position([[0.5, 0.25], [1.0], []]) == [0.75, 0.25]
    assert bench.by_position([[], []]) == []


def test_greedy_decoding_is_measured_with_one_coupling() -> None:
    args = parse("--context", "8", "--coupling", "block", "rejection", "--gamma", "1", "auto")
    greedy, sampled = (bench.cases(args, t)[2:] for t in (0, 0.5))
    assert [(c.gamma, c.coupling) for c in greedy] == [(1, "block"), ("auto", "block")]
    assert [c.coupling for c in sampled] == ["block"] * 2 + ["rejection"] * 2


def test_each_policy_is_measured_at_each_share_in_each_view() -> None:
    options = ["--draft-policy", "all", "window", "--draft-share", "0.5", "0.25"]
    options += ["--draft-view", "int4", "int8", "--gamma", "4", "--mode", "quantspec"]
    found = [(c.policy, c.view, c.share) for c in bench.cases(parse("--context", "8", *options), 0)]
    windows = [("window", view, share) for view in ("int4", "int8") for share in (0.5, 0.25)]
    assert found == [("all", "int4", None), ("all", "int8", None), *windows]


def test_what_is_read_is_drawn(recorded: dict, model: Model, tmp_path: Path) -> None:
    """A point a share, half as many bytes where half of the pages are read."""
    found = [row for row in recorded["rows"] if row["prompts"] == 2]
    half = [row | {"policy": "window", "share": 0.5, "draft_read_share": 0.5} for row in found]
    whole, part = (reading.megabytes(rows[-1], model.config) for rows in (found, half))
    assert part == whole / 2 > 0
    reading.plot([*found, *half], model.config, "tiny", tmp_path / "read.svg")
    assert "window int4 temperature 0.8 0.5" in (tmp_path / "read.svg").read_text()


# Ties.


def plain(**changes: object) -> qs.GenerateConfig:
    common = {"max_new_tokens": NEW, "ignore_eos": True, "mode": "autoregressive", "kv": "int8"}
    return qs.GenerateConfig(**common, **changes)


def prompt_of(model: Model) -> bench.Prompt:
    args = parse("--context", str(CONTEXT), "--skip-characters", "100")
    return bench.prompts(TEXT.read_text(), model.tokenizer, args)[0]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("width", [1, 3])
def test_scores_say_what_is_decoded_next(model: Model, width: int, temperature: float) -> None:
    """Before, at and after a flush, in passes of one row and of several."""
    config = plain(temperature=temperature, repetition_penalty=1.2)
    prompt, key = prompt_of(model), jax.random.key(4)
    tokens = qs.generate(model, prompt.ids, config, key).tokens[0]
    config = dataclasses.replace(config, pass_width=width)
    for at in (1, 13, 14, 15, 22):
        scores = bench.scores_after(model, prompt, tokens[:at], config, key)
        assert np.argmax(scores) == tokens[at]


def test_a_difference_between_equal_logits_is_a_tie(model: Model) -> None:
    """Two tokens with one embedding have the same logit; no other token comes near."""
    prompt, key = prompt_of(model), jax.random.key(0)
    theirs = qs.generate(model, prompt.ids, plain(), key).tokens[0]
    at = next(i for i, token in enumerate(theirs) if i > 2 and token < model.config.vocab_size - 40)
    twin = next(t for t in range(theirs[at] + 1, 320) if t not in (*theirs, *prompt.ids))
    embedding = model.params["embedding"]
    params = {**model.params, "embedding": embedding.at[twin].set(embedding[theirs[at]])}
    twins = Model(model.config, params, model.tokenizer)
    assert qs.generate(twins, prompt.ids, plain(), key).tokens[0] == theirs
    other = next(t for t in range(320) if t not in (twin, theirs[at]))

    def is_tie(token: int, at: int = at) -> bool:
        ours = [*theirs[:at], token, *theirs[at + 1 :]]
        return bench.is_tie(twins, prompt, ours, theirs, (1, 3), plain(), key)

    assert is_tie(twin)
    assert not is_tie(other)
    assert not is_tie(twin, at=0)  # the prompt's own pass is the same in all modes

    args = parse("--context", "8", "--new-tokens", str(NEW))
    case = bench.Case("quantspec", 2, "all", "rejection")
    runs = [
        bench.Run(prompt, tokens, {})
        for tokens in ([*theirs[:at], twin, *theirs[at + 1 :]], [*theirs[:at], other], theirs)
    ]
    found = [bench.agreement(twins, case, r, runs[-1], 0.0, args) for r in runs]
    assert [tuple(x.values()) for x in found] == [(at, 1, 1), (at, 1, 0), (NEW, 0, 0)]


# Where the time goes.


@pytest.mark.parametrize("gamma", [2, "auto"])
def test_the_program_that_generate_runs_is_traced(
    gamma: int | str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels, three a round, are divided by the rounds that were traced; nothing is compiled
    for it."""
    config = qs.GenerateConfig(
        max_new_tokens=NEW, ignore_eos=True, gamma=gamma, draft_cost=0.3, rounds_per_chunk=4
    )
    prompt, key, traced = prompt_of(model), jax.random.key(0), []
    qs.generate(model, prompt.ids, config, key)
    compiled = len(PROGRAMS)

    def trace(run):
        decode = bench.Engine._decode

        def counted(self, state, rounds, *rest):
            traced.append(rounds)
            return decode(self, state, rounds, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(bench.Engine, "_decode", counted)
            run()
        names = ["int4_matmul", "kv_attention_merge", "loop_add_fusion"] * sum(traced)
        return [Kernel(1e6 * i, 2e5, name) for i, name in enumerate(names)]

    monkeypatch.setattr(bench, "traced", trace)
    on_cpu = bench.profile_of(model, prompt, config, key, 2.0)
    assert on_cpu == {"launches": None, "profile": None}
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    monkeypatch.setattr(bench, "device", lambda: gpu)
    found = bench.profile_of(model, prompt, config, key, 2.0)
    assert 1 <= sum(traced) <= bench.TRACED_ROUNDS
    assert len(PROGRAMS) == compiled
    assert found["launches"] == 3
    times = {name: ms for name, ms in found["profile"].items() if ms}
    assert times == pytest.approx(
        {"int4 products": 0.2, "merges": 0.2, "elementwise": 0.2, "gaps": 1.4}
    )


# Bad input.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "0"], "--context is [0]"),
        (["--context", "9", "--skip-characters", "-1"], "--skip-characters is [-1]"),
        (["--context", "9", "--new-tokens", "1"], "--new-tokens is 1"),
        (["--context", "9", "--repeat", "0"], "--repeat is 0"),
        (["--context", "9", "--gamma", "2", "0"], "gamma is 0"),
        (["--context", "9", "--temperature", "-1"], "temperature is -1"),
        (["--context", "9", "--output", "/nowhere/a.json"], "--output is"),
        (["--context", "9", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(bench, "load_model", lambda *_: pytest.fail("loaded"))
    assert main(["bench", "text", "--model", "M", "--text", str(TEXT), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "100", "2040", "--new-tokens", "9"], "is 2049; allowed: at most 2048"),
        (["--context", "9", "1000", "--skip-characters", "0", "1000000"], "0 tokens after 1000000"),
    ],
)
def test_what_the_text_or_the_model_lacks_is_said_before_anything_is_measured(
    options: list[str], words: str, model: Model, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    loaded = []
    monkeypatch.setattr(bench, "load_model", lambda *_: loaded.append(1) or model)
    monkeypatch.setattr(bench.qs, "generate", lambda *_: pytest.fail("generated"))
    assert main(["bench", "text", "--model", "M", "--text", str(TEXT), *options]) == 2
    assert words in capsys.readouterr().err
    assert loaded == [1]


def test_an_interruption_loses_one_case_at_most(
    measured: list, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Interrupted(bench.Bench):
        def rows(self, context: int) -> Iterator[list[dict]]:
            whole = super().rows(context)
            yield from whole if context == 8 else itertools.islice(whole, 1)
            if context > 8:
                raise KeyboardInterrupt

    monkeypatch.setattr(bench, "load_model", lambda *_: model)
    monkeypatch.setattr(bench, "Bench", Interrupted)
    output = tmp_path / "run.json"
    args = parse("--context", "8", "9", "--mode", "full", "int8", "--output", str(output))
    args.skip_characters = PLACES
    with pytest.raises(KeyboardInterrupt):
        bench.run(args)
    rows = json.loads(output.read_text())["rows"]
    there = {(row["context"], row["mode"]) for row in rows}
    assert there == {(8, "full"), (8, "int8"), (9, "full")}
