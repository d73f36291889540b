"""A RoPE scaling given at load: as transformers computes it, stored by convert, and refused by name
where it fits no model."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch

import convert
import quantspec_jax as qs
from convert.hf_config import parse_hf_config
from quantspec_jax.models.config import RopeConfig
from quantspec_jax.weights.entries import quantize_params
from quantspec_jax.weights.formats import DraftConfig

CONTEXT = 64  # of the tiny models, which read 200 tokens here
PLAIN = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "rope_theta": 5e5,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip


def scaled_by_transformers(model, scaling: dict):
    """The same weights under a config with this scaling."""
    config = type(model.config)(
        **{
            **model.config.to_dict(),
            "rope_parameters": {**model.config.rope_parameters, **scaling},
            "max_position_embeddings": 4 * CONTEXT,
        }
    )
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request, tools):
    return tools.make_model(request.param, max_position_embeddings=CONTEXT)


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}),
        ("linear", {"rope_type": "linear", "factor": 4.0}),
    ],
)
def test_logits_are_those_of_a_model_whose_config_has_the_scaling(
    kind, scaling, model, tools, tmp_path
):
    """From every form of the checkpoint, and bit for bit from where convert stored it."""
    rope = qs.RopeScaling(kind, 4.0)
    directory = tools.write_hf(model, tmp_path / "hf")
    gguf = tools.write_gguf(model, tmp_path / "model.gguf")
    plain = convert.convert(directory, tmp_path / "plain", progress=False)
    stored = convert.convert(directory, tmp_path / "stored", rope=rope, progress=False)
    tokens = np.random.default_rng(0).integers(0, 320, (2, 200))
    with torch.no_grad():
        expected, unscaled = (
            m(torch.from_numpy(tokens)).logits.numpy()
            for m in (scaled_by_transformers(model, scaling), model)
        )
    assert np.abs(expected - unscaled).max() > 5e-3
    given = [qs.load(str(s), dtype="float32", rope=rope) for s in (directory, gguf, plain)]
    loaded = [*given, qs.load(str(stored), dtype="float32")]
    logits = [np.asarray(m.logits(tokens)) for m in loaded]
    np.testing.assert_allclose(logits[0], expected, atol=2e-5, rtol=0)
    for other, config in zip(logits, (m.config for m in loaded), strict=True):
        np.testing.assert_array_equal(other, logits[0])
        assert config.rope == loaded[0].config.rope
        assert config.max_context == 4 * CONTEXT
    written = scaled_by_transformers(model, scaling)
    read = qs.load(str(tools.write_hf(written, tmp_path / "written")), dtype="float32")
    assert read.config.rope == loaded[0].config.rope


def test_generation_goes_beyond_the_models_own_context(model, tools, tmp_path):
    directory = tools.write_hf(model, tmp_path)
    config = qs.GenerateConfig(max_new_tokens=4, gamma=1, group_size=16, ignore_eos=True)
    prompt = list(range(2, 102))
    with pytest.raises(ValueError, match=f"at most {CONTEXT}, the model's context"):
        qs.generate(qs.load(str(directory), dtype="float32"), prompt, config)
    stretched = qs.load(str(directory), dtype="float32", rope=qs.RopeScaling("yarn", 4.0))
    assert len(qs.generate(stretched, prompt, config).tokens[0]) == 4


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, YARN, LLAMA3,
                                     {"rope_type": "dynamic", "factor": 2.0}])  # fmt: skip
def test_none_takes_a_scaling_away(scaling):
    scaled = parse_hf_config(PLAIN | {"rope_scaling": scaling})
    bare = scaled.scaled(qs.RopeScaling("none"))
    original = scaling.get("original_max_position_embeddings", 4096)
    assert bare == parse_hf_config(PLAIN | {"max_position_embeddings": original})
    assert bare.scaled(qs.RopeScaling("none")) == bare
    again = bare.scaled(qs.RopeScaling("yarn", 2.0))
    assert again.rope == RopeConfig("yarn", 5e5, 2.0, original)
    assert again.max_context == 2 * original


def test_a_scaling_replaces_one_of_its_own_type_and_no_other():
    """All of it: what else the checkpoint says of its own goes with it."""
    yarn = parse_hf_config(
        PLAIN | {"rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 16}}
    )
    other = yarn.scaled(qs.RopeScaling("yarn", 8))
    assert other.rope == RopeConfig("yarn", 5e5, 8.0, 1024)
    assert other.max_context == 8192
    linear = parse_hf_config(PLAIN | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    other = linear.scaled(qs.RopeScaling("linear", 2.0))
    assert (other.rope, other.max_context) == (RopeConfig("linear", 5e5, 2.0), 8192)
    cases = [(yarn, "linear", "yarn 4"), (linear, "yarn", "linear 4")]
    for scaling in (LLAMA3, {"rope_type": "dynamic", "factor": 8.0}):
        config = parse_hf_config(PLAIN | {"rope_scaling": scaling})
        cases += [(config, kind, f"{scaling['rope_type']} 8") for kind in ("linear", "yarn")]
    for config, kind, own in cases:
        with pytest.raises(ValueError, match=f"rope scaling is '{kind} 2'; allowed: none.*{own}"):
            config.scaled(qs.RopeScaling(kind, 2.0))


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("yarn", 1), ("yarn", 0.5), ("yarn", 0), ("linear", -2.0), ("linear", float("nan")),
        ("yarn", float("inf")), ("yarn", "4"), ("yarn", True), ("yarn", None), ("none", 4.0),
        ("linear", 1.0),
    ],
)  # fmt: skip
def test_wrong_factors_are_refused(kind, factor):
    with pytest.raises(ValueError, match="rope scaling factor is"):
        qs.RopeScaling(kind, factor)


@pytest.mark.parametrize("kind", ["llama3", "dynamic", "ntk", "", None, 3])
def test_wrong_types_are_refused(kind):
    with pytest.raises(ValueError, match=r"rope scaling type is .*; allowed: none, linear, yarn"):
        qs.RopeScaling(kind, 2.0)


def test_a_context_that_a_window_or_the_positions_cut_is_refused(tools, tmp_path):
    config = parse_hf_config(PLAIN | {"model_type": "mistral", "sliding_window": 8192})
    assert config.scaled(qs.RopeScaling("yarn", 2.0)).max_context == 8192
    with pytest.raises(ValueError, match=r"rope scaling is 'yarn 4'; allowed: at most 8192 tokens"):
        config.scaled(qs.RopeScaling("yarn", 4.0))
    with pytest.raises(ValueError, match="at most 2147483647 tokens"):
        parse_hf_config(PLAIN).scaled(qs.RopeScaling("linear", 1e9))
    model = tools.make_model("qwen3", max_position_embeddings=CONTEXT)
    path = tools.write_gguf(
        model, tmp_path / "model.gguf", changes={"attention.sliding_window": CONTEXT}
    )
    out = convert.convert(path, tmp_path / "out", progress=False)
    for source in (path, out):
        with pytest.raises(ValueError, match=f"at most {CONTEXT} tokens"):
            convert.open_source(source, qs.RopeScaling("yarn", 2.0))


def test_a_stored_draft_is_the_same_under_any_scaling(llama_dir, tmp_path):
    out = convert.convert(llama_dir, tmp_path / "out", draft=DraftConfig(), progress=False)
    model = qs.load(str(out), dtype="float32", rope=qs.RopeScaling("yarn", 2.0))
    assert model.draft == DraftConfig()
    expected = quantize_params(model.params, DraftConfig())
    for ours, theirs in zip(
        jax.tree.leaves(convert.open_source(out, qs.RopeScaling("linear", 2.0)).load_draft()[1]),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    config = qs.GenerateConfig(max_new_tokens=4, gamma=1, ignore_eos=True)
    assert len(qs.generate(model, [2, 3, 4], config).tokens[0]) == 4


def test_a_draft_is_calibrated_with_the_scaling(tiny_llama_dir, tmp_path, monkeypatch):
    seen = []

    def calibrate(config, params, tokens, draft, **_):
        seen.append(config.rope)
        return draft, quantize_params(params, draft)

    monkeypatch.setattr("quantspec_jax.weights.calibrate.calibrate_in_turn", calibrate)
    out = convert.convert(
        tiny_llama_dir,
        tmp_path / "out",
        draft=DraftConfig(method="gptq", group_size=32),
        rope=qs.RopeScaling("yarn", 2.0),
        progress=False,
    )
    assert seen == [RopeConfig("yarn", 10000.0, 2.0, 2048)]
    assert convert.open_source(out).config.rope == seen[0]


def test_a_checkpoint_of_an_older_version_opens(llama_dir, tmp_path):
    """Whose header names a BOS id and no window."""
    out = convert.convert(llama_dir, tmp_path / "out", progress=False)
    header = json.loads((out / "config.json").read_text())
    header["model"]["bos_id"] = 0
    del header["model"]["sliding_window"]
    (out / "config.json").write_text(json.dumps(header))
    assert convert.open_source(out).config == convert.open_source(llama_dir).config
    header["model"]["bos"] = 0
    (out / "config.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"model config keys is .*'bos'"):
        convert.open_source(out)
