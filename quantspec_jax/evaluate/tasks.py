"""Tasks about long contexts that need no data set: the synthetic half of SCBench (arXiv
2412.10319), and needles in a haystack as in RULER (arXiv 2404.06654).

A sample is a context and a few turns about it, each a question and the one right answer. Questions
end where the answer begins, so that a model which only continues texts can be asked.

    kv              JSON of random identifiers; the value of a key
    prefix-suffix   random strings; the one that begins with given characters
    variables       VAR X1 = 12345, VAR X2 = X1, …, among others; the names that have a value
    functions       a list of numbers; its least, greatest, first, …
    needles         numbers of cities, in sentences that lie about in a text; the number of a city
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from quantspec_jax.checks import require

TURNS = 5
HOPS = 4
CITIES = re.findall(
    r"\w+",
    "Alexandria Bergen Cordoba Dakar Esbjerg Florence Geneva Havana Izmir Jakarta Kyoto Lisbon "
    "Manila Nairobi Oslo Porto Quito Riga Seville Tunis Utrecht Vienna Warsaw Yerevan Zagreb",
)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question, which ends where the answer begins, and what ends the answer."""

    question: str
    answer: str
    end: str = "\n"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A context and what is asked about it."""

    context: str
    turns: tuple[Turn, ...]


# A task makes a sample with `size` items of context.
Make = Callable[[np.random.Generator, int, str], Sample]


def _identifier(rng: np.random.Generator) -> str:
    """As a UUID."""
    digits = "".join(rng.choice(list("0123456789abcdef"), 32))
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def key_values(rng: np.random.Generator, size: int, text: str) -> Sample:
    """Any of the keys."""
    pairs = {_identifier(rng): _identifier(rng) for _ in range(size)}
    asked = rng.choice(list(pairs), min(TURNS, size), replace=False)
    turns = (Turn(f'The value of the key "{key}" is "', pairs[key], '".\n') for key in asked)
    head = "Extract the value of a key from this JSON object.\n\n"
    return Sample(f"{head}{json.dumps(pairs, indent=0)}\n\n", tuple(turns))


def prefix_suffix(rng: np.random.Generator, size: int, text: str) -> Sample:
    """Strings of 24 letters; the first 8 tell which."""
    letters = list(string.ascii_lowercase)
    words = ["".join(rng.choice(letters, 24)) for _ in range(size)]
    asked = rng.choice(size, min(TURNS, size), replace=False)
    turns = (
        Turn(f"The string that begins with {words[i][:8]} is {words[i][:8]}", words[i][8:], ".\n")
        for i in asked
    )
    return Sample("These are strings.\n\n" + "\n".join(words) + "\n\n", tuple(turns))


def variables(rng: np.random.Generator, size: int, text: str) -> Sample:
    """Chains of 4 hops in a random order among each other, kept in order within: RULER's tracking.
    A few chains among lines that say nothing; asked for the names of a value."""
    chains = max(1, min(TURNS, size // (2 * HOPS)))
    names = ["".join(row) for row in rng.choice(list(string.ascii_uppercase), (chains * HOPS, 5))]
    values = rng.choice(np.arange(10_000, 99_999), chains, replace=False)
    lines = ["The grass is green. The sky is blue. The sun is yellow."] * size
    turns = []
    for value, start in zip(values, range(0, len(names), HOPS), strict=True):
        own = names[start : start + HOPS]
        said = [f"VAR {own[0]} = {value}"]
        said += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(own)]
        for at, line in zip(sorted(rng.choice(size, HOPS, replace=False)), said, strict=True):
            lines[at] += " " + line + "."
        question = f"The variables that have the value {value} are"
        turns.append(Turn(question, " " + " ".join(own), ".\n"))
    return Sample("\n".join(lines) + "\n\n", tuple(turns))


def functions(rng: np.random.Generator, size: int, text: str) -> Sample:
    """Numbers of four digits."""
    numbers = rng.integers(1000, 9999, size).tolist()
    asked: dict[str, Any] = {
        "greatest": max(numbers),
        "least": min(numbers),
        "first": numbers[0],
        "last": numbers[-1],
        "median": sorted(numbers)[(size - 1) // 2],
    }
    turns = (Turn(f"The {name} of the numbers is", f" {x}", ".\n") for name, x in asked.items())
    return Sample(f"These are numbers: {numbers}\n\n", tuple(turns))


def needles(rng: np.random.Generator, size: int, text: str) -> Sample:
    """Five cities' numbers between the first `size` sentences of the text."""
    sentences = [s.strip() for s in text.replace("\n", " ").split(". ") if s.strip()]
    require(len(sentences) >= size, "text", f"{len(sentences)} sentences", f"{size} or more")
    lines = sentences[:size]
    cities = rng.choice(CITIES, min(TURNS, size), replace=False)
    numbers = rng.choice(np.arange(1_000_000, 9_999_999), len(cities), replace=False)
    for city, number, at in zip(
        cities, numbers, rng.choice(size, len(cities), replace=False), strict=True
    ):
        lines[at] += f". The special magic number for {city} is {number}"
    turns = (
        Turn(f"The special magic number for {city} is", f" {number}", ".\n")
        for city, number in zip(cities, numbers, strict=True)
    )
    return Sample(". ".join(lines) + ".\n\n", tuple(turns))


TASKS: dict[str, Make] = {
    "kv": key_values,
    "prefix-suffix": prefix_suffix,
    "variables": variables,
    "functions": functions,
    "needles": needles,
}


def fitting(
    make: Make, seed: int, text: str, count: Callable[[str], int], least: int, most: int
) -> Sample:
    """The sample of a seed whose context has most items and at most `most` tokens.

    Raises:
      ValueError: it has fewer than `least`, however many items: the text is too short.
    """

    def sample(size: int) -> Sample:
        return make(np.random.default_rng(seed), size, text)

    def fits(size: int) -> bool:
        return count(sample(size).context) <= most

    items = _items(make, text)
    require(items >= TURNS, "text", f"{items} sentences", f"{TURNS} or more")
    low = high = TURNS
    while high < items and fits(high):
        low, high = high, min(2 * high, items)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    found = sample(low)
    tokens = count(found.context)
    require(least <= tokens <= most, "context", f"{tokens} tokens", f"{least} to {most} of a task")
    return found


def _items(make: Make, text: str) -> int:
    """How many items there may be."""
    if make is not needles:
        return 1 << 20
    return sum(bool(s.strip()) for s in text.replace("\n", " ").split(". "))


def turn_texts(sample: Sample, mode: str) -> Sequence[Sequence[Turn]]:
    """What comes after the context: in "multi-turn" all turns one after the other, each with the
    right answers of those before it; in "questions" each by itself."""
    return [sample.turns] if mode == "multi-turn" else [(turn,) for turn in sample.turns]
