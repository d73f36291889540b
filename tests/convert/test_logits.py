"""The same logits from every form in which a model may come."""

from __future__ import annotations

import numpy as np
import pytest

import convert
import quantspec_jax as qs

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_source_gives_the_same_logits(family, tools, tmp_path):
    """Bit for bit: sharded safetensors, GGUF, and the checkpoints converted from them."""
    model = tools.make_model(family)
    sharded = tools.write_hf(model, tmp_path / "sharded", sharded=True)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    gguf = tools.write_gguf(model, tmp_path / "model.gguf")
    sources = [
        sharded,
        gguf,
        convert.convert(sharded, tmp_path / "one", dtype="float32", progress=False),
        convert.convert(gguf, tmp_path / "two", dtype="float32", progress=False),
    ]
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 40))
    logits = [np.asarray(qs.load(str(s), dtype="float32").logits(tokens)) for s in sources]
    assert np.abs(logits[0]).max() > 0.1
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])
