"""Chat templates, rendered in a process of their own.

A template is a program that came with a checkpoint. transformers runs it in a sandbox, which keeps
it from files and from Python's insides, and not from looping or from building a text of gigabytes.
So a child renders it, with little memory, and is ended when it takes too long. One child serves all
templates of a process.
"""

from __future__ import annotations

from typing import Any

from quantspec_jax.text.child import Child

SECONDS = 3.0  # a template that ends takes milliseconds
_child = Child(most_bytes=512 << 20)


def render(template: str, messages: list[dict[str, str]], names: dict[str, Any]) -> str:
    """The conversation as text, with the prompt for an answer at its end.

    Args:
      names: what the template may call by name, the special tokens.

    Raises:
      LimitedError: what the template raises, or that it takes too long or grows too large.
    """
    most = (1 << 20) + 8 * sum(len(message["content"]) for message in messages)
    request = {"template": template, "messages": messages, "names": names, "most": most}
    return _child.ask({"what": "template", **request}, SECONDS)["text"]
