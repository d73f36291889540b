"""The sampler for tunix: its signature, and weights that are replaced between calls."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import numpy as np
import pytest
from flax import nnx

import quantspec_jax as qs
from quantspec_jax.models.module import init_params
from quantspec_jax.rollout import Sampler, SamplerOutput
from quantspec_jax.weights.entries import quantize_params

# `BaseSampler.__call__` of google-tunix 0.1.7 as it is documented: names and defaults.
DOCUMENTED = {
    "input_strings": inspect.Parameter.empty,
    "max_generation_steps": inspect.Parameter.empty,
    "max_prompt_length": None,
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "beam_size": None,
    "seed": None,
    "multi_sampling": 1,
    "return_logits": True,
    "echo": False,
    "pad_output": False,
}
CONFIG = qs.GenerateConfig(gamma=3, group_size=16, max_length=128, ignore_eos=True)
PROMPTS = ["The cache", "Two planes of four bits"]


@pytest.fixture(scope="module")
def model(byte_level_tokenizer):
    config = qs.ModelConfig("llama", 325, 32, 64, 1, 4, 2, 16, 256, eos_ids=(1,))
    return qs.Model(config, params_of(config, 0), byte_level_tokenizer, qs.DraftConfig(4, 32))


def params_of(config, seed):
    params = init_params(config, jax.random.key(seed))
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)


def positional(function):
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return {p.name: p.default for p in parameters if p.kind in kinds and p.name != "self"}


def test_its_signature_is_the_documented_one():
    assert list(positional(Sampler.__call__).items()) == list(DOCUMENTED.items())
    fields = SamplerOutput.__dataclass_fields__
    documented = ("text", "logits", "tokens", "padded_prompt_tokens", "logprobs")
    assert tuple(fields)[:5] == documented


def test_it_is_a_sampler_of_the_real_package(model):
    base = pytest.importorskip("tunix.generate.base_sampler")
    sampler = Sampler(model, CONFIG)
    assert isinstance(sampler, base.BaseSampler)
    assert SamplerOutput is base.SamplerOutput
    theirs = positional(base.BaseSampler.__call__)
    assert list(positional(Sampler.__call__).items())[: len(theirs)] == list(theirs.items())
    assert isinstance(sampler(PROMPTS, 4), base.SamplerOutput)
    assert isinstance(sampler.transformer, nnx.Module)


def test_it_samples_what_generate_does(model):
    sampler, ids = Sampler(model, CONFIG), model.tokenizer(PROMPTS[0])["input_ids"]
    common = {"temperature": 0.8, "top_p": 0.9}
    config = dataclasses.replace(CONFIG, max_new_tokens=12, logprobs=0, **common)
    same = qs.generate(model, [ids, ids], config, jax.random.key(3))
    common |= {"multi_sampling": 2, "seed": 3, "return_logprobs": True}
    out = sampler(PROMPTS[0], 12, pad_output=True, **common)
    assert out.text == same.text
    assert out.text[0] != out.text[1]
    assert out.tokens.tolist() == same.tokens
    assert out.logprobs == [[score.own for score in each] for each in same.logprobs]
    width = out.padded_prompt_tokens.shape[1]
    assert width == 1 << (len(ids) - 1).bit_length()
    assert out.padded_prompt_tokens.tolist() == 2 * [[sampler.pad_id] * (width - len(ids)) + ids]
    end = same.tokens[0][3]
    ended = sampler(PROMPTS[0], 12, echo=True, eos_tokens=[end], **common)
    first = same.tokens[0][: same.tokens[0].index(end) + 1]
    assert ended.tokens[0].tolist() == ids + first
    assert ended.text[0].startswith(PROMPTS[0])
    with pytest.raises(NotImplementedError, match="beam_size is 2"):
        sampler(PROMPTS, 4, beam_size=2)


def test_weights_are_replaced_between_calls_and_the_draft_with_them(model):
    """One that was calibrated is so for other weights: it is rounded to nearest from now on."""
    calibrated = dataclasses.replace(model.draft, method="gptq", average_bits=5.0)
    entries = quantize_params(model.params, model.draft)
    stored = qs.Model(model.config, model.params, model.tokenizer, calibrated, entries)
    sampler = Sampler(stored, CONFIG)
    before = sampler(PROMPTS, 12, return_logprobs=True)
    old_draft = sampler.model.draft_params
    other = params_of(model.config, 1)
    fresh = qs.Model(model.config, other, model.tokenizer, model.draft)
    config = dataclasses.replace(CONFIG, max_new_tokens=12, logprobs=0)
    wanted = qs.generate(fresh, PROMPTS, config)
    sampler.update_params(other)
    assert sampler(PROMPTS, 12, return_logprobs=True).text == wanted.text != before.text
    for mine, theirs, old in zip(
        *map(jax.tree.leaves, (sampler.model.draft_params, fresh.draft_params, old_draft)),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.ndim < 2 or not np.array_equal(mine, old)
    # As a state of the module, and by a function of the trainer's own tree.
    state = Sampler(model).transformer_state
    sampler.transformer_state = state
    assert sampler(PROMPTS, 12, return_logprobs=True).text == before.text
    theirs = Sampler(model, CONFIG, to_params=lambda tree: {"final_norm": tree["norm"]})
    theirs.update_params({"norm": 2 * model.params["final_norm"]})
    norm = theirs.model.params["final_norm"]
    np.testing.assert_array_equal(norm, 2 * model.params["final_norm"])
    for wrong in ({"norm": norm}, {"final_norm": norm[:3]}):
        with pytest.raises(ValueError, match="norm"):
            sampler.update_params(wrong)
