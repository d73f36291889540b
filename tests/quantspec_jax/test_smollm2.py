"""The whole path on a real model, SmolLM2-135M-Instruct: a short part of benchmarks/identity.py."""

from __future__ import annotations

import functools
import os

import jax
import pytest
from tiny import OPTIMIZED

import quantspec_jax as qs
from quantspec_jax.demo import prompt_text

NEW = 80  # at least one flush after the prompt's own


@pytest.fixture(autouse=True)
def _compute_quickly(monkeypatch):
    """Thirty layers and two texts compute for longer than what the other tests save."""
    options = dict(OPTIMIZED)
    if "--xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]:
        options["xla_cpu_use_fusion_emitters"] = True
    compile_with = functools.partialmethod(jax.stages.Lowered.compile, options)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_with)


@pytest.fixture(scope="module")
def model(smollm2_gguf):
    return qs.load(str(smollm2_gguf), dtype="float32")


@pytest.fixture(scope="module")
def prompt(model):
    ids = model.tokenizer(prompt_text())["input_ids"]
    assert len(ids) >= 600
    return ids[:600]  # its planes have codes of hundreds of tokens


def test_greedy_tokens_are_those_of_the_int8_target(model, prompt):
    prompts = [prompt, prompt[:440]]
    common = {"max_new_tokens": NEW, "ignore_eos": True, "max_length": 768}
    ours = qs.generate(model, prompts, qs.GenerateConfig(gamma=4, **common))
    target = qs.GenerateConfig(mode="autoregressive", kv="int8", pass_width=5, **common)
    theirs = qs.generate(model, prompts, target)
    assert ours.tokens == theirs.tokens
    assert ours.text == theirs.text
    for stats in ours.stats:
        assert 0.5 < stats["acceptance_rate"] < 1, "a 4-bit draft is good, not perfect"
        assert stats["tokens_per_round"] > 2
