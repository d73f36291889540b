"""Token ids to text while they arrive: whole characters only, cut before a stop string.

A tokenizer decodes sequences, not tokens: a token may hold a part of a character, and the first
one may lose its leading space. So ids are decoded in a window that begins one step back,

    ids   ... | context | new |      text of new = decode(context + new) less decode(context)

and the window moves on at boundaries behind which no later id changes anything. Each id is decoded
a few times, however long the text grows. The first context is the end of the prompt: the text of a
completion is decode(prompt + ids) less decode(prompt).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from quantspec_jax.checks import require

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) UTF-8
LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, so tokens at most
_FIRST_MARK = 0xD800
LONG_WINDOW = 64  # ids that wait for the end of a character before another boundary is sought


class Detokenizer:
    """Text of a growing sequence of ids, in final pieces.

    The pieces together are `tokenizer.decode(prompt + ids, skip_special_tokens=True,
    clean_up_tokenization_spaces=False)` of all the ids, less what it is for the prompt alone. Where
    the prompt ends within a character, the first ids complete it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._byte_ids, self._special_ids = _byte_ids(tokenizer), frozenset(special_ids(tokenizer))
        self._ids = self._end_of(prompt)
        self._settled = 0  # ids before the run of byte tokens at the end
        self._context = 0  # first id of the window
        self._boundary = len(self._ids)  # first id of its new part
        self._context_text = self._decode(0, self._boundary)
        self._emitted = 0  # characters of the window's text, context included, that are out
        self._begun = False  # whether any are out that are not the prompt's

    def push(self, ids: Iterable[int]) -> str:
        """Take new ids; returns the text that became final with them."""
        for token in ids:
            self._ids.append(int(token))
            # Whether a byte token is a part of a character depends on its whole run, which tokens
            # that decoding leaves out do not end.
            if self._is_text(int(token)):
                self._settled = len(self._ids)
        if self._settled <= self._boundary:
            return ""
        text = self._decode(self._context, self._settled)
        piece = self._emit(text.removesuffix(REPLACEMENT))  # perhaps the start of a character
        self._move_window(text)
        return piece

    def finish(self) -> str:
        """The text held back so far; the sequence has ended."""
        return self._emit(self._decode(self._context, len(self._ids)))

    def _is_text(self, token: int) -> bool:
        """Whether it is neither a byte nor left out in decoding: special, or the model's alone."""
        if self._tokenizer is None or token in self._special_ids or token in self._byte_ids:
            return False
        return self._tokenizer.convert_ids_to_tokens(token) is not None

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """Ids at the end of the prompt, from a token of text on, that have a text."""
        length = 8
        while length < len(prompt):
            end = [int(token) for token in prompt[-length:]]
            start = next((i for i, token in enumerate(end) if self._is_text(token)), length)
            if decode(self._tokenizer, end[start:]):
                return end[start:]
            length *= 2
        return [int(token) for token in prompt]

    def _decode(self, start: int, end: int) -> str:
        return decode(self._tokenizer, self._ids[start:end])

    def _emit(self, text: str) -> str:
        if not self._begun:
            self._emitted = _common(text, self._context_text)
        piece = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        self._begun |= piece != ""
        return piece

    def _move_window(self, text: str) -> None:
        """Start the window at the old boundary, if there is a new one with text before it.

        Without text the new context might be special tokens alone, and the token after it would
        be decoded as the first of a sequence.
        """
        boundary, text = self._find_boundary(text)
        if len(text) <= len(self._context_text):
            return
        beyond = self._emitted - len(text)
        self._context_text = self._decode(self._boundary, boundary)
        self._emitted = len(self._context_text) + beyond
        self._context, self._boundary = self._boundary, boundary

    def _find_boundary(self, text: str) -> tuple[int, str]:
        """A boundary in the window's settled ids, and the window's text before it."""
        end = self._settled
        if not text.endswith(REPLACEMENT):
            return end, text
        if end - self._boundary > LONG_WINDOW:  # bytes that will never be UTF-8
            for cut in range(end - 1, end - 1 - LONGEST_CHARACTER, -1):
                before, after = self._decode(self._context, cut), self._decode(cut, end)
                if after and before + after == text:
                    return cut, before
        return self._boundary, ""


class TextStream:
    """Streamed text of one generated sequence, with stop strings.

    The text ends before the first stop string (the one whose last character comes first; of several
    that end there, the longest), wherever tokens and pushes are split. What may still become a stop
    string is held back. Special tokens are not text, but those that a stop string names count as
    theirs while it is sought.

    Attributes:
      stopped: whether a stop string was found; later ids are ignored.
      tokens: the ids taken, up to and including the one that completes the stop string. So the text
        of `tokens` may be longer than `text`: by the stop string and the rest of its last token.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._prompt = prompt
        given = (stop,) if isinstance(stop, str) else tuple(stop)
        allowed = "no stop strings (the model has no tokenizer)"
        require(tokenizer is not None or not given, "stop", given, allowed)
        self._marks, self._stop = _mark_special(tokenizer, given)
        self._pieces: list[str] = []
        self._held = ""
        self._complete = 0  # ids whose text was all final at the last look
        self.stopped = False
        self.tokens: list[int] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def push(self, ids: Iterable[int]) -> str:
        """Take new ids; returns the text that became final with them."""
        if not self._stop:
            new = [int(token) for token in ids]
            self.tokens.extend(new)
            return self._release(self._detokenizer.push(new))
        start = len(self._pieces)
        for token in ids:  # one at a time, to know which one completes a stop string
            if self.stopped:
                break
            self.tokens.append(int(token))
            mark = self._marks.get(int(token), "")
            ends = mark in self._stop
            piece = self._detokenizer.finish() if ends else self._detokenizer.push([int(token)])
            self._filter(piece + mark)
        return "".join(self._pieces[start:])

    def finish(self) -> str:
        """The rest of the text; the sequence has ended."""
        if self.stopped:
            return ""
        start = len(self._pieces)
        self._filter(self._detokenizer.finish())
        if not self.stopped:
            self._release(self._held)
            self._held = ""
        return "".join(self._pieces[start:])

    def _release(self, text: str) -> str:
        text = _without_marks(text)
        if text:
            self._pieces.append(text)
        return text

    def _filter(self, piece: str) -> None:
        """Release what cannot be a part of a stop string any more."""
        if not piece:
            return
        text = self._held + piece
        hits = [(i + len(s), i) for s in self._stop if (i := text.find(s)) >= 0]
        if hits:
            end, start = min(hits)
            self._release(text[:start])
            self.stopped = True
            if text[end - 1] not in self._marks.values():
                self._drop_tokens_after(self.text + _without_marks(text[start:end]))
            return
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._release(text[: len(text) - keep])
        self._held = text[len(text) - keep :]
        self._complete = len(self.tokens)

    def _drop_tokens_after(self, text: str) -> None:
        """Keep the fewest tokens that decode to `text` (bytes may have waited for later ones)."""
        for count in range(self._complete + 1, len(self.tokens)):
            stream = Detokenizer(self._tokenizer, self._prompt)
            if (stream.push(self.tokens[:count]) + stream.finish()).startswith(text):
                del self.tokens[count:]
                return


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids: special tokens left out, nothing tidied up. No tokenizer: none."""
    if tokenizer is None:
        return ""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _common(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _byte_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens <0x00> to <0xFF> of a vocabulary with byte fallback."""
    if tokenizer is None:
        return frozenset()
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = zip(names, tokenizer.convert_tokens_to_ids(names), strict=True)
    return frozenset(
        i for name, i in ids if i is not None and tokenizer.convert_ids_to_tokens(i) == name
    )


def special_ids(tokenizer: Any) -> dict[int, str]:
    """Tokens that decoding leaves out, by id: their texts."""
    if tokenizer is None:
        return {}
    added = tokenizer.added_tokens_decoder.items()
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {**dict(named), **{i: str(token) for i, token in added if token.special}}


def _mark_special(tokenizer: Any, stop: Sequence[str]) -> tuple[dict[int, str], tuple[str, ...]]:
    """A character for each special token that a stop string names, and the stop strings with these
    in place of the names. The characters are lone surrogates, which no decoded text has."""
    names = {i: text for i, text in special_ids(tokenizer).items() if any(text in s for s in stop)}
    marks: dict[int, str] = {}
    for i, text in sorted(names.items(), key=lambda item: -len(item[1])):
        marks[i] = chr(_FIRST_MARK + len(marks))
        stop = [s.replace(text, marks[i]) for s in stop]
    return marks, tuple(stop)


def _without_marks(text: str) -> str:
    return "".join(c for c in text if not _FIRST_MARK <= ord(c) < _FIRST_MARK + 0x800)
