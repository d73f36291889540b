"""Tasks about long contexts: what they ask has the answer that they say, and who keeps all gets it
right."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest

import quantspec_jax as qs
from quantspec_jax import cli, evaluate
from quantspec_jax.evaluate.codecs import Bench, by_tiles
from quantspec_jax.evaluate.quality import Asked, _answered, _before
from quantspec_jax.evaluate.tasks import TASKS, fitting, turn_texts
from quantspec_jax.methods import METHODS
from quantspec_jax.weights.formats import DraftConfig

WORDS = "It was a bright cold day in April. The clocks were striking. " * 60


def sample(task: str, seed: int = 0, size: int = 40):
    return TASKS[task](np.random.default_rng(seed), size, WORDS)


def test_answers_are_those_of_the_contexts():
    kv = sample("kv")
    pairs = json.loads(kv.context[kv.context.index("{") :])
    for turn in kv.turns:
        assert pairs[turn.question.split('"')[1]] == turn.answer
    words = sample("prefix-suffix").context.split()
    for turn in sample("prefix-suffix").turns:
        (whole,) = [word for word in words if word.startswith(turn.question[-8:])]
        assert whole == turn.question[-8:] + turn.answer
    tracked = sample("variables")
    for turn in tracked.turns:
        known = set()
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", tracked.context):
            if value in turn.question.split() or value in known:
                known.add(name)
        assert known == set(turn.answer.split())
    numbers = json.loads(re.search(r"\[.*\]", sample("functions").context)[0])
    expected = [max(numbers), min(numbers), numbers[0], numbers[-1], sorted(numbers)[19]]
    assert [int(turn.answer) for turn in sample("functions").turns] == expected
    found = sample("needles")
    for turn in found.turns:
        assert turn.question.removeprefix("The") + turn.answer in found.context


@pytest.mark.parametrize("task", TASKS)
def test_contexts_fill_their_room_and_seeds_tell(task):
    def count(words: str) -> int:
        return len(words) // 3

    found = fitting(TASKS[task], 1, WORDS, count, 1000, 1100)
    assert 1000 <= count(found.context) <= 1100
    assert found == fitting(TASKS[task], 1, WORDS, count, 1000, 1100)
    assert found != fitting(TASKS[task], 2, WORDS, count, 1000, 1100)
    assert [len(turns) for turns in turn_texts(found, "multi-turn")] == [len(found.turns)]
    assert [len(turns) for turns in turn_texts(found, "questions")] == [1] * len(found.turns)


def test_a_haystack_may_be_too_short():
    with pytest.raises(ValueError, match=r"context is '\d+ tokens'; allowed: 900 to 4000"):
        fitting(TASKS["needles"], 0, WORDS[:1800], lambda words: len(words) // 3, 900, 4000)


@pytest.fixture(scope="module")
def model(one_layer_llama_dir):
    return qs.load(one_layer_llama_dir, dtype="float32", draft=DraftConfig(bits=None))


def test_right_is_what_greedy_decoding_says(model, monkeypatch):
    """The model's own continuation is right, another token is not; a chance is as a chance."""
    prompt = np.random.default_rng(0).integers(5, 300, 150).tolist()
    own = [0] * 4
    for i in range(4):  # greedy, a token at a time: what comes later is not seen
        own[i] = int(model.logits(np.array([[*prompt, *own]]))[0, 149 + i].argmax())
    wrong = [own[0], own[1], (own[2] + 1) % 300, own[3]]
    found = []
    for answer in (own, wrong):
        asked = Asked([*prompt, *answer, 0, 0], [range(150, 154)])
        bench, before = Bench(model, asked.ids, 64, 32), _before(model, asked, 64, 32)
        found += _answered(bench, asked, METHODS["full"], [()] * 2, before)
    assert [right for right, _ in found] == [True, False]
    log_prob = jax.nn.log_softmax(model.logits(np.array([[*prompt, *own]]))[0, 149:153])
    expected = -np.asarray(log_prob)[range(4), own].sum()
    assert found[0][1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["int8", "snapkv-25"])
def test_what_follows_a_prompt_reads_as_in_one_pass(model, name):
    """Given keys and values of the first tokens, the others' hidden states are those of a pass over
    all of them."""
    ids = np.random.default_rng(1).integers(5, 300, 170).tolist()
    bench = Bench(model, ids, 96, 32)
    method = by_tiles(METHODS[name], 32)
    learned = method.prepare(model, None)
    whole, pasts = bench.through(method, learned)
    before = [past._replace(keys=past.keys[:, :96], values=past.values[:, :96]) for past in pasts]
    after, _ = bench.through(method, learned, before=before)
    np.testing.assert_allclose(after, whole[:, 96:], atol=1e-5)


def test_command(tmp_path, monkeypatch, one_layer_llama_dir, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(WORDS)
    arguments = ["eval", "quality", "--model", str(one_layer_llama_dir), "--text", "book.txt"]
    arguments += ["--context", "1024", "--samples", "1", "--turns", "multi-turn"]
    arguments += ["--task", "functions", "--codec", "full", "int8", "--json"]
    assert cli.main([*arguments, "--output", "out.json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["codec"], row["answers"]) for row in printed["rows"]] == [
        ("functions", "full", 5),
        ("functions", "int8", 5),
    ]
    full, coded = (row["answer_nll"] for row in printed["rows"])
    assert coded == pytest.approx(full, rel=0.02)
    assert coded != full
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == printed["rows"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["quality", "--task", "sudoku"], "--task is 'sudoku'; allowed: kv, prefix-suffix"),
        (["codecs", "--task", "kv"], "--task cannot go with codecs: they need quality"),
        (["quality", "--sweep"], "--sweep cannot go with quality"),
    ],
)
def test_wrong_options_are_named_before_loading(options, words, capsys):
    arguments = ["eval", *options, "--model", "nowhere", "--text", "no.txt", "--context", "64"]
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_wrong_arguments_are_named(model):
    for arguments, words in (
        ({"tasks": ["kv"], "context": 64}, "context is 64; allowed: "),
        ({"tasks": ["kv"], "methods": ["gzip"]}, "codec is 'gzip'"),
        ({"tasks": ["kv"], "samples": 0}, "samples is 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            evaluate.quality(model, **({"context": 1024} | arguments))
