"""Formats of the draft's weights: what they store, how exact they are, what they take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul.xla import dequantize
from pallas_kernels.layout import QuantizedWeight, TiledWeight, untile
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import unembed
from quantspec_jax.models.linear import linear
from quantspec_jax.models.module import init_params
from quantspec_jax.models.parameters import LINEAR_LAYERS
from quantspec_jax.weights.entries import draft_tree, merge, quantize_params, with_first
from quantspec_jax.weights.formats import DraftConfig, WeightFormat
from quantspec_jax.weights.rounding import quantize_linear
from quantspec_jax.weights.sizes import bits_per_weight, draft_bytes, layer_formats

CONFIGS = (
    DraftConfig(group_size=16),
    DraftConfig(bits=8, group_size=32),
    DraftConfig(bits=8, group_size=32, symmetric=True),
    DraftConfig(group_size=24, layers="layers.0.*,*.down"),
    DraftConfig(group_size=32, formats=(("layers.1.q", WeightFormat(8, 16, True)),)),
    DraftConfig(bits=None, group_size=48, lm_head_bits=4, lm_head_first=9),
)


FORMAT_NOT_TILED = (("layers.1.q", WeightFormat(4, 16)),)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 24])
def test_eight_bits_leave_a_sixteenth_of_the_error(group_size, symmetric):
    kernel = jax.random.normal(jax.random.key(0), (64, 40))
    errors = []
    for bits in (4, 8):
        entry = quantize_linear(kernel, WeightFormat(bits, group_size, symmetric))
        restored = sum(dequantize(weight)[:64] for weight in entry.values())
        errors.append(float(jnp.abs(restored - kernel).mean()))
    assert errors[1] < errors[0] / 14  # a sixteenth, but for the rounding of scale and minimum


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_adds_the_planes(bits):
    keys = jax.random.split(jax.random.key(1))
    kernel, x = jax.random.normal(keys[0], (48, 32)), jax.random.normal(keys[1], (3, 48))
    entry = quantize_linear(kernel, WeightFormat(bits, 16))
    expected = x @ sum(dequantize(weight) for weight in entry.values())
    np.testing.assert_allclose(linear(x, entry, "xla"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("draft", CONFIGS)
def test_draft_bytes_are_those_of_its_arrays(draft):
    config, params, _ = tiny_model()
    own = quantize_params(params, draft)
    assert draft_bytes(config, draft) == sum(x.nbytes for x in jax.tree.leaves(own))


def test_weights_are_tiled_where_the_kernel_runs(monkeypatch):
    """For bf16 activations on a device that has the kernel, and weights that it takes."""
    _, params, _ = tiny_model()
    own = quantize_params(params, DraftConfig(group_size=32, formats=FORMAT_NOT_TILED))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def kinds(params):
        layers = draft_tree(params, own)["layers"].values()
        return {type(block[name]["kernel"]) for block in layers for name in LINEAR_LAYERS}

    assert kinds(narrow) == {QuantizedWeight}
    monkeypatch.setattr(dispatch, "device", object)
    assert kinds(params) == {QuantizedWeight}
    found = draft_tree(narrow, own)["layers"]
    before = own["layers"]["0"]["down"]["kernel"]
    assert isinstance(found["0"]["down"]["kernel"], TiledWeight)
    np.testing.assert_array_equal(untile(found["0"]["down"]["kernel"]).packed, before.packed)
    assert isinstance(found["1"]["q"]["kernel"], QuantizedWeight)


@pytest.mark.parametrize("tied", [False, True])
def test_an_lm_head_of_its_own_makes_the_drafts_logits(tied):
    """Tied or not, logits come from 4-bit weights, and the embedding stays the target's."""
    config = ModelConfig("llama", 320, 64, 96, 1, 4, 2, 16, 512, tie_embeddings=tied)
    params = init_params(config, jax.random.key(0))
    own = quantize_params(params, DraftConfig(bits=None, group_size=32, lm_head_bits=4))
    draft = merge(params, own)
    assert draft["embedding"] is params["embedding"]
    hidden = jax.random.normal(jax.random.key(1), (1, 3, 64))
    expected = hidden @ dequantize(own["lm_head"]["kernel"])
    np.testing.assert_allclose(unembed(draft, hidden, "xla"), expected, rtol=1e-4, atol=1e-5)
    exact = unembed(params, hidden)
    assert 0.02 < float(jnp.linalg.norm(expected - exact) / jnp.linalg.norm(exact)) < 0.15
    for first in (40, 320, 1000):
        config = DraftConfig(bits=None, group_size=32, lm_head_bits=4, lm_head_first=first)
        found = unembed(merge(params, with_first(params, own, config)), hidden, "xla")
        np.testing.assert_allclose(found[..., :first], exact[..., :first], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[..., first:], expected[..., first:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("draft", CONFIGS)
def test_config_survives_json(draft):
    assert DraftConfig.from_dict(draft.to_dict()) == draft


def test_formats_and_patterns_choose_layers():
    config, params, _ = tiny_model()
    formats = (("layers.0.q", WeightFormat(8, 16)), ("layers.0.k", WeightFormat(16)))
    draft = DraftConfig(layers="layers.0.*", formats=formats)
    own = quantize_params(params, draft)
    assert set(own["layers"]) == {"0"}
    assert set(own["layers"]["0"]) == {"q", "v", "o", "gate", "up", "down"}
    assert set(own["layers"]["0"]["q"]) == {"kernel", "residual"}
    tree = merge(params, own)
    assert tree["layers"]["0"]["k"]["kernel"] is params["layers"]["0"]["k"]["kernel"]
    assert tree["layers"]["0"]["q"]["residual"].group_size == 16
    assert layer_formats(config, draft)["layers.0.v"] == WeightFormat()


def test_bits_per_weight_counts_scales_and_what_is_left_alone():
    config, *_ = tiny_model()
    assert bits_per_weight(config, DraftConfig(bits=None)) == 16
    assert bits_per_weight(config, DraftConfig(group_size=16)) == 4 + 32 / 16
    assert bits_per_weight(config, DraftConfig(group_size=16, symmetric=True)) == 4 + 16 / 16
    assert bits_per_weight(config, DraftConfig(bits=8, group_size=16)) == 8 + 48 / 16
    mixed = bits_per_weight(config, DraftConfig(group_size=16, layers="*.down"))
    assert 6 < mixed < 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, "draft bits is 3"),
        ({"layers": "all,"}, "draft layers"),
        ({"method": "awq"}, "draft method"),
        ({"average_bits": 5.0}, "gptq"),
        ({"average_bits": 4, "method": "gptq"}, "average_bits is 4"),
        (
            {"lm_head_bits": 4, "lm_head_first": -1},
            "draft lm_head_first is -1; allowed: an integer",
        ),
        ({"lm_head_first": 8}, "draft lm_head_first is 8; allowed: 0 with lm_head_bits 16"),
    ],
)
def test_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        DraftConfig(**options)


def test_refuses_layers_that_do_not_exist():
    config, *_ = tiny_model()
    with pytest.raises(ValueError, match=r"'\*\.dwon' fits no layer"):
        layer_formats(config, DraftConfig(layers="*.down,*.dwon"))
    with pytest.raises(ValueError, match=r"layers\.99\.q"):
        layer_formats(config, DraftConfig(formats=(("layers.99.q", WeightFormat()),)))
