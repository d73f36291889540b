"""Files that hold one JSON object, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantspec_jax.checks import require


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a file; ValueError names the file where there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    require(isinstance(values, dict), str(path), type(values).__name__, "one JSON object")
    return values


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path`, of the same suffix, to write to: what lies there at the end is on the
    disk, then gets the name `path`. After an error it is gone, and `path` is as it was."""
    part = f".{path.stem}.{os.getpid()}-{time.monotonic_ns()}.partial{path.suffix}"
    partial = path.with_name(part)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any], indent: int | None = None) -> None:
    """Whole or not at all; `read_json` reads it."""
    write_text(path, json.dumps(values, indent=indent, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """What was written to a file, or the names in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
