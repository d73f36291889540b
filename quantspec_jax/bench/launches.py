"""Launches of a round of the decode loop, counted in XLA's optimized program.

A kernel, a fusion or a copy is a launch. A loop counts as often as it turns; where that is not
known, once, with its condition: the rounds that read the same pages. Of branches the first counts,
the greedy one. The program is a loop of rounds up to the next flush, in a loop of flushes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LAUNCHES = frozenset(
    (
        *("fusion", "custom-call", "copy", "sort"),
        *("all-reduce", "all-reduce-start", "all-gather", "all-gather-start"),
    )
)
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
CALLED = r"{}=%?([\w.\-]+)"


class Operation(NamedTuple):
    """One instruction: its kind, and the line it stands in."""

    kind: str
    line: str

    def called(self, attribute: str) -> str:
        """The computation that an attribute names."""
        found = re.search(CALLED.format(attribute), self.line)
        assert found is not None
        return found[1]

    @property
    def turns(self) -> int | None:
        """Turns of a loop, where XLA knows them."""
        found = re.search(r"known_trip_count\W+n\W+(\d+)", self.line)
        return int(found[1]) if found else None

    @property
    def branch(self) -> str:
        """The first branch of a conditional."""
        found = re.search(r"branch_computations=\{%?([\w.\-]+)", self.line)
        return found[1] if found else self.called("false_computation")


class Module:
    """The computations of an optimized program."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Operation]] = {}
        self.entry = ""
        current: list[Operation] = []
        for line in text.splitlines():
            header = HEADER.match(line)
            if header:
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif " = " in line and line.startswith(" "):
                current.append(Operation(_kind(line.split(" = ", 1)[1]), line))

    def launches(self, name: str) -> int:
        """Launches of a computation."""
        total = 0
        for operation in self.computations[name]:
            if operation.kind in LAUNCHES:
                total += 1
            elif operation.kind == "while":
                turns = 1 if operation.turns is None else operation.turns
                total += self.turn(operation) * turns
            elif operation.kind == "call":
                total += self.launches(operation.called("to_apply"))
            elif operation.kind == "conditional":
                total += self.launches(operation.branch)
        return total

    def turn(self, loop: Operation) -> int:
        """Launches of one turn of a loop."""
        condition = self.launches(loop.called("condition")) if loop.turns is None else 0
        return self.launches(loop.called("body")) + condition

    def open_loop(self, name: str) -> Operation | None:
        """The first loop of an unknown number of turns in a computation."""
        for operation in self.computations[name]:
            if operation.kind == "while" and operation.turns is None:
                return operation
            if operation.kind == "call" and (loop := self.open_loop(operation.called("to_apply"))):
                return loop
        return None


def launches_a_round(text: str) -> int | None:
    """Launches of a round; None where the program is no decode loop. Where rounds copy
    (`generate.lookup`), of one that does and one that does not, together.

    Args:
      text: the optimized program, `compiled.as_text()`.
    """
    module = Module(text)
    until_flush = module.open_loop(module.entry) if module.entry else None
    rounds = module.open_loop(until_flush.called("body")) if until_flush else None
    return module.turn(rounds) if rounds else None


def _kind(rest: str) -> str:
    """The instruction's name from "type name(operands), ...": a tuple's type has parentheses."""
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if character == " " and depth == 0:
            return rest[i + 1 :].split("(", 1)[0]
    return ""
