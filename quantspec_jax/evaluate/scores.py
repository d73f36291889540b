"""What an answer that a model wrote is worth, 0 to 1, as LongBench (arXiv 2308.14508) and SCBench
(arXiv 2412.10319) count it. Written from the papers and the authors' own scoring; where their code
differs from their words (LongBench's second try for classes is never reached) the code is followed.

Each takes the answer, a right one, and the classes that there are, where a task has some.
"""

from __future__ import annotations

import collections
import difflib
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

Score = Callable[[str, str, Sequence[str]], float]

PUNCTUATION = str.maketrans("", "", string.punctuation + "，。！？；：、「」『』（）《》“”‘’…—")


def f1(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Of words, without case, punctuation and articles, each as often as it occurs."""

    def words(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()

    return _overlap(words(answer), words(right))


def f1_characters(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """`f1` of characters: Chinese has no spaces."""

    def characters(text: str) -> list[str]:
        return list("".join(text.lower().translate(PUNCTUATION).split()))

    return _overlap(characters(answer), characters(right))


def _overlap(a: list[str], b: list[str]) -> float:
    same = (collections.Counter(a) & collections.Counter(b)).total()
    return 2 * same / (len(a) + len(b)) if same else 0.0


def rouge_l(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L (Lin, 2004): F1 of the longest common subsequence of words, in lower case, without
    punctuation or stemming. Packages differ in how they part words."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (answer, right))
    same = _common(a, b)
    return 2 * same / (len(a) + len(b)) if same else 0.0


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence: row by row of the table of both."""
    row, others = np.zeros(len(b) + 1, int), np.asarray(b, object)
    for word in a:
        row[1:] = np.maximum.accumulate(np.where(others == word, row[:-1] + 1, row[1:]))
    return int(row[-1])


def class_named(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """The share that the right class has of those named, names within its own name left out."""
    named = [name for name in classes if name in answer]
    named = [name for name in named if name == right or name not in right]
    return 1 / len(named) if right in named else 0.0


def number_named(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """The share that the right number, the first in `right`, has of those in the answer."""
    number, numbers = re.findall(r"\d+", right)[:1], re.findall(r"\d+", answer)
    return sum([x] == number for x in numbers) / len(numbers) if numbers else 0.0


def code_line(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """How alike its first line is that has neither a comment nor a quotation mark of Markdown."""
    lines = answer.lstrip("\n").split("\n")
    first = next((x for x in lines if not any(sign in x for sign in ("`", "#", "//"))), "")
    return difflib.SequenceMatcher(None, first, right).ratio()


def contained(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Whether the answer has it."""
    return float(right in answer)


def contained_anyhow(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Whether the answer has it, in upper or lower case."""
    return float(right.lower() in answer.lower())


def first_number(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Whether the first number of both is the same."""
    numbers = [re.search(r"\d+(?:\.\d+)?", text) for text in (answer, right)]
    found = [float(number[0]) for number in numbers if number]
    return float(len(found) == 2 and found[0] == found[1])


def letter(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Whether the first letter from A to D that stands alone is the right one."""
    found = re.search(r"\b[A-D]\b", answer)
    return float(found is not None and found[0] == right)
