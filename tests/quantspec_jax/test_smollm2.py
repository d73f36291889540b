"""The whole path on the first layers of a real model, SmolLM2-135M-Instruct: a short part of
benchmarks/identity.py, which has them all. (To compile takes time by the layer.)"""

from __future__ import annotations

import dataclasses

import pytest

import quantspec_jax as qs
from quantspec_jax.demo import prompt_text

NEW = 36  # at least one flush after the prompt's own
LAYERS = 6


@pytest.fixture(scope="module")
def model(smollm2_gguf):
    whole = qs.load(str(smollm2_gguf), dtype="float32")
    layers = {str(i): whole.params["layers"][str(i)] for i in range(LAYERS)}
    config = dataclasses.replace(whole.config, num_layers=LAYERS)
    return qs.Model(config, whole.params | {"layers": layers}, whole.tokenizer, whole.draft)


@pytest.fixture(scope="module")
def prompt(model):
    ids = model.tokenizer(prompt_text())["input_ids"]
    assert len(ids) >= 620
    return ids[:620]  # its planes have codes of hundreds of tokens


def test_greedy_tokens_are_those_of_the_int8_target(model, prompt):
    prompts = [prompt, prompt[:492]]
    common = {"max_new_tokens": NEW, "ignore_eos": True, "repetition_penalty": 1.15}
    ours = qs.generate(model, prompts, qs.GenerateConfig(gamma=4, **common))
    target = qs.GenerateConfig(mode="autoregressive", kv="int8", pass_width=5, **common)
    theirs = qs.generate(model, prompts, target)
    assert ours.tokens == theirs.tokens
    assert ours.text == theirs.text
    for stats in ours.stats:
        assert 0.5 < stats["acceptance_rate"] < 1, "a 4-bit draft is good, not perfect"
        assert stats["tokens_per_round"] > 2
