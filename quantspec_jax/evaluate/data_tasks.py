"""Tasks whose data the user has: LongBench (arXiv 2308.14508) and SCBench (arXiv 2412.10319), JSON
lines as their authors publish them.

    DIR/NAME.jsonl              longbench:NAME   context, input, answers, all_classes
    DIR/scbench_NAME.jsonl      scbench:NAME     context, multi_turns: input, answer, options
    DIR/dataset2prompt.json     if there, by file name what is asked: a text with {context} and
                                {input} (LongBench's repository has one); else they come one after
                                the other

A context that is too long loses its middle. The model answers greedily; its prompt is read in tiles
that see those before them as the cache has them, so that what is coded is coded before the question
is seen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import quantspec_jax.api as api
from quantspec_jax.cache.codecs import VIEWS
from quantspec_jax.checks import require, within
from quantspec_jax.evaluate import scores
from quantspec_jax.evaluate.scores import Score
from quantspec_jax.files import open_file, read_json
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.loading import Model
from quantspec_jax.text.prompts import encode

MOST_LINE = 64 << 20  # bytes of a sample


@dataclasses.dataclass(frozen=True)
class Kind:
    """new_tokens: of an answer. joined: how the scores of several right answers come together.
    first_line: of the answer alone is scored."""

    score: Score
    new_tokens: int
    joined: Callable[[list[float]], float] = max
    first_line: bool = False


def _mean(found: list[float]) -> float:
    return sum(found) / len(found)


def _each(score: Score, new_tokens: int, names: str, **more: Any) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), Kind(score, new_tokens, **more))


BENCHMARKS: dict[str, dict[str, Kind]] = {
    "longbench": {
        **_each(scores.f1, 32, "hotpotqa 2wikimqa musique nq"),
        **_each(scores.f1, 32, "triviaqa", first_line=True),
        **_each(scores.f1, 64, "multifieldqa_en"),
        **_each(scores.f1, 128, "narrativeqa qasper"),
        **_each(scores.rouge_l, 128, "samsum", first_line=True),
        **_each(scores.rouge_l, 512, "gov_report qmsum multi_news"),
        **_each(scores.class_named, 64, "trec lsht", first_line=True),
        **_each(scores.number_named, 32, "passage_count passage_retrieval_en passage_retrieval_zh"),
        **_each(scores.code_line, 64, "lcc repobench-p"),
    },
    "scbench": {
        **_each(scores.contained, 150, "kv kv_hard kv_compressible prefix_suffix hashhop"),
        **_each(scores.contained_anyhow, 30, "vt", joined=_mean),
        **_each(scores.contained_anyhow, 40, "qa_eng"),
        **_each(scores.contained_anyhow, 10, "many_shot"),
        **_each(scores.f1_characters, 40, "qa_chn"),
        **_each(scores.letter, 40, "choice_eng"),
        **_each(scores.first_number, 5, "mf"),
        **_each(scores.first_number, 15, "passkey"),
        **_each(scores.rouge_l, 200, "summary"),
    },
}


@dataclasses.dataclass(frozen=True)
class Question:
    """head and context come before, tail after what is cut from the context's middle."""

    head: str
    tail: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()


def is_named(task: str) -> bool:
    """Whether a task is one of data."""
    return ":" in task


def check(tasks: Sequence[str], methods: Sequence[str], data: Path | None) -> None:
    """Raise for what could not be read or decoded."""
    for task in tasks:
        benchmark, _, name = task.partition(":")
        require(benchmark in BENCHMARKS, "task", task, ", ".join(f"{b}:NAME" for b in BENCHMARKS))
        kinds = BENCHMARKS[benchmark]
        require(name in kinds, "task", task, f"{benchmark}: and one of {', '.join(kinds)}")
        require(data is not None, "data", None, f"a directory that has the data of {task}")
        assert data is not None
        path = _path(data, benchmark, name)
        require(path.is_file(), "data", str(data), f"a directory with {path.name}, for {task}")
    if tasks:
        unknown = [name for name in methods if name not in VIEWS]
        words = f"{', '.join(VIEWS)} of tasks whose answers are decoded"
        require(not unknown, "codec", ", ".join(unknown), words)


def rows(
    model: Model,
    tasks: Sequence[str],
    views: Sequence[str],
    data: Path,
    *,
    context: int,
    samples: int,
    mode: str,
    group_size: int,
) -> Iterator[dict[str, Any]]:
    """A row a task and view: task, codec, score, answers."""
    for task in tasks:
        benchmark, _, name = task.partition(":")
        kind = BENCHMARKS[benchmark][name]
        asked = questions(data, benchmark, name, samples, mode)
        for view in views:
            found = [_answered(model, kind, each, view, context, group_size) for each in asked]
            yield {"task": task, "codec": view, "score": _mean(found), "answers": len(found)}


def questions(data: Path, benchmark: str, name: str, samples: int, mode: str) -> list[Question]:
    """Of the first samples of a file."""
    path = _path(data, benchmark, name)
    made, template = [], _template(data, path.stem)
    for number, line in enumerate(_lines(path, samples), 1):
        with within(f"{path}, line {number}"):
            if benchmark == "longbench":
                made += [_longbench(_object(line), template)]
            else:
                made += _scbench(_object(line), template, mode)
    require(len(made) > 0, str(path), "no sample", "one or more")
    return made


def _path(data: Path, benchmark: str, name: str) -> Path:
    return data / f"{'scbench_' if benchmark == 'scbench' else ''}{name}.jsonl"


def _lines(path: Path, most: int) -> Iterator[bytes]:
    with open_file(path) as file:
        for _ in range(most):
            line = file.readline(MOST_LINE + 1)
            require(len(line) <= MOST_LINE, str(path), "a longer line", f"{MOST_LINE:,} bytes")
            if not line.strip():
                return
            yield line


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    require(isinstance(found, dict), "a sample", type(found).__name__, "an object")
    return found


def _template(data: Path, name: str) -> str:
    path = data / "dataset2prompt.json"
    known = read_json(path).get(name) if path.exists() else None
    template = "{context}\n\n{input}" if known is None else known
    usable = isinstance(template, str) and template.count("{context}") == 1
    require(usable, f"{path.name}, {name}", template, "a text with one {context}")
    return template


def _text(sample: dict[str, Any], key: str) -> str:
    require(isinstance(sample.get(key), str), key, sample.get(key), "a text")
    return sample[key]


def _texts(given: Any, key: str) -> tuple[str, ...]:
    """Several right answers, or one; numbers as they are written."""
    found = given if isinstance(given, list) else [given]
    usable = bool(found) and all(isinstance(x, str | int | float) for x in found)
    require(usable, key, given, "a text, a number, or a list of some")
    return tuple(map(str, found))


def _longbench(sample: dict[str, Any], template: str) -> Question:
    before, after = template.split("{context}")
    asked = [part.replace("{input}", _text(sample, "input")) for part in (before, after)]
    classes = sample.get("all_classes") or []
    answers = _texts(sample.get("answers"), "answers")
    head = asked[0] + _text(sample, "context")
    return Question(head, asked[1], answers, _texts(classes, "all_classes") if classes else ())


def _scbench(sample: dict[str, Any], template: str, mode: str) -> list[Question]:
    """In multi-turn with the right answers of the turns before."""
    turns: Any = sample.get("multi_turns")
    require(isinstance(turns, list) and bool(turns), "multi_turns", turns, "a list of turns")
    before, after = template.split("{context}")
    head, earlier, made = before + _text(sample, "context"), "", []
    for turn in turns:
        require(isinstance(turn, dict), "a turn", turn, "an object")
        given = zip("ABCD", turn.get("options") or (), strict=False)
        options = "".join(f"\n{letter}. {option}" for letter, option in given)
        asked = after.replace("{input}", _text(turn, "input") + options)
        answers = _texts(turn.get("answer"), "answer")
        made.append(Question(head, earlier + asked, answers))
        if mode == "multi-turn":
            earlier += asked + (f" {answers[-1]}" if options else answers[0])  # a letter comes last
    return made


def _answered(
    model: Model, kind: Kind, asked: Question, view: str, context: int, group_size: int
) -> float:
    """The score of what the model that reads `view` answers."""
    room = context - kind.new_tokens
    after = encode(asked.tail, model.tokenizer, special=False) if asked.tail else []
    left = room - len(after)
    require(left >= 2, "context", context, f"{len(after) + kind.new_tokens + 2} or more")
    before = encode(asked.head, model.tokenizer)
    if len(before) > left:
        before = [*before[: left // 2], *before[len(before) - (left - left // 2) :]]
    config = GenerateConfig(
        mode="autoregressive",
        kv=view,
        max_new_tokens=kind.new_tokens,
        max_length=context,
        prefill="tiles",
        group_size=group_size,
    )
    (answer,) = api.generate(model, [[*before, *after]], config).text
    if kind.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    return kind.joined([kind.score(answer, right, asked.classes) for right in asked.answers])
