"""What people read: results on standard output, notices and errors on standard error."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from quantspec_jax.notices import notice

CALLER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
LONGEST_MESSAGE = 600


def write(text: str) -> None:
    """Text as it comes; what the terminal's encoding lacks becomes "?"."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """A warning is a notice; of those that differ in a name alone the first is enough (such as one
    a compiled program that a full disk does not keep)."""
    said = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line = " ".join(str(message).split())
        kind = re.sub(r"'[^']*'", "", line)
        if kind not in said:
            said.add(kind)
            notice(f"warning: {line[:LONGEST_MESSAGE]}")

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def fail(message: str, status: int) -> int:
    """Say what went wrong; returns the exit status."""
    notice(f"error: {message}")
    return status


def status_of(error: Exception) -> int:
    """2 for what the caller got wrong, 1 for the rest."""
    return 2 if isinstance(error, CALLER_ERRORS) else 1


def describe(error: Exception) -> str:
    """One line for any error."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, ValueError | NotImplementedError | OSError) and str(error):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)  # no terminal's codes
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[:LONGEST_MESSAGE]}... (--debug shows all)"
    return line


def show(result: dict[str, Any], prefix: str = "") -> None:
    """A result for people: a line an entry."""
    for name, value in result.items():
        if isinstance(value, dict):
            show(value, f"{prefix}{name} ")
        else:
            number = f"{value:.6g}" if isinstance(value, float) else value
            print(f"{prefix}{name}".ljust(24), number)


def show_rows(result: dict[str, Any]) -> None:
    """A benchmark's result for people: its rows, a line each."""
    for row in result.get("rows", [result]):
        cells = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
        )
        print("  ".join(cells))
