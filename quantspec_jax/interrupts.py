"""Ctrl-C and SIGTERM: commands that they end, and steps that they shall not cut in two."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

UNUSED = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_raised: list[type[KeyboardInterrupt]] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM ends a command as Ctrl-C does."""


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Both signals raise an interruption in the main thread, where nobody else had a use for
    them."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _raised.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise _raised[-1]

    handled()
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number, unused in UNUSED.items():
                if signal.getsignal(number) is unused:
                    stack.callback(signal.signal, number, unused)
                    signal.signal(number, interrupt)
        with unmasked():
            yield


@contextlib.contextmanager
def unmasked() -> Iterator[None]:
    """JAX's C++ calls Python (to compare, to hash) and reports whatever was raised there as an
    error of its own, an interruption too: such an error leaves here as the interruption."""
    try:
        yield
    except Exception as error:
        if _raised:
            raise _raised[-1] from error
        raise


def handled() -> None:
    """What was interrupted has ended well, and the command goes on: a later error is an error."""
    _raised.clear()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals that come meanwhile are taken at the end. (Only the main thread takes any.)"""
    came: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        came.append(number)

    with _again(came), contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in UNUSED:
                handler = signal.getsignal(number)
                if handler is not None:  # one that is not Python's cannot be put back
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, later)
        yield


@contextlib.contextmanager
def _again(came: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for number in came[:1]:
            signal.raise_signal(number)
