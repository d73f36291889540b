"""`quantspec eval quality`: tasks about long contexts, over what a method keeps of the cache.

The context is compressed before a question is seen. Its keys and values are made in full precision,
once for all methods, as a prompt's are when a model decodes; what comes after it reads what a
method keeps of them: methods that work from a prompt take the context as theirs, the others what
the schedule has in codes. An answer is right where each of its
tokens is the model's first choice after those before it, which is where greedy decoding gives it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from quantspec_jax.checks import require
from quantspec_jax.evaluate import data_tasks
from quantspec_jax.evaluate.codecs import Bench, Past, by_tiles, causal
from quantspec_jax.evaluate.learned import Learned, fitted
from quantspec_jax.evaluate.tasks import TASKS, Sample, Turn, fitting, turn_texts
from quantspec_jax.evaluate.teacher_forced import at_tokens, lm_head_of
from quantspec_jax.loading import Model
from quantspec_jax.methods import METHODS, Planes
from quantspec_jax.models.decoder import unembed
from quantspec_jax.models.parameters import Params
from quantspec_jax.weights.calibrate.programs import program
from quantspec_jax.weights.calibrate.text import calibration_tokens

MODES = ("questions", "multi-turn")
ASKED = 512  # tokens for questions and answers, at most
SLACK = 128  # by which a context may be shorter than there is room for


class Asked(NamedTuple):
    """Token ids of a context, of `length` in all with what is asked, and of each answer the
    positions of its tokens."""

    ids: list[int]
    answers: list[range]


def quality(
    model: Model,
    tasks: Sequence[str] = tuple(TASKS),
    methods: Sequence[str] = ("full", "int8", "int4"),
    *,
    context: int = 4096,
    samples: int = 10,
    mode: str = "questions",
    haystack: str = "",
    text: str | None = None,
    group_size: int = 128,
    seed: int = 0,
    data: Path | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda result: None,
    progress: bool = False,
) -> dict[str, Any]:
    """Share of right answers.

    Args:
      tasks: names in `quantspec_jax.evaluate.tasks.TASKS`, or of data that `data` has
        (`quantspec_jax.evaluate.data_tasks`).
      methods: names in `quantspec_jax.methods.METHODS`; of tasks of data, views of the cache.
      context: tokens of a sample, questions included.
      samples: contexts of a task; five questions each.
      mode: "questions", each about the context alone; "multi-turn", one after the other, with the
        right answers of those before it.
      haystack: the text that needles lie in.
      text: what methods that learn read; None: prose that comes with Python.
      seed: of the samples.
      data: a directory.
      on_row: is given the result after each row, with those that there are.

    Returns:
      rows, one a task and method: task, codec, correct, answers, and answer_nll, the mean negative
      log-probability of an answer, in nats. Of tasks of data: task, codec, score, the mean, and
      answers.

    Raises:
      ValueError: an argument is wrong; says which.
    """
    named = [task for task in tasks if data_tasks.is_named(task)]
    tasks = [task for task in tasks if task not in named]
    data_tasks.check(named, methods, data)
    for name, given, allowed in (("task", tasks, TASKS), ("codec", methods, METHODS)):
        unknown = [each for each in given if each not in allowed]
        require(not unknown, name, ", ".join(unknown), ", ".join(allowed))
    require(mode in MODES, "mode", mode, ", ".join(MODES))
    require(samples >= 1, "samples", samples, "1 or more")
    require(model.tokenizer is not None, "model", "one without a tokenizer", "one that reads text")
    rows: list[dict[str, Any]] = []
    result = {"mode": mode, "samples": samples, "rows": rows}
    if named:
        assert data is not None
        sizes: dict[str, Any] = {"context": context, "samples": samples, "group_size": group_size}
        for row in data_tasks.rows(model, named, methods, data, mode=mode, **sizes):
            rows.append(row)
            on_row(result)
    if not tasks:
        return result
    shortest, longest = ASKED + SLACK + 3 * group_size, model.config.max_context
    require(shortest <= context <= longest, "context", context, f"{shortest} to {longest} tokens")
    prompt = (context - ASKED - SLACK) // group_size * group_size
    chosen = {name: by_tiles(METHODS[name], group_size) for name in methods}

    @functools.cache
    def chunks() -> np.ndarray:
        return calibration_tokens(model.tokenizer, text)

    learned = fitted(model, chosen, chunks, context, progress=progress)
    for name, method in chosen.items():
        whole = causal(method, learned[name], model.config.num_layers)
        require(whole, "codec", name, "methods that a model can decode from layer by layer")
    asked = {
        task: [
            _asked(model, task, (seed, number), context, prompt, mode, haystack)
            for number in range(samples)
        ]
        for task in tasks
    }
    with tqdm(total=samples * len(tasks), desc="quality", disable=not progress) as bar:
        for task, contexts in asked.items():
            found: dict[str, list[tuple[bool, float]]] = {name: [] for name in chosen}
            for questions in contexts:
                before = _before(model, questions[0], prompt, group_size)
                for name, method in chosen.items():
                    for each in questions:
                        bench = Bench(model, each.ids, prompt, group_size)
                        found[name] += _answered(bench, each, method, learned[name], before)
                bar.update()
            for name, answers in found.items():
                right, loss = (float(np.mean(x)) for x in zip(*answers, strict=True))
                row = {"task": task, "codec": name, "correct": right, "answers": len(answers)}
                rows.append(row | {"answer_nll": loss})
            on_row(result)
    return result


def _before(model: Model, asked: Asked, prompt: int, group_size: int) -> list[Past]:
    """Of the context that all its questions have before them."""
    return Bench(model, asked.ids[:prompt], prompt, group_size).through(Planes("full"))[1]


def _asked(
    model: Model,
    task: str,
    seed: tuple[int, int],
    context: int,
    prompt: int,
    mode: str,
    haystack: str,
) -> list[Asked]:
    def encoded(words: str) -> list[int]:
        assert model.tokenizer is not None
        return list(model.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])

    number = int(np.random.default_rng(seed).integers(2**31))
    make, most = TASKS[task], context - ASKED
    sample = fitting(make, number, haystack, lambda words: len(encoded(words)), prompt, most)
    return [_laid_out(sample, turns, encoded, context) for turns in turn_texts(sample, mode)]


def _laid_out(sample: Sample, turns: Sequence[Turn], encoded: Any, context: int) -> Asked:
    """Padding comes last, where nothing reads it. Answers are tokens of their own, as a model
    makes them."""
    ids, answers = encoded(sample.context), []
    for turn in turns:
        ids += encoded(turn.question)
        answer = encoded(turn.answer)
        answers.append(range(len(ids), len(ids) + len(answer)))
        ids += answer + encoded(turn.end)
    require(len(ids) <= context, "context", context, f"{len(ids)} tokens or more")
    return Asked(ids + [0] * (context - len(ids)), answers)


def _answered(
    bench: Bench, asked: Asked, method: Any, learned: Learned, before: list[Past]
) -> list[tuple[bool, float]]:
    """Of each answer whether it is right, and its negative log-probability."""
    hidden, _ = bench.through(method, learned, before=before)
    at = np.arange(bench.prompt, len(asked.ids))
    following = jnp.asarray([*asked.ids[bench.prompt + 1 :], 0], jnp.int32)
    top, log_prob = _predicted(lm_head_of(bench.model.params), hidden[0], following)
    top, log_prob = np.asarray(top), np.asarray(log_prob)
    found = []
    for answer in asked.answers:
        asking = np.isin(at + 1, np.asarray(answer))
        right = bool((top[asking] == np.asarray(asked.ids)[np.asarray(answer)]).all())
        found.append((right, float(-log_prob[asking].sum())))
    return found


@program()
def _predicted(
    head: Params, hidden: jax.Array, following: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[n, E] → the first choice and what the following token gets."""
    logits = unembed(head, hidden, "xla")
    return jnp.argmax(logits, -1), at_tokens(jax.nn.log_softmax(logits), following)
