"""Detokenizing, stop strings, chat templates and prompts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantspec_jax.text.detokenize import Detokenizer, TextStream, decode

MULTILINGUAL = "Größer als 中文, 日本語 🏳️‍🌈 é́ — ｆｕｌｌ, the cat. 😀😀 <0x41> � \n\n  fin"


def splits(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """`ids` in pieces; `cuts` are their lengths, used in turn."""
    pieces, start, turn = [], 0, 0
    while start < len(ids):
        size = cuts[turn % len(cuts)]
        pieces.append(ids[start : start + size])
        start, turn = start + size, turn + 1
    return pieces


lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)


class TestDetokenizer:
    @settings(max_examples=300, deadline=None)
    @given(data=st.data(), cuts=lengths)
    def test_any_ids_in_any_split_give_the_text_of_all(self, tiny_tokenizer, data, cuts):
        """Ids at random: broken characters, special tokens in between, leading spaces."""
        last = len(tiny_tokenizer) + 3  # models have ids that their tokenizers do not know
        ids = data.draw(st.lists(st.integers(0, last), max_size=60))
        stream = Detokenizer(tiny_tokenizer)
        pieces = [stream.push(piece) for piece in splits(ids, cuts)]
        assert "".join(pieces) + stream.finish() == decode(tiny_tokenizer, ids)

    @settings(max_examples=200, deadline=None)
    @given(text=st.text(max_size=80), cuts=lengths)
    def test_text_comes_back_in_whole_characters(self, tiny_tokenizer, text, cuts):
        ids = tiny_tokenizer(text)["input_ids"]
        stream = Detokenizer(tiny_tokenizer)
        pieces = [stream.push(piece) for piece in splits(ids, cuts)] + [stream.finish()]
        assert "".join(pieces) == decode(tiny_tokenizer, ids)
        if "�" not in decode(tiny_tokenizer, ids):
            assert not any("�" in piece for piece in pieces)

    def test_text_is_not_held_back_without_need(self, byte_level_tokenizer):
        ids = byte_level_tokenizer("plain words, one by one")["input_ids"]
        stream = Detokenizer(byte_level_tokenizer)
        for count, token in enumerate(ids, start=1):
            stream.push([token])
            assert stream._boundary == count

    @pytest.mark.parametrize(("text", "times"), [("words and 😀 ", 8), ("😀", 50), ("�", 50)])
    def test_work_grows_linearly(self, tiny_tokenizer, text, times):
        """Each id is decoded a few times, even where no character ever ends."""
        ids = tiny_tokenizer(text)["input_ids"][:-1] * 2000
        decoded = 0

        class Counting(Detokenizer):
            def _decode(self, start, end):
                nonlocal decoded
                decoded += end - start
                return super()._decode(start, end)

        stream = Counting(tiny_tokenizer)
        text = "".join(stream.push(ids[i : i + 5]) for i in range(0, len(ids), 5))
        assert text + stream.finish() == decode(tiny_tokenizer, ids)
        assert decoded < times * len(ids)


def reference_stop(text: str, stop: list[str]) -> str:
    """The text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        hits = [len(s) for s in stop if text[:end].endswith(s)]
        if hits:
            return text[: end - max(hits)]
    return text


class TestStopStrings:
    @settings(max_examples=400, deadline=None)
    @given(
        text=st.text(alphabet="ab the😀é", max_size=60),
        stop=st.lists(st.text(alphabet="ab the😀é", min_size=1, max_size=5), max_size=4),
        cuts=lengths,
    )
    def test_any_split_stops_at_the_first_complete_stop_string(
        self, tiny_tokenizer, text, stop, cuts
    ):
        ids = tiny_tokenizer(text)["input_ids"]
        full = decode(tiny_tokenizer, ids)
        expected = reference_stop(full, stop)

        stream = TextStream(tiny_tokenizer, stop)
        pieces = [stream.push(piece) for piece in splits(ids, cuts)] + [stream.finish()]

        assert "".join(pieces) == stream.text == expected
        assert stream.stopped == any(s in full for s in stop)
        assert stream.tokens == ids[: len(stream.tokens)]
        if not stream.stopped:
            assert stream.tokens == ids
        else:  # with the last token kept the stop string is complete, and without it it is not
            kept = decode(tiny_tokenizer, stream.tokens)
            assert any(kept.startswith(expected + s) for s in stop)
            before = decode(tiny_tokenizer, stream.tokens[:-1])
            assert not any(before.startswith(expected + s) for s in stop)

    def test_holds_back_only_what_may_become_a_stop_string(self, byte_level_tokenizer):
        stream = TextStream(byte_level_tokenizer, ["###"])
        encode = lambda text: byte_level_tokenizer(text)["input_ids"]  # noqa: E731
        assert stream.push(encode("one #")) == "one "
        assert stream.push(encode("#")) == ""
        assert stream.push(encode(" two")) == "## two"
        assert stream.push(encode("##")) == ""
        assert stream.push(encode("# three")) == ""
        assert stream.stopped
        assert stream.text == "one ## two"
        assert stream.push(encode("more")) == stream.finish() == ""

    def test_a_held_back_start_is_released_at_the_end(self, byte_level_tokenizer):
        stream = TextStream(byte_level_tokenizer, ["END"])
        ids = byte_level_tokenizer("the EN")["input_ids"]
        assert stream.push(ids) == "the "
        assert stream.finish() == "EN"
        assert not stream.stopped
        assert stream.tokens == ids
