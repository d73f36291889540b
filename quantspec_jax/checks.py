"""Checks of what a caller gives."""

from __future__ import annotations

from typing import Any


def require(condition: bool, argument: str, given: Any, allowed: str) -> None:
    """Raise the ValueError that names the argument, what was given and what is allowed."""
    if not condition:
        raise ValueError(f"{argument} is {given!r}; allowed: {allowed}")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
