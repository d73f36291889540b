"""Logits against transformers (torch, float32): every family, every RoPE type, a real model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import quantspec_jax as qs
from quantspec_jax.models.config import FAMILIES

TOLERANCE = 1e-4
CONTEXT = 64  # tokens of pre-training of the tiny models; the prompts are longer
LENGTH = 150

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    # Large enough that attention is far from uniform: a wrong angle moves logits by whole units.
    "initializer_range": 0.25,
}


def make_model(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """Random weights; norms and biases are random as well."""
    config_class, model_class = CLASSES[family]
    window = {"sliding_window": None} if family == "mistral" else {}
    torch.manual_seed(0)
    model = model_class(config_class(**{**SHAPE, **window, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def torch_logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def random_tokens(shape: tuple[int, int] = (2, LENGTH), vocab_size: int = 128) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, shape)


def assert_parity(model: transformers.PreTrainedModel, directory: Path) -> np.ndarray:
    """Saved and loaded here, the model gives the same logits, which are returned."""
    tokens = random_tokens()
    expected = torch_logits(model, tokens)
    model.save_pretrained(directory)
    actual = np.asarray(qs.load(str(directory), dtype="float32").logits(tokens))
    assert actual.dtype == np.float32
    assert np.abs(expected).max() > 1
    assert np.abs(actual - expected).max() <= TOLERANCE
    return actual


# Families: biases, tied embeddings, head dimensions, grouped queries.

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "other head_dim": {"head_dim": 48},
}
CASES = [
    *((family, name, changes) for family in FAMILIES for name, changes in VARIANTS.items()),
    ("llama", "attention bias", {"attention_bias": True}),
    ("llama", "mlp bias", {"mlp_bias": True}),
    ("llama", "all biases", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", "attention bias", {"attention_bias": True}),
    ("llama", "large epsilon", {"rms_norm_eps": 0.1}),
]
CASES = [case for case in CASES if case[:2] != ("qwen2", "other head_dim")]  # it has no such key


@pytest.mark.parametrize(
    ("family", "changes"), [(f, c) for f, _, c in CASES], ids=[f"{f}-{n}" for f, n, _ in CASES]
)
def test_families(family, changes, tmp_path):
    defaults = {"tie_word_embeddings": False, "head_dim": 16}
    if family == "qwen2":
        del defaults["head_dim"]
    assert_parity(make_model(family, **{**defaults, **changes}), tmp_path)


# RoPE: prompts longer than the context of pre-training, where scaling matters.

ORIGINAL = {"original_max_position_embeddings": CONTEXT}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "llama3": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": CONTEXT // 2},
}
YARNS: dict[str, dict[str, Any]] = {
    "attention_factor": {"attention_factor": 1.5},
    "mscale": {"mscale": 1.2, "mscale_all_dim": 0.5},
    "mscale alone": {"mscale": 1.2},
    "not truncated": {"truncate": False, "beta_fast": 8.0, "beta_slow": 0.5},
    "betas": {"beta_fast": 16, "beta_slow": 2},
    "no factor": {"factor": None, "original_max_position_embeddings": CONTEXT // 4},
}


def with_rope(family: str, rope: Mapping[str, Any]) -> transformers.PreTrainedModel:
    return make_model(family, rope_parameters={"rope_theta": 1e4, **rope})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rope_types(family, rope, tmp_path):
    actual = assert_parity(with_rope(family, rope), tmp_path)
    plain = torch_logits(with_rope(family, {"rope_type": "default"}), random_tokens())
    assert np.abs(actual - plain).max() > 0.1


@pytest.mark.parametrize("name", YARNS)
def test_yarn_variants(name, tmp_path):
    actual = assert_parity(with_rope("llama", ROPES["yarn"] | YARNS[name]), tmp_path)
    plain = torch_logits(with_rope("llama", ROPES["yarn"]), random_tokens())
    changed = np.abs(actual - plain).max() > 0.1
    assert changed == (name != "mscale alone")  # it counts only beside mscale_all_dim


def test_dynamic_ntk_depends_on_the_length_beyond_the_context(tmp_path):
    """One factor for all positions of a pass, as in one forward pass of transformers; none while
    the sequence fits."""
    with_rope("llama", ROPES["dynamic"]).save_pretrained(tmp_path)
    ours = qs.load(str(tmp_path), dtype="float32")
    tokens = random_tokens()
    for length in (CONTEXT // 2, CONTEXT, CONTEXT + 1, LENGTH):
        theirs = with_rope("llama", ROPES["dynamic"])  # afresh: it keeps its longest factor
        expected = torch_logits(theirs, tokens[:, :length])
        actual = np.asarray(ours.logits(tokens[:, :length]))
        assert np.abs(actual - expected).max() <= TOLERANCE
        plain = torch_logits(with_rope("llama", {"rope_type": "default"}), tokens[:, :length])
        assert (np.abs(actual - plain).max() > TOLERANCE) == (length > CONTEXT)


# Types and the real model.


def test_bfloat16_is_as_near_to_float32_as_in_transformers(tmp_path):
    """Both in bfloat16 against both in float32, in relative norm."""
    model, tokens = make_model("qwen3"), random_tokens()
    model.save_pretrained(tmp_path)
    full, ours = (
        np.asarray(qs.load(str(tmp_path), dtype=dtype).logits(tokens))
        for dtype in ("float32", "bfloat16")
    )
    assert ours.dtype == np.float32
    with torch.no_grad():
        theirs = model.bfloat16()(torch.from_numpy(tokens)).logits.float().numpy()

    def error(logits: np.ndarray) -> float:
        return float(np.linalg.norm(logits - full) / np.linalg.norm(full))

    assert 0 < error(ours) <= error(theirs)


def read_gguf_with_transformers(path: Path) -> transformers.PreTrainedModel:
    """What from_pretrained(gguf_file=...) does, without the package that it asks for. It parses the
    file twice, and makes a table of names for each name: here once each."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        return _read_gguf(path, load_gguf_checkpoint)


def _read_gguf(path: Path, load_gguf_checkpoint: Callable) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    result = model.load_state_dict(tensors, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["lm_head.weight"], [])  # tied
    return model


def test_smollm2(smollm2_gguf):
    """The same GGUF, read by transformers and here; text with a long-range structure."""
    theirs = read_gguf_with_transformers(smollm2_gguf)
    ours = qs.load(str(smollm2_gguf), dtype="float32")
    text = "The cache is stored once. A draft reads the upper plane, the target reads both. " * 13
    tokens = np.asarray([ours.tokenizer(text)["input_ids"]])
    assert 200 <= tokens.size <= 300
    expected = torch_logits(theirs, tokens)
    actual = np.asarray(ours.logits(tokens))
    assert np.abs(actual - expected).max() <= 1e-3
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))
