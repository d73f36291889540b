"""The text that the draft's weights are calibrated on."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import numpy as np

from quantspec_jax.checks import require
from quantspec_jax.text.prompts import encode

CHUNKS, LENGTH = 16, 1024


def calibration_tokens(
    tokenizer: Any, text: str | None = None, *, chunks: int = CHUNKS, length: int = LENGTH
) -> np.ndarray:
    """Token ids to calibrate on, int32 [chunks, length].

    Args:
      tokenizer: the model's.
      text: what the model is used for reads like; chunks are taken from all over it. None: the
        reference manual that comes with Python, which needs no download.

    Raises:
      ValueError: no tokenizer, or the text is shorter than chunks · length tokens.
    """
    require(tokenizer is not None, "tokenizer", tokenizer, "one: calibration reads text")
    given = default_text() if text is None else text
    ids = encode(given, tokenizer, "calibration text", special=False)
    needed = chunks * length
    enough = f"{needed} or more ({chunks} chunks of {length})"
    require(len(ids) >= needed, "calibration text", f"{len(ids)} tokens", enough)
    starts = np.linspace(0, len(ids) - length, chunks).astype(int)
    return np.stack([np.asarray(ids[i : i + length], np.int32) for i in starts])


def default_text() -> str:
    """Prose of Python's reference manual."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))
