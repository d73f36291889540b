"""Chat templates, rendered in a process of their own.

A template is a program that came with a checkpoint. transformers runs it in a sandbox, which keeps
it from files and from Python's insides, and not from looping or from building a text of gigabytes.
So a child renders it (`quantspec_jax/text/render_template.py`), with little memory, and is ended
when it takes too long. One child serves all templates of a process.
"""

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

SECONDS = 3.0  # a template that ends takes milliseconds
STARTING_SECONDS = 120.0
_SCRIPT = Path(__file__).with_name("render_template.py")


class TemplateFailedError(Exception):
    """Attributes: `kind`, the error's name; `refused`, whether the template itself said no."""

    def __init__(self, kind: str, message: str, refused: bool = False):
        super().__init__(message)
        self.kind, self.refused = kind, refused


def render(template: str, messages: list[dict[str, str]], names: dict[str, Any]) -> str:
    """The conversation as text, with the prompt for an answer at its end.

    Args:
      names: what the template may call by name, the special tokens.

    Raises:
      TemplateFailedError: what the template raises, or that it takes too long or grows too large.
    """
    most = (1 << 20) + 8 * sum(len(message["content"]) for message in messages)
    answer = _renderer.ask(
        {"template": template, "messages": messages, "names": names, "most": most}
    )
    if "text" in answer:
        return answer["text"]
    raise TemplateFailedError(answer["kind"], answer["message"], answer["refused"])


class _Renderer:
    """The child, started when it is first asked and again after it was ended."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One line to the child, one from it; it is ended where that does not come."""
        with self._lock:
            try:
                child = self._started()
                assert child.stdin is not None
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
                return self._line(child, SECONDS)
            except OSError as error:  # BrokenPipeError: it died while it was written to
                self.stop()
                raise TemplateFailedError(type(error).__name__, str(error)) from error
            except BaseException:
                self.stop()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.stop()
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
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
                raise TemplateFailedError("TimeoutError", f"it takes over {seconds:g} seconds")
            parts.append(os.read(child.stdout.fileno(), 1 << 20))
            if not parts[-1]:
                raise TemplateFailedError("MemoryError", "it ended the process that renders it")
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


_renderer = _Renderer()
