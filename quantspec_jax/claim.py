"""A claim on a place on the disk: one process has it at a time, and a dead one has nothing.

The claim is a file, locked for as long as its owner lives: the system takes the lock from a process
that ends, however it ends. What the file says is for the others:

    {"pid": 4711, "host": "a", "boot": "5f0c…", "since": "2026-01-31 12:00:00", "token": "9be1d07c"}

The token is new with each claim. What its owner makes for the time being has the token in its name,
so whoever takes over a dead claim knows what that one left, and that nobody else made it. `dead`
lists the tokens of dead claims before it, whose leftovers its owner may not have removed yet.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from quantspec_jax.interrupts import held

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MOST_BYTES = 4096
_MOST_DEAD = 64  # owners killed one after the other, each before it removed what they had left


class Claim(NamedTuple):
    """`token` of this claim, and those of the dead ones that it took over."""

    token: str
    dead: tuple[str, ...]


@contextlib.contextmanager
def claim(path: Path, argument: str, given: str | Path) -> Iterator[Claim]:
    """Have the claim that the file `path` is; it is gone afterwards.

    Raises:
      ValueError: another process has it, or may have it for all that can be known here: says which,
        naming `argument` and what was `given` for it.
    """
    with contextlib.ExitStack() as stack:
        with held():
            descriptor, dead = _taken(path, argument, given)
            stack.callback(_give_up, path, descriptor)
            ours = _ourselves(dead)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(ours).encode(), 0)
        yield Claim(ours["token"], dead)


def _give_up(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)  # while it is locked: nobody else's
    os.close(descriptor)


def _ourselves(dead: tuple[str, ...]) -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    ours = {"pid": os.getpid(), **_machine(), "since": since, "token": secrets.token_hex(4)}
    return ours | {"dead": list(dead)}


def _machine() -> dict[str, str]:
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    return {"host": platform.node(), "boot": boot}


def _taken(path: Path, argument: str, given: str | Path) -> tuple[int, tuple[str, ...]]:
    """The open file, locked, and the tokens that it held."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            owner = _read(descriptor)
            if not _is_free(descriptor, owner):
                raise ValueError(
                    f"{argument} is {str(given)!r}, which {_described(owner)} is writing; allowed: "
                    f"to wait for it, or another name. If it is dead, delete {path}"
                )
            if _is_the_same(path, descriptor):
                return descriptor, _tokens(owner)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner was done with it, and took it away, a moment ago


def _read(descriptor: int) -> dict[str, Any]:
    """What the owner says of itself: {} where it was killed before it could, or says it soon."""
    try:
        values = json.loads(os.pread(descriptor, _MOST_BYTES, 0) or b"{}")
        return {str(name): value for name, value in values.items()}
    except (ValueError, AttributeError, RecursionError):
        return {"pid": None}  # nobody that we know


def _tokens(owner: dict[str, Any]) -> tuple[str, ...]:
    """What becomes a part of names, so it is nothing else than tokens."""
    before = owner.get("dead")
    every = [*(before if isinstance(before, list) else []), owner.get("token")]
    tokens = [x for x in every if isinstance(x, str) and re.fullmatch("[0-9a-f]{8}", x)]
    return tuple(tokens[-_MOST_DEAD:])


def _is_free(descriptor: int, owner: dict[str, Any]) -> bool:
    """Lock the file; whether nobody lives who has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise
        return not owner or (_is_here(owner) and not runs(owner["pid"]))  # no locks on this disk
    return not owner or _is_here(owner)  # a lock may not reach across machines


def _is_here(owner: dict[str, Any]) -> bool:
    here, whole = _machine(), isinstance(owner.get("pid"), int)
    same = any(value and owner.get(name) == value for name, value in here.items())
    return whole and same


def runs(pid: int) -> bool:
    """Whether a process has this number here, anybody's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _is_the_same(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    return False


def _described(owner: dict[str, Any]) -> str:
    if not isinstance(owner.get("pid"), int):
        return "another process"
    return f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')},"
