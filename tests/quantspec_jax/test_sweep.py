"""A sweep says of each draft what evaluating it alone says."""

from __future__ import annotations

import json
import re
import sys

import jax
import numpy as np
import pytest

from quantspec_jax import DraftConfig, Model, ModelConfig, cli, evaluate
from quantspec_jax.commands.evaluate import stored_draft
from quantspec_jax.cost import READINGS, Reading, bytes_read
from quantspec_jax.evaluate.sweep import plot, predictions, table
from quantspec_jax.evaluate.teacher_forced import compare_drafts
from quantspec_jax.models.module import init_params
from quantspec_jax.models.presets import PRESETS
from quantspec_jax.plotting import check_plot
from quantspec_jax.weights.sizes import bits_per_weight, draft_bytes

G = 8
LENGTH = 3 * G + 3
FIRST = G
TINY = ModelConfig("llama", 97, 32, 64, 1, 4, 2, 16, max_context=64)
FORMATS = [DraftConfig(group_size=16, symmetric=True), DraftConfig(bits=None)]
OWN = DraftConfig(group_size=8, layers="mlp")


@pytest.fixture(scope="module")
def model():
    params = init_params(TINY, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    return Model(TINY, params, draft=OWN)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 97, LENGTH).tolist()


@pytest.fixture(scope="module")
def result(model, ids):
    return evaluate.sweep(model, ids, [*FORMATS, model, FORMATS[0]], first=FIRST, group_size=G)


def test_each_row_is_the_acceptance_of_that_draft_alone(model, ids, result):
    """The model's own also where it reads less."""
    less = [reading for reading in READINGS if reading.share < 1]
    drafts = [*FORMATS, OWN, *[OWN] * len(less)]
    reads = [*[Reading()] * 3, *less]
    assert [row["draft"] for row in result["rows"]] == [draft.describe() for draft in drafts]
    assert [DraftConfig.from_dict(d) for d in result["drafts"]] == drafts
    for draft, reading, row in zip(drafts, reads, result["rows"], strict=True):
        alone = Model(TINY, model.params, draft=draft)
        chosen = {"draft_policy": reading.policy, "draft_share": reading.share}
        wanted = evaluate.acceptance(alone, ids, first=FIRST, group_size=G, **chosen)
        assert result["positions"] == wanted.pop("positions")
        assert {name: row[name] for name in wanted} == pytest.approx(wanted)
        assert row["draft_bytes"] == draft_bytes(TINY, draft)
        assert row["draft_bits_per_weight"] == bits_per_weight(TINY, draft)


def test_perplexities_are_those_of_what_follows(model, ids, result):
    logits = np.asarray(jax.nn.log_softmax(model.logits([ids])[0]))
    log_prob = logits[np.arange(LENGTH - 1), ids[1:]]
    (seen,) = compare_drafts(model, [model.params], ids, group_size=G)
    # Nothing is in the planes yet: full weights are the target, and both the model.
    for given in (seen.log_prob, seen.draft_log_prob):
        np.testing.assert_allclose(given[: 2 * G], log_prob[: 2 * G], atol=1e-4)
    counted = slice(FIRST, LENGTH - 1)
    assert result["target_perplexity"] == pytest.approx(np.exp(-seen.log_prob[counted].mean()))
    full = result["rows"][1]
    assert full["perplexity"] == pytest.approx(np.exp(-seen.draft_log_prob[counted].mean()))
    assert result["rows"][0]["perplexity"] != pytest.approx(full["perplexity"], rel=1e-3)


def test_predictions_are_the_best_of_the_cost_model():
    shapes, draft = PRESETS["llama-2-7b"], DraftConfig(group_size=128, symmetric=True)
    found = predictions(shapes, draft, 0.93, [8192, 131072])
    costs = bytes_read(shapes, draft, 131072)
    for gamma in range(1, 17):
        assert costs.speed_up(0.93, gamma) <= found["speed_up"]["131072"]
    assert found["speed_up"]["131072"] == costs.speed_up(0.93, found["gamma"]["131072"])
    assert 2.4 < found["speed_up"]["131072"] < 3
    assert list(found["speed_up"]) == ["8192", "131072"]


def test_the_table_has_a_line_a_draft(result):
    lines = table(result).splitlines()
    assert len(lines) == 1 + len(result["rows"]) + 1
    for line, row in zip(lines[1:], result["rows"], strict=False):
        assert line.startswith(row["draft"])
        assert f"{row['greedy_acceptance']:.3f}" in line
    assert "at 8K" in lines[0]
    assert "at 128K" in lines[0]


def test_the_plot_labels_every_draft(result, tmp_path):
    plot(result, tmp_path / "sweep.svg")
    svg = (tmp_path / "sweep.svg").read_text()
    for row in result["rows"]:
        assert row["draft"] in svg
        assert f"{row['speed_up']['32768']:.2f}× 32K" in svg
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.svg"]


def test_no_matplotlib_says_what_to_install(monkeypatch):
    assert check_plot("a.png").name == "a.png"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"matplotlib.*pip install 'quantspec-jax\[demo\]'"):
        check_plot("a.png")


def test_drafts_that_cannot_be_swept_are_named(model, ids):
    other = Model(TINY, model.params)
    other.config = PRESETS["smollm2-135m"]
    for drafts, words in (
        ([], "drafts is"),
        ([DraftConfig(method="gptq")], "draft method is 'gptq'; allowed: rtn"),
        ([other], "drafts of the evaluated model"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate.sweep(model, ids, drafts, group_size=G)


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTSPEC_CACHE_DIR", "")
    (tmp_path / "book.txt").write_text("The cache is stored once, in two planes. " * 9)
    return tmp_path


def test_command_records_and_plots(book, tiny_llama_dir, capsys, monkeypatch):
    formats = (DraftConfig(bits=None),)
    module = sys.modules["quantspec_jax.evaluate.sweep"]  # beside the function of that name
    monkeypatch.setattr(module, "DRAFTS", formats)
    source = str(tiny_llama_dir)
    assert cli.main(["convert", source, "with-draft", "--draft", "rtn", "--draft-group", "32"]) == 0
    capsys.readouterr()
    arguments = ["eval", "acceptance", "--sweep", "--model", source, "--text", "book.txt"]
    arguments += ["--context", "64", "--draft-bits", "none", "--draft-of", "with-draft", "--json"]
    arguments += ["--preset", "llama-2-7b", "--output", "out.json", "--plot", "out.svg"]
    assert cli.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    recorded = json.loads((book / "out.json").read_text())
    assert {"what", "command", "versions", "device", "date", "rows"} <= set(recorded)
    assert recorded["rows"] == printed["rows"]
    stored = DraftConfig(group_size=32)
    less = sum(reading.share < 1 for reading in READINGS)
    drafts = [*formats, stored, *formats * less]
    assert [row["draft"] for row in printed["rows"]] == [draft.describe() for draft in drafts]
    assert printed["predicted_for"] == "llama-2-7b"
    row = printed["rows"][1]
    assert predictions(PRESETS["llama-2-7b"], stored, row["greedy_acceptance"]) == {
        name: row[name] for name in ("gamma", "speed_up")
    }
    assert "llama-2-7b" in (book / "out.svg").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["acceptance", "--plot", "a.png"], "--plot cannot go with .* --sweep"),
        (["perplexity", "--sweep"], "--sweep cannot go with perplexity"),
        (["perplexity", "--draft-share", "0.5"], "--draft-share cannot go with perplexity"),
        (["acceptance", "--draft-policy", "window", "--draft-share", "2"], "draft_share is 2.0"),
        (["acceptance", "--sweep", "--plot", "a.gif"], "--plot is 'a.gif'"),
        (["acceptance", "--sweep", "--plot", "gone/a.png"], "--plot is 'gone/a.png'"),
        (["acceptance", "--sweep", "--output", "gone/a.json"], "--output is 'gone/a.json'"),
        (["acceptance", "--sweep", "--preset", "gpt"], "--preset is 'gpt'; allowed: llama-2-7b"),
    ],
)
def test_wrong_options_are_named_before_loading(book, options, words, capsys):
    arguments = ["eval", *options, "--model", "nowhere", "--text", "book.txt", "--context", "64"]
    assert cli.main(arguments) == 2
    assert re.search(words, capsys.readouterr().err)


def test_draft_of_a_directory_without_one_is_named(model, tiny_llama_dir):
    with pytest.raises(ValueError, match="allowed: a directory converted with a draft"):
        stored_draft(model, str(tiny_llama_dir))
