"""Prompts, from what the caller gave to lists of token ids."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantspec_jax.text import expressions
from quantspec_jax.text.tokenizer import is_panic

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
ALLOWED = "a text, a list of texts, token ids, or a list of lists of token ids"


def read_prompts(prompts: Prompts, tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
      prompts: a text, token ids, or a list of either. Arrays of integers, [S] or [B, S], are ids.
      tokenizer: encodes texts, with the special tokens that it adds itself; None: ids alone.
      vocab_size: N; ids are from 0 to N − 1.

    Raises:
      ValueError: no prompt, an empty one, or one that is neither text nor ids of the vocabulary.
    """
    if hasattr(prompts, "tolist"):  # an array
        prompts = np.asarray(prompts).tolist()
    single = isinstance(prompts, str) or (_is_sequence(prompts) and _is_flat(prompts))
    several = [prompts] if single else prompts
    _require(_is_sequence(several) and len(several) > 0, "prompts", prompts, ALLOWED)
    names = ["prompt"] if len(several) == 1 else [f"prompt {i}" for i in range(len(several))]
    return [
        _read_prompt(prompt, tokenizer, vocab_size, name)
        for prompt, name in zip(several, names, strict=True)
    ]


def read_text(path: str, what: str = "prompt file") -> str:
    """The text of a UTF-8 file, or of standard input where `path` is `-`.

    Raises:
      ValueError: it is not UTF-8; says which file and at which byte.
      OSError: it cannot be read.
    """
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    name = "standard input" if path == "-" else path
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(
            f"{what} {name}: not UTF-8 (byte 0x{byte:02X} at offset {error.start})"
        ) from None


def encode(text: str, tokenizer: Any, name: str = "prompt", *, special: bool = True) -> list[int]:
    """Token ids of a text, with the tokenizer's own special tokens unless `special` is false."""
    _require(tokenizer is not None, name, text, "token ids (the model has no tokenizer)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds what is not UTF-8 (at character {error.start})") from None
    if expressions.is_marked(tokenizer):
        return expressions.encode(text, tokenizer, special)
    try:
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"{name}: the tokenizer fails on it: {error}") from error
    return [int(token) for token in ids]


def _read_prompt(prompt: Any, tokenizer: Any, vocab_size: int, name: str) -> list[int]:
    if hasattr(prompt, "tolist"):
        prompt = np.asarray(prompt).tolist()
    if isinstance(prompt, str):
        _require(prompt != "", name, prompt, "a text of one character or more")
        text, prompt = prompt, encode(prompt, tokenizer, name)
        _require(len(prompt) > 0, name, text, "a text of one token or more")
    _require(_is_sequence(prompt), name, prompt, "a text or token ids")
    _require(len(prompt) > 0, name, prompt, "one token id or more")
    if _are_ints(prompt) and min(prompt) >= 0 and max(prompt) < vocab_size:
        return list(prompt)
    for token in prompt:
        _require(_is_id(token), f"a token id of {name}", token, "integers")
        inside = 0 <= token < vocab_size
        _require(inside, f"a token id of {name}", token, f"0 to {vocab_size - 1}, the vocabulary")
    return [int(token) for token in prompt]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_flat(values: Sequence[Any]) -> bool:
    """Whether these are ids (right or wrong ones) of one prompt, not several prompts."""
    return len(values) > 0 and (
        _are_ints(values)
        or all(
            not isinstance(value, str) and not _is_sequence(value) and not np.ndim(value)
            for value in values
        )
    )


def _are_ints(values: Sequence[Any]) -> bool:
    """Whether that is all they are: to look closer at each of 100,000 takes 0.3 s."""
    return all(type(value) is int for value in values)


def _is_id(value: Any) -> bool:
    if hasattr(value, "dtype"):
        return np.ndim(value) == 0 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, name: str, given: Any, allowed: str) -> None:
    """As `require`, for values that may be long."""
    if not condition:
        text = repr(given)
        text = text if len(text) <= 60 else f"{text[:57]}..."
        raise ValueError(f"{name} is {text} ({type(given).__name__}); allowed: {allowed}")
