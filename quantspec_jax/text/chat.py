"""Chat prompts: messages through the tokenizer's own template."""

from __future__ import annotations

from typing import Any

from quantspec_jax.checks import require
from quantspec_jax.text.prompts import encode


def chat_ids(prompt: str, tokenizer: Any, system: str | None = None) -> list[int]:
    """Token ids of a conversation in which it is the model's turn to answer `prompt`.

    Args:
      prompt: the user's message.
      tokenizer: a transformers tokenizer with a chat template.
      system: the system message; None: the template's own default, if it has one.

    Raises:
      ValueError: the prompt is empty, there is no chat template, it refuses the messages (some take
        no system message), fails, or renders nothing.
    """
    require(prompt != "", "prompt", prompt, "a text of one character or more")
    # The template writes the special tokens itself.
    ids = encode(chat_text(prompt, tokenizer, system), tokenizer, special=False)
    if not ids:
        raise ValueError(_NOTHING)
    return ids


_NOTHING = "the chat template renders nothing for this conversation"


def chat_text(prompt: str, tokenizer: Any, system: str | None = None) -> str:
    """The same conversation as text, special tokens written out."""
    from jinja2 import TemplateError

    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError("chat is not possible: the tokenizer has no chat template")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template refuses messages of the roles {roles}: {_first_line(error)}"
        ) from error
    except Exception as error:  # a template is a program: it may raise anything
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(f"the chat template fails with {reason}") from error
    if not text:
        raise ValueError(_NOTHING)
    return text


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
