"""Checks of what a caller gives."""

from __future__ import annotations

import contextlib
import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

LARGEST_INT = 2**31 - 1  # positions, ids and dimensions are int32

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 300
_SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 24


def require(condition: bool, argument: str, given: Any, allowed: str) -> None:
    """Raise the ValueError that names the argument, what was given and what is allowed."""
    if not condition:
        raise ValueError(f"{argument} is {_SHORT.repr(given)}; allowed: {allowed}")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_number(name: str, value: Any, least: float, most: float) -> None:
    """A number within bounds: neither a NaN nor a boolean is."""
    inside = is_number(value) and least <= value <= most
    require(inside, name, value, f"a number from {least:g} to {most:g}")


def fields_of(cls: type, values: Any, what: str) -> dict[str, Any]:
    """What a dataclass is made from, as a dict: all that it needs and nothing that it lacks."""
    require(isinstance(values, Mapping), what, values, "an object")
    fields = dataclasses.fields(cls)
    known = {field.name for field in fields}
    needed = {
        field.name
        for field in fields
        if field.default is field.default_factory is dataclasses.MISSING
    }
    unknown, missing = sorted(set(values) - known), sorted(needed - set(values))
    require(not unknown, f"{what} keys", unknown, ", ".join(sorted(known)))
    require(not missing, f"{what} keys", sorted(values), f"{', '.join(missing)}, too")
    return dict(values)


@contextlib.contextmanager
def within(where: Any) -> Iterator[None]:
    """What is wrong in a file, by a check that does not know the file: its name goes in front."""
    try:
        yield
    except ValueError as error:
        if str(where) in str(error):
            raise
        raise ValueError(f"{where}: {error}") from error
