"""Tasks of a directory: what is read, what is asked, and what an answer is worth."""

from __future__ import annotations

import json
import re
import types

import pytest

from quantspec_jax import cli, evaluate
from quantspec_jax.evaluate import data_tasks, scores
from quantspec_jax.evaluate.data_tasks import questions

ROW = {"context": "The cat sat. " * 40, "input": "Who sat?", "answers": ["the cat", "a cat"]}
TURNS = [{"input": "Key A?", "answer": "one"}, {"input": "Key B?", "answer": ["two", "zwei"]}]


@pytest.mark.parametrize(
    ("score", "answer", "right", "expected"),
    [
        (scores.f1, "The cat, the CAT!", "a cat", 2 / 3),  # one of two words, and the one word
        (scores.f1, "dog", "cat", 0),
        (scores.f1_characters, "他坐。", "她坐", 0.5),
        (scores.rouge_l, "police killed the gunman", "police kill the gunman", 0.75),  # Lin, 2004
        (scores.rouge_l, "the gunman kill police", "police kill the gunman", 0.5),
        (scores.rouge_l, "", "police", 0),
        (scores.number_named, "Paragraph 3 or 12", "Paragraph 12", 0.5),
        (scores.number_named, "none", "7", 0),
        (scores.code_line, "# so\nreturn x\n", "return x", 1),
        (scores.contained, "it is 12ab.", "12ab", 1),
        (scores.contained, "it is 12AB.", "12ab", 0),
        (scores.contained_anyhow, "it is 12AB.", "12ab", 1),
        (scores.first_number, " 12 of 13", "12.0", 1),
        (scores.first_number, "13", "12", 0),
        (scores.letter, "Answer: B, not C", "B", 1),
        (scores.letter, "Because", "B", 0),
    ],
)
def test_scores_by_hand(score, answer, right, expected):
    assert score(answer, right) == pytest.approx(expected)


def test_a_class_shares_with_those_named_beside_it():
    classes = ["city", "other city", "person"]
    assert scores.class_named("other city", "other city", classes) == 1
    assert scores.class_named("city or person", "city", classes) == 0.5
    assert scores.class_named("person", "city", classes) == 0


def write(directory, name: str, *rows) -> None:
    (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_what_is_asked(tmp_path):
    write(tmp_path, "hotpotqa", ROW, ROW)
    (asked,) = questions(tmp_path, "longbench", "hotpotqa", 1, "questions")
    assert (asked.head, asked.tail) == (ROW["context"], "\n\nWho sat?")
    assert asked.answers == ("the cat", "a cat")
    (tmp_path / "dataset2prompt.json").write_text('{"hotpotqa": "Read {context} Q: {input} A:"}')
    (asked,) = questions(tmp_path, "longbench", "hotpotqa", 1, "questions")
    assert asked.head + asked.tail == f"Read {ROW['context']} Q: Who sat? A:"
    write(tmp_path, "scbench_kv", {"context": "text", "multi_turns": TURNS})
    tails = [x.tail for x in questions(tmp_path, "scbench", "kv", 9, "questions")]
    assert tails == ["\n\nKey A?", "\n\nKey B?"]
    tails = [x.tail for x in questions(tmp_path, "scbench", "kv", 9, "multi-turn")]
    assert tails == ["\n\nKey A?", "\n\nKey A?one\n\nKey B?"]
    choice = {"input": "Which?", "options": ["x", "y"], "answer": "A"}
    write(tmp_path, "scbench_choice_eng", {"context": "text", "multi_turns": [choice]})
    (asked,) = questions(tmp_path, "scbench", "choice_eng", 9, "questions")
    assert asked.tail == "\n\nWhich?\nA. x\nB. y"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: no JSON"),
        ("[1]", "line 1: a sample is 'list'"),
        ('{"context": 5, "input": "", "answers": ["x"]}', "context is 5; allowed: a text"),
        ('{"context": "", "input": "", "answers": []}', "answers is []"),
        ("", "is 'no sample'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(line, words, tmp_path):
    (tmp_path / "trec.jsonl").write_text(line)
    with pytest.raises(ValueError, match=re.escape(words)):
        questions(tmp_path, "longbench", "trec", 1, "questions")


def test_answers_come_from_decoding_over_each_view(tmp_path, monkeypatch, byte_level_tokenizer):
    """The prompt keeps its ends and its question; the answer that comes is scored."""
    write(tmp_path, "hotpotqa", ROW, ROW)
    given = []

    def generate(model, prompts, config):
        given.append((model.tokenizer.decode(prompts[0]), config))
        return types.SimpleNamespace(text=["The cat."])

    monkeypatch.setattr(data_tasks.api, "generate", generate)
    model = types.SimpleNamespace(tokenizer=byte_level_tokenizer)
    sizes = {"context": 256, "samples": 1, "data": tmp_path}
    rows = evaluate.quality(model, ["longbench:hotpotqa"], ["full", "int8"], **sizes)["rows"]
    assert [(row["codec"], row["score"], row["answers"]) for row in rows] == [
        ("full", 1.0, 1),
        ("int8", 1.0, 1),
    ]
    assert [config.kv for _, config in given] == ["full", "int8"]
    for text, config in given:
        assert text.startswith("The cat sat.")
        assert text.endswith("Who sat?")
        assert len(text) < len(ROW["context"])
        assert (config.prefill, config.max_new_tokens) == ("tiles", 32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "longbench:hotpotqa"], "data is None; allowed: a directory"),
        (["--task", "longbench:chess", "--data", "."], "longbench: and one of hotpotqa"),
        (["--task", "squad:dev", "--data", "."], "longbench:NAME, scbench:NAME"),
        (["--task", "scbench:kv", "--data", "."], "a directory with scbench_kv.jsonl"),
        (["--task", "kv", "--data", "."], "--data cannot go with tasks that need none"),
        (["--task", "longbench:trec", "--data", ".", "--codec", "aqua-2"], "codec is 'aqua-2'"),
    ],
)
def test_wrong_options_are_named_before_loading(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "trec", ROW)
    arguments = ["eval", "quality", *options, "--model", "nowhere", "--text", "no.txt"]
    assert cli.main([*arguments, "--context", "64"]) == 2
    assert words in capsys.readouterr().err
