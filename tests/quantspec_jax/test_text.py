"""Detokenizing, stop strings, chat templates and prompts."""

from __future__ import annotations

import copy
import functools
import io
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from quantspec_jax.text.chat import chat_ids, chat_text
from quantspec_jax.text.detokenize import Detokenizer, TextStream, decode
from quantspec_jax.text.prompts import read_prompts, read_text

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
    def test_any_ids_in_any_split_give_the_text_of_all(self, any_tokenizer, data, cuts):
        """Ids at random: broken characters, special tokens in between, leading spaces."""
        last = len(any_tokenizer) + 3  # models have ids that their tokenizers do not know
        ids = data.draw(st.lists(st.integers(0, last), max_size=60))
        stream = Detokenizer(any_tokenizer)
        pieces = [stream.push(piece) for piece in splits(ids, cuts)]
        assert "".join(pieces) + stream.finish() == decode(any_tokenizer, ids)

    @settings(max_examples=200, deadline=None)
    @given(text=st.text(max_size=80), cuts=lengths)
    def test_text_comes_back_in_whole_characters(self, any_tokenizer, text, cuts):
        ids = any_tokenizer(text)["input_ids"]
        stream = Detokenizer(any_tokenizer)
        pieces = [stream.push(piece) for piece in splits(ids, cuts)] + [stream.finish()]
        assert "".join(pieces) == decode(any_tokenizer, ids)
        if "�" not in decode(any_tokenizer, ids):
            assert not any("�" in piece for piece in pieces)

    @settings(max_examples=300, deadline=None)
    @given(data=st.data(), cuts=lengths)
    def test_a_completion_is_the_text_of_all_less_that_of_the_prompt(
        self, any_tokenizer, data, cuts
    ):
        """Prompts at random; where one ends within a character, the first ids may complete it."""
        ids = st.lists(st.integers(0, len(any_tokenizer) + 3), max_size=40)
        prompt, new = data.draw(ids), data.draw(ids)
        stream = Detokenizer(any_tokenizer, prompt)
        text = "".join(stream.push(piece) for piece in splits(new, cuts)) + stream.finish()
        before, after = decode(any_tokenizer, prompt), decode(any_tokenizer, prompt + new)
        kept = next(n for n in range(len(before), -1, -1) if after.startswith(before[:n]))
        assert text == after[kept:]

    def test_a_completion_keeps_its_space(self, byte_fallback_tokenizer):
        the = byte_fallback_tokenizer("the")["input_ids"]
        (special,) = byte_fallback_tokenizer("</s>")["input_ids"]
        for before in (the, [*the, special], the * 30 + [special] * 60):
            stream = Detokenizer(byte_fallback_tokenizer, before)
            assert [stream.push(the), stream.push(the)] == [" the", " the"]
        stream = Detokenizer(byte_fallback_tokenizer, [special])  # behind no text there is none
        assert stream.push([*the, *the]) == "the the"

    def test_a_long_prompt_costs_no_more_than_its_end(self, any_tokenizer):
        prompt = any_tokenizer("the cat 😀 ")["input_ids"] * 500
        decoded = 0

        class Counting(Detokenizer):
            def _decode(self, start, end):
                nonlocal decoded
                decoded += end - start
                return super()._decode(start, end)

        Counting(any_tokenizer, prompt)
        assert decoded < 200

    def test_text_is_not_held_back_without_need(self, byte_level_tokenizer):
        ids = byte_level_tokenizer("plain words, one by one")["input_ids"]
        stream = Detokenizer(byte_level_tokenizer)
        for count, token in enumerate(ids, start=1):
            stream.push([token])
            assert stream._boundary == count

    @pytest.mark.parametrize(("text", "times"), [("words and 😀 ", 8), ("😀", 50), ("�", 50)])
    def test_work_grows_linearly(self, any_tokenizer, text, times):
        """Each id is decoded a few times, even where no character ever ends."""
        ids = any_tokenizer(text)["input_ids"]
        ids = (ids[:-1] or ids) * 2000  # the last character stays incomplete
        decoded = 0

        class Counting(Detokenizer):
            def _decode(self, start, end):
                nonlocal decoded
                decoded += end - start
                return super()._decode(start, end)

        stream = Counting(any_tokenizer)
        text = "".join(stream.push(ids[i : i + 5]) for i in range(0, len(ids), 5))
        assert text + stream.finish() == decode(any_tokenizer, ids)
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
        self, any_tokenizer, text, stop, cuts
    ):
        ids = any_tokenizer(text)["input_ids"]
        full = decode(any_tokenizer, ids)
        expected = reference_stop(full, stop)

        stream = TextStream(any_tokenizer, stop)
        pieces = [stream.push(piece) for piece in splits(ids, cuts)] + [stream.finish()]

        assert "".join(pieces) == stream.text == expected
        assert stream.stopped == any(s in full for s in stop)
        assert stream.tokens == ids[: len(stream.tokens)]
        if not stream.stopped:
            assert stream.tokens == ids
        else:  # with the last token kept the stop string is complete, and without it it is not
            kept = decode(any_tokenizer, stream.tokens)
            assert any(kept.startswith(expected + s) for s in stop)
            before = decode(any_tokenizer, stream.tokens[:-1])
            assert not any(before.startswith(expected + s) for s in stop)

    def test_a_special_token_stops_where_it_comes(self, any_tokenizer):
        """Though it is no text; what was held back and the rest of a character come before it."""
        for text in {any_tokenizer.eos_token, any_tokenizer.bos_token}:
            special = any_tokenizer.convert_tokens_to_ids(text)
            ids = any_tokenizer("the é")["input_ids"][:-1]
            for stop in (text, [text, "zzz"], ["the éa", text]):
                stream = TextStream(any_tokenizer, stop)
                pieces = [stream.push([token]) for token in [*ids, special, *ids]]
                assert stream.stopped
                assert stream.tokens[-1] == special
                at = len(stream.tokens) - 1
                assert stream.tokens == [*ids, special, *ids][: at + 1]
                assert "".join(pieces) == stream.text == decode(any_tokenizer, ids[:at])
                assert special not in ids[:at]
                assert stream.finish() == ""

    def test_a_stop_string_may_hold_special_tokens_and_text(self, byte_level_tokenizer):
        encode = lambda text: byte_level_tokenizer(text)["input_ids"]  # noqa: E731
        stop = "the</s><|user|>cat"
        whole = encode(f"one {stop} more")
        stream = TextStream(byte_level_tokenizer, [stop, "zebra"])
        stream.push(whole)
        assert stream.stopped
        assert stream.text == "one "
        assert stream.tokens == encode(f"one {stop}")
        for near in ("the</s>cat", "the<|user|></s>cat", "thecat", "the</s><|user|>car"):
            stream = TextStream(byte_level_tokenizer, [stop])
            stream.push(encode(f"one {near} more"))
            stream.finish()
            assert not stream.stopped
            assert stream.text == decode(byte_level_tokenizer, encode(f"one {near} more"))

    def test_a_stop_string_may_begin_with_the_first_space(self, byte_fallback_tokenizer):
        the = byte_fallback_tokenizer("the")["input_ids"]
        stream = TextStream(byte_fallback_tokenizer, [" the"], the)
        stream.push([*the, *the])
        assert (stream.stopped, stream.text, stream.tokens) == (True, "", the)

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


class TestPrompts:
    def test_all_forms_of_the_same_prompts_give_the_same_ids(self, byte_level_tokenizer):
        texts = ["the cat", "中文 😀"]
        ids = [byte_level_tokenizer(text)["input_ids"] for text in texts]
        read = functools.partial(read_prompts, tokenizer=byte_level_tokenizer, vocab_size=320)
        assert read(texts) == read(ids) == read(tuple(map(tuple, ids))) == ids
        assert read([np.array(ids[0]), ids[1]]) == ids
        assert read(texts[0]) == read(ids[0]) == read(np.array(ids[0])) == [ids[0]]
        assert read(jnp.array([ids[0], ids[0]])) == [ids[0]] * 2
        assert read([np.int32(token) for token in ids[0]]) == [ids[0]]

    def test_special_tokens_are_the_tokenizers_own(self, byte_level_tokenizer):
        tokenizer = copy.deepcopy(byte_level_tokenizer)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        (ids,) = read_prompts("the", tokenizer, 320)
        assert ids == [0, *byte_level_tokenizer("the")["input_ids"]]
        with pytest.raises(ValueError, match="prompt is ''"):  # though it would have one token
            read_prompts("", tokenizer, 320)

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ("", "prompt is ''"),
            ([], r"prompts is \[\]"),
            ([[]], r"prompt is \[\]"),
            (["a", ""], "prompt 1 is ''"),
            ([[1], []], "prompt 1 is"),
            (None, "None"),
            (7, "7"),
            (b"bytes", "bytes"),
            ({"a": 1}, "dict"),
            ([True], "True .bool.; allowed: integers"),
            ([1, 2.0], "2.0 .float.; allowed: integers"),
            (np.array([1.0]), "1.0 .float."),
            ([[1, "a"]], "'a'"),
            ([1, "a"], "prompt 0 is 1"),
            ([320], "320 .int.; allowed: 0 to 319"),
            ([[1], [-1]], "prompt 1 is -1"),
            (np.array([[[1]]]), "integers"),
            ("\udcff", "not UTF-8"),
        ],
    )
    def test_what_is_wrong_is_named(self, byte_level_tokenizer, prompts, message):
        with pytest.raises(ValueError, match=message):
            read_prompts(prompts, byte_level_tokenizer, 320)

    def test_a_model_without_a_tokenizer_takes_ids(self):
        assert read_prompts([1, 2], None, 3) == [[1, 2]]
        with pytest.raises(ValueError, match="no tokenizer"):
            read_prompts("text", None, 3)
        stream = TextStream(None)
        assert stream.push([1, 2]) == stream.finish() == ""
        assert stream.tokens == [1, 2]

    def test_file_that_is_not_utf8(self, tmp_path, monkeypatch):
        path = tmp_path / "latin1.txt"
        path.write_bytes("größer".encode("latin-1"))
        with pytest.raises(ValueError, match=r"latin1.txt: not UTF-8 \(byte 0xF6 at offset 2\)"):
            read_text(str(path))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
        with pytest.raises(ValueError, match="standard input: not UTF-8"):
            read_text("-")

    def test_files_are_read_as_they_are(self, tmp_path, monkeypatch):
        path = tmp_path / "prompt.txt"
        path.write_bytes(MULTILINGUAL.encode() + b"\r\n")
        assert read_text(str(path)) == MULTILINGUAL + "\r\n"
        path.write_bytes(b"\xef\xbb\xbfwith a byte order mark")
        assert read_text(str(path)) == "with a byte order mark"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MULTILINGUAL.encode())))
        assert read_text("-") == MULTILINGUAL


class TestChat:
    def test_template_writes_the_special_tokens(self, byte_level_tokenizer):
        text = chat_text("Hi", byte_level_tokenizer, "Be brief.")
        assert text == "<|system|>Be brief.</s><|user|>Hi</s><|assistant|>"
        ids = chat_ids("Hi", byte_level_tokenizer, "Be brief.")
        assert byte_level_tokenizer.decode(ids) == text
        assert "system" not in chat_text("Hi", byte_level_tokenizer)

    def test_no_template(self, byte_level_tokenizer):
        tokenizer = copy.deepcopy(byte_level_tokenizer)
        tokenizer.chat_template = None
        for without in (tokenizer, None):
            with pytest.raises(ValueError, match="no chat template"):
                chat_ids("Hi", without)

    def test_template_that_takes_no_system_message(self, byte_level_tokenizer):
        tokenizer = copy.deepcopy(byte_level_tokenizer)
        tokenizer.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('user first') }}{% endif %}"
            "{{ messages[0].content }}"
        )
        assert chat_text("Hi", tokenizer) == "Hi"
        with pytest.raises(ValueError, match="roles system, user: user first"):
            chat_ids("Hi", tokenizer, "Be brief.")

    @pytest.mark.parametrize(
        ("template", "words"),
        [
            ("{{ 'a' + 1 }}", "fails with TypeError: "),
            ("{{ 1 // 0 }}", "fails with ZeroDivisionError: "),
            ("{{ messages[0]['content'].x.y }}", "refuses messages of the roles user"),
            ("{% for %}", "refuses messages of the roles user"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails with RecursionError: "),
            ("{{ range(10 ** 9) | list }}", "fails with OverflowError: "),
            ("{{ raise_exception('one\ntwo') }}", "roles user: one$"),
            ("{{ raise_exception('') }}", "roles user: no message"),
            ("{% if false %}x{% endif %}", "renders nothing"),
        ],
    )
    def test_a_template_that_fails_is_named_with_its_error(
        self, template, words, byte_level_tokenizer
    ):
        tokenizer = copy.deepcopy(byte_level_tokenizer)
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"the chat template .*{words}") as caught:
            chat_ids("Hi", tokenizer)
        assert "\n" not in str(caught.value)

    def test_empty_prompt(self, byte_level_tokenizer):
        with pytest.raises(ValueError, match="prompt is ''"):
            chat_ids("", byte_level_tokenizer)
