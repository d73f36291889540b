"""A process with little memory and little time, for programs that come with a checkpoint: its chat
template and its tokenizer's regular expressions (`quantspec_jax/text/limited.py`)."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

STARTING_SECONDS = 120.0
_SCRIPT = Path(__file__).with_name("limited.py")


class LimitedError(Exception):
    """What the child's work raised, or that it took too long or too much.

    Attributes: `kind`, the error's name; `refused`, whether a template itself said no.
    """

    def __init__(self, kind: str, message: str, refused: bool = False):
        super().__init__(message)
        self.kind, self.refused = kind, refused


class Child:
    """The process, started when it is first asked and again after it was ended.

    Args:
      most_bytes: memory beyond what it takes to start.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """One line to the child, one from it; it is ended where that does not come.

        Raises:
          LimitedError: in place of an answer.
        """
        with self._lock:
            try:
                child = self._started()
                assert child.stdin is not None
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
                answer = self._line(child, seconds)
            except OSError as error:  # BrokenPipeError: it died while it was written to
                self.stop()
                raise LimitedError(type(error).__name__, str(error)) from error
            except BaseException:
                self.stop()
                raise
        if "kind" in answer:
            raise LimitedError(answer["kind"], answer["message"], answer["refused"])
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.stop()
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(self._most_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
                start_new_session=True,  # Ctrl-C is for the parent
            )
            self._line(self._child, STARTING_SECONDS)
        return self._child

    def _line(self, child: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        assert child.stdout is not None
        deadline, parts = time.monotonic() + seconds, [b""]
        while not parts[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                raise LimitedError("TimeoutError", f"it takes over {seconds:g} seconds")
            parts.append(os.read(child.stdout.fileno(), 1 << 20))
            if not parts[-1]:
                raise LimitedError("MemoryError", "it ended the process that runs it")
        return json.loads(b"".join(parts))

    def stop(self) -> None:
        """Also at the end of this process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            child.wait()
