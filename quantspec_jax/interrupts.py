"""Steps that Ctrl-C and SIGTERM shall not cut in two."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals that come meanwhile are taken at the end. (Only the main thread takes any.)"""
    came: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        came.append(number)

    with _again(came), contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
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
