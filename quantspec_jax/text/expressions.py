"""Regular expressions that come with a checkpoint's tokenizer.

tokenizer.json may split a text by an expression (Split) or replace what one finds (Replace). The
library that searches gives up a match after ten million steps, which is a tenth of a second for
every character of a text: (a|aa){1,12}c is enough. So an expression that is not one of those below,
which real models have, is searched for in a child alone, and for a limited time: when the tokenizer
is read, and for each text that is encoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantspec_jax.text.child import Child, LimitedError

SECONDS = 3.0  # beside what a text or a file takes by its length
_CHARACTERS_A_SECOND = 100_000  # a tenth of what tokenizers do
_BYTES_A_SECOND = 1_000_000
_child = Child(most_bytes=2 << 30)

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN3_5 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = [
    rf"[^\r\n\p{{L}}\p{{N}}]?{first}{_LOWER}{times}"
    for first, times in ((f"{_UPPER}*", "+"), (f"{_UPPER}+", "*"))
]
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
TEKKEN = "|".join([*_WORDS, r"\p{N}", _REST])
O200K = "|".join(
    [*(word + "(?i:'s|'t|'re|'ve|'m|'ll|'d)?" for word in _WORDS), r"\p{N}{1,3}", _REST]
)
DIGIT, DIGITS, THREE_DIGITS, UP_TO_THREE = r"\p{N}", r"\p{N}+", "[0-9][0-9][0-9]", r"\p{N}{1,3}"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
GPT2_OPEN = GPT2.removesuffix(r"|\s+")
KNOWN = frozenset({
    *(GPT2, LLAMA3, QWEN2, QWEN3_5, TEKKEN, O200K, DIGIT, DIGITS, THREE_DIGITS, UP_TO_THREE),
    *(PUNCTUATION, GPT2_OPEN, " {2,}", r"\d", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+"),
})  # fmt: skip

_MARK = "_foreign_expressions_of"  # attribute of a tokenizer: where it came from


def foreign_in_files(paths: Iterable[Path]) -> bool:
    """Whether one of the JSON files has an expression that is not known. What is no JSON for Python
    is none for tokenizers."""
    found = False
    for path in paths:
        if path.suffix.lower() == ".json":
            with contextlib.suppress(ValueError, RecursionError):
                found |= _has_foreign(path.read_bytes())
    return found


def _has_foreign(definition: bytes) -> bool:
    """{"Regex": "..."} is an expression, wherever it stands in the JSON, and every one counts of a
    key that is there twice."""
    found: list[Any] = []
    json.loads(
        definition,
        object_pairs_hook=lambda pairs: found.extend(v for k, v in pairs if k == "Regex"),
    )
    return any(not isinstance(value, str) or value not in KNOWN for value in found)


def try_to_load(request: dict[str, Any], paths: Iterable[Path]) -> None:
    """Do in the child what the caller does next.

    Raises:
      LimitedError: it takes too long or too much. What it raises otherwise is for the caller.
    """
    seconds = SECONDS + sum(path.stat().st_size for path in paths) / _BYTES_A_SECOND
    try:
        _child.ask({"what": "load", **request}, seconds)
    except LimitedError as error:
        if error.kind in ("TimeoutError", "MemoryError"):
            raise


def mark(tokenizer: Any, where: str) -> None:
    """Note on it if not all of its expressions are known.

    Raises:
      ValueError: one of these is its decoder's, which runs for every token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # transformers' own Python
        return
    parts = (backend.decoder, backend.normalizer, backend.pre_tokenizer)
    decoder, *others = (part is not None and _has_foreign(part.__getstate__()) for part in parts)
    if decoder:
        raise ValueError("its decoder replaces by a regular expression that is not known")
    if any(others):
        setattr(tokenizer, _MARK, where)


def is_marked(tokenizer: Any) -> bool:
    return getattr(tokenizer, _MARK, None) is not None


def encode(text: str, tokenizer: Any, special: bool) -> list[int]:
    """Token ids of a text, by a tokenizer that is marked.

    Raises:
      ValueError: it fails, or takes too long.
    """
    definition = tokenizer.backend_tokenizer.to_str()
    name = hashlib.sha256(definition.encode()).hexdigest()
    request = {"what": "encode", "name": name, "text": text, "special": special}
    seconds = SECONDS + len(text) / _CHARACTERS_A_SECOND
    try:
        answer = _child.ask(request, seconds)
        if not answer:  # it does not have the tokenizer
            seconds += len(definition) / _BYTES_A_SECOND
            answer = _child.ask({**request, "definition": definition}, seconds)
    except LimitedError as error:
        raise ValueError(
            f"the tokenizer in {getattr(tokenizer, _MARK)} fails on {len(text):,} characters, by "
            f"regular expressions of its own: {error}"
        ) from error
    return answer["ids"]
