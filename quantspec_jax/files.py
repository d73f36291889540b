"""How files are opened and read, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import stat
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from quantspec_jax import claim
from quantspec_jax.checks import require

_BOOT, _SPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
MOST_JSON_BYTES = 64 << 20  # a configuration has kilobytes, an index of shards a few megabytes


def exists(path: Path) -> bool:
    """As Path.exists, for names that no file can have, too."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def open_file(path: str | Path) -> BinaryIO:
    """A regular file, to be read. Whatever else has a name is a ValueError: reading a pipe or a
    device may wait, or have no end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        never = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.ENODEV)
        if isinstance(error, OSError) and error.errno not in never:
            raise
        raise ValueError(f"{path} cannot be opened: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, most: int = MOST_JSON_BYTES) -> bytes:
    """A whole regular file of `most` bytes at most."""
    with open_file(path) as stream:
        content = stream.read(most + 1)
    require(len(content) <= most, f"size of {path}", "larger", f"{most:,} bytes")
    return content


def check_regular(paths: Iterable[Path], most: int) -> None:
    """ValueError where one of them is no regular file of `most` bytes at most, for files that
    another library opens."""
    for path in paths:
        given = "a directory, a pipe, a device or a link to nothing"
        require(path.is_file(), str(path), given, "a regular file")
        size = path.stat().st_size
        require(size <= most, f"size of {path}", size, f"{most:,} bytes at most")


def check_output(path: str | None, option: str = "--output") -> None:
    """ValueError unless the file of an option can be made where it is to lie; None: none is."""
    if path is not None:
        folder = os.path.isdir(os.path.dirname(path) or ".")
        require(folder, option, path, "a file in an existing directory")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a file; ValueError names the file where there is none."""
    content = read_bytes(path)
    try:
        values = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is not JSON: it is nested too deep") from error
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} is not JSON: {error}") from error
    require(isinstance(values, dict), str(path), type(values).__name__, "one JSON object")
    return values


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path`, of the same suffix, to write to: what lies there at the end is on the
    disk, then gets the name `path`. After an error it is gone, and `path` is as it was. What a
    process that was killed left there is removed."""
    remove_dead(path)
    part = f"{_part(path)}{os.getpid()}-{time.monotonic_ns()}.partial{path.suffix}"
    partial = path.with_name(part)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_dead(path: Path) -> None:
    """Remove what `whole` left beside `path` in processes of this machine that run no more."""
    name = re.compile(rf"{re.escape(_part(path))}(\d+)-\d+\.partial{re.escape(path.suffix)}")
    with contextlib.suppress(OSError):  # it is no directory, or not ours to change
        for found in filter(None, map(name.fullmatch, os.listdir(path.parent))):
            if not claim.runs(int(found[1])):
                path.with_name(found[0]).unlink(missing_ok=True)


def _part(path: Path) -> str:
    """Begins the names beside `path`: with the boot and the space of process numbers, for a number
    says nothing in another one."""
    text = _BOOT.read_text() if _BOOT.exists() else platform.node()
    space = os.readlink(_SPACE) if _SPACE.is_symlink() else ""
    return f".{path.stem}.{zlib.crc32((text + space).encode()):08x}-"


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
