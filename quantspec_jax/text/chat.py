"""Chat prompts: messages through the tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantspec_jax.checks import require
from quantspec_jax.text.child import LimitedError
from quantspec_jax.text.prompts import encode
from quantspec_jax.text.templates import render


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
    return conversation_ids(_messages(prompt, system), tokenizer)


def conversation_ids(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[int]:
    """As `chat_ids`, of messages, mappings of `role` and `content`."""
    # The template writes the special tokens itself.
    ids = encode(conversation_text(messages, tokenizer), tokenizer, special=False)
    if not ids:
        raise ValueError(_NOTHING)
    return ids


_NOTHING = "the chat template renders nothing for this conversation"


def chat_text(prompt: str, tokenizer: Any, system: str | None = None) -> str:
    """The same conversation as text, special tokens written out."""
    return conversation_text(_messages(prompt, system), tokenizer)


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def conversation_text(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> str:
    """Messages by the tokenizer's template, with the beginning of an answer."""
    template = _template(tokenizer)
    try:
        text = render(template, [dict(m) for m in messages], dict(tokenizer.special_tokens_map))
    except LimitedError as error:
        if error.refused:
            roles = ", ".join(message["role"] for message in messages)
            refusal = f"the chat template refuses messages of the roles {roles}: {error}"
            raise ValueError(refusal) from error
        raise ValueError(f"the chat template fails with {error.kind}: {error}") from error
    if not text:
        raise ValueError(_NOTHING)
    return text


def _template(tokenizer: Any) -> str:
    """The tokenizer's own, or of several the one for a conversation without tools."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat is not possible: the tokenizer has no chat template")
    try:
        template = tokenizer.get_chat_template()
    except Exception as error:  # of no template by that name, in transformers' own words
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"chat is not possible: {reason}") from error
    require(isinstance(template, str), "the tokenizer's chat template", template, "a text")
    return template
