"""The child of `quantspec_jax/text/templates.py`: a request a line in, an answer a line out.

It is run as a script, so that it need not import the package, and jax with it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

_BYTES = 512 << 20  # beyond what Python and transformers take


def main() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_answer(render_jinja_template, request)), flush=True)


def _limit_memory() -> None:
    """Where the system knows such a limit and says how much there is already."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[0])
        most = pages * resource.getpagesize() + _BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _answer(render: Any, request: dict[str, Any]) -> dict[str, Any]:
    from jinja2 import TemplateError

    try:
        rendered = render(
            [request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=True,
            **request["names"],
        )
        text = rendered[0][0] if isinstance(rendered, tuple) else rendered[0]
    except Exception as error:  # a template is a program: it may raise anything
        message = (str(error).strip() or "no message").splitlines()[0][:300]
        refused = isinstance(error, TemplateError)
        return {"kind": type(error).__name__, "message": message, "refused": refused}
    if len(text) > request["most"]:
        grown = f"{len(text):,} characters, of {request['most']:,} that are allowed"
        return {"kind": "OverflowError", "message": f"it renders {grown}", "refused": False}
    return {"text": text}


if __name__ == "__main__":
    main()
