"""GGUF headers: what their metadata mean, and that damage is found."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import convert
from convert.files.gguf import read_gguf
from convert.gguf_config import llama3_from_factors
from quantspec_jax.models.config import RopeConfig
from quantspec_jax.models.parameters import flatten


@pytest.fixture(scope="module")
def model(tools):
    return tools.make_model("qwen3")


def config_with(tools, model, path, **kwargs):
    return convert.open_source(tools.write_gguf(model, path / "model.gguf", **kwargs)).config


def test_rope_scaling(tools, model, tmp_path):
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    config = config_with(tools, model, tmp_path, changes=linear)
    assert config.rope == RopeConfig("linear", 10000.0, 4.0)
    assert config.max_context == 4 * 512
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 256,
    }
    config = config_with(tools, model, tmp_path, changes=yarn)
    assert config.rope == RopeConfig("yarn", 10000.0, 4.0, 256)
    assert config.max_context == 1024
    none = config_with(tools, model, tmp_path, changes={"rope.scaling.type": "none"})
    assert none.rope == RopeConfig()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "'longrope'"),
        ({"attention.sliding_window": 128}, "attention.sliding_window"),
        ({"expert_count": 8}, "expert_count"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"rope.dimension_count": 64}, "rope.dimension_count"),
        ({"attention.value_length": 64}, "attention.value_length"),
        ({"attention.key_of_the_future": 1}, "attention.key_of_the_future"),
        ({"context_length": None}, "has no qwen3.context_length"),
        ({"block_count": None}, "has no qwen3.block_count"),
        ({"embedding_length": "256"}, "embedding_length"),
    ],
)
def test_what_is_not_done_is_refused_by_name(changes, words, tools, model, tmp_path):
    with pytest.raises(ValueError, match=words):
        config_with(tools, model, tmp_path, changes=changes)


def test_other_architectures_are_refused_by_name(tools, model, tmp_path):
    path = tools.write_gguf(model, tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b"qwen3", b"gemma"))
    with pytest.raises(ValueError, match=r"general.architecture in .* is 'gemma'; allowed: llama"):
        convert.open_source(path)


def test_a_type_that_is_not_supported_is_refused_by_name(tools, model, tmp_path):
    weights = tools.gguf_weights(model)
    path = tools.write_gguf(model, tmp_path / "model.gguf", "Q8_0", tensors=weights)
    data = path.read_bytes()
    # The type of token_embd.weight follows its two dimensions.
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    path.write_bytes(data[:at] + (16).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ValueError, match=r"token_embd.weight has type IQ2_XXS; allowed: F32"):
        convert.open_source(path)


# Llama 3's RoPE scaling, which GGUF stores as a divisor of each frequency.


def divisors(head_dim: int, scaling: dict) -> np.ndarray:
    """By transformers' own function: the plain frequencies over the scaled ones."""
    frequencies = []
    for kind in ({"rope_type": "default"}, {"rope_type": "llama3", **scaling}):
        config = transformers.LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            rope_parameters={"rope_theta": 500000.0, **kind},
        )
        compute = ROPE_INIT_FUNCTIONS.get(kind["rope_type"])
        if compute is None:
            frequencies.append(500000.0 ** -(np.arange(0, head_dim, 2) / head_dim))
        else:
            frequencies.append(compute(config, "cpu")[0].numpy().astype(np.float64))
    return (frequencies[0] / frequencies[1]).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(
    ("head_dim", "high", "original"), [(64, 4.0, 8192), (128, 4.0, 8192), (128, 2.0, 4096)]
)
def test_llama3_scaling_is_recovered(head_dim, factor, high, original):
    """Exactly: equal configurations give equal logits."""
    scaling = {
        "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    found = llama3_from_factors(divisors(head_dim, scaling), 500000.0)
    assert found == RopeConfig("llama3", 500000.0, factor, original, 1.0, high)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("factor", [2.0, 8.0, 32.0])
@pytest.mark.parametrize("high", [2.0, 4.0, 3.7])
@pytest.mark.parametrize("original", [64, 256, 2048, 3000, 8192, 131072])
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 128])
def test_any_llama3_scaling_is_followed(head_dim, original, high, factor, theta):
    """Few frequencies leave several rules that give the same divisors; any of them is right."""
    turns = original / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    smooth = np.clip((turns - 1) / (high - 1), 0, 1)
    factors = 1 / ((1 - smooth) / factor + smooth)
    found = llama3_from_factors(factors.astype(np.float32).astype(np.float64), theta)
    if np.allclose(factors, 1, atol=1e-6):  # the file then scales nothing
        return
    assert found is not None
    assert found.original_max_position is not None
    turns *= found.original_max_position / original
    span = found.high_freq_factor - found.low_freq_factor
    smooth = np.clip((turns - found.low_freq_factor) / span, 0, 1)
    np.testing.assert_allclose(1 / ((1 - smooth) / found.factor + smooth), factors, rtol=2e-4)


def test_rope_factors_in_a_file(tools, tmp_path):
    scaling = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = tools.make_model(
        "llama",
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling},
    )
    weights = tools.gguf_weights(model)
    factors = divisors(128, scaling).astype(np.float32)
    path = tmp_path / "model.gguf"
    tools.write_gguf(model, path, tensors=weights | {"rope_freqs.weight": factors})
    from_hf = convert.open_source(tools.write_hf(model, tmp_path / "hf"))
    opened = convert.open_source(path)
    assert opened.config.rope == from_hf.config.rope
    opened.load("float32")
    ones = weights | {"rope_freqs.weight": np.ones(64, np.float32)}
    assert convert.open_source(tools.write_gguf(model, path, tensors=ones)).config.rope == (
        RopeConfig(theta=500000.0)
    )
    for wrong in (np.linspace(1, 8, 64), np.full(64, 2.0), np.linspace(0.5, 1, 64)):
        tensors = weights | {"rope_freqs.weight": wrong.astype(np.float32)}
        with pytest.raises(ValueError, match=r"rope_freqs.weight do not follow"):
            convert.open_source(tools.write_gguf(model, path, tensors=tensors))


# EOS.


def test_eos_ids(tools, model, tmp_path):
    def ids(writer):
        writer.add_eot_token_id(5)
        writer.add_eom_token_id(1)

    assert config_with(tools, model, tmp_path).eos_ids == (1,)
    assert config_with(tools, model, tmp_path, with_tokenizer=ids).eos_ids == (1, 5)


@pytest.mark.parametrize("value", [320, 2**31, 2**32 - 1])
def test_an_end_id_that_is_no_token_is_none(value, tools, model, tmp_path):
    def ids(writer):
        writer.add_eot_token_id(value)
        writer.add_pad_token_id(value)

    assert config_with(tools, model, tmp_path, with_tokenizer=ids).eos_ids == (1,)


@pytest.mark.parametrize(
    "text",
    [
        "<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "</s>", "<EOT>",
        "<|eom_id|>", "<|end_of_text|>", "<end_of_utterance>", "<|fim_pad|>", "<|file_sep|>",
    ],
)  # fmt: skip
def test_control_tokens_that_end_an_answer_are_found_by_their_text(text, tools, model, tmp_path):
    def tokens(kind):
        def add(writer):
            writer.add_token_list([*(f"t{i}" for i in range(319)), text])
            writer.add_token_types([3] * 319 + [kind])

        return add

    for kind, ids in ((3, (1, 319)), (1, (1,)), (4, (1,))):
        assert config_with(tools, model, tmp_path, with_tokenizer=tokens(kind)).eos_ids == ids


@pytest.mark.parametrize(
    "key",
    [
        "mradermacher.quantize_version", "acme.note", "llama.attention.key_of_the_future",
        "quantize.imatrix.file", "note", "qwen3",
    ],
)  # fmt: skip
def test_keys_of_other_namespaces_change_nothing(key, tools, model, tmp_path):
    plain = config_with(tools, model, tmp_path)
    noted = config_with(
        tools, model, tmp_path, with_tokenizer=lambda writer: writer.add_string(key, "x")
    )
    assert noted == plain


# Damage.


def test_a_file_cut_anywhere_is_an_error(tools, model, tmp_path):
    path = tools.write_gguf(model, tmp_path / "model.gguf", "Q8_0")
    whole = path.read_bytes()
    last = max(t.offset + t.num_bytes for t in read_gguf(path).tensors.values())
    cuts = [0, 3, 4, 8, 16, 23, 24, 30, 100, 500, 1500, 2500, len(whole) // 2, last - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.gguf"):
            convert.open_source(path).load("float32")


def test_flipped_bits_in_the_header_never_crash_or_hang(tools, model, tmp_path):
    """Either the error is a ValueError or the flip did no harm (a name in free text, say)."""
    path = tools.write_gguf(model, tmp_path / "model.gguf", "Q8_0")
    whole = path.read_bytes()
    start = min(t.offset for t in read_gguf(path).tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(start, size=200):
        with path.open("r+b") as stream:
            stream.seek(at)
            stream.write(bytes([whole[at] ^ 1 << rng.integers(8)]))
        try:
            convert.open_source(path).check()
        except ValueError:
            refused += 1
        with path.open("r+b") as stream:
            stream.seek(at)
            stream.write(whole[at : at + 1])
    assert refused > 100


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"GGUF", b"GGML", "does not begin with GGUF"),
        (b"\x03\0\0\0", b"\x01\0\0\0", "GGUF version 1"),
        (b"\x03\0\0\0", b"\0\0\0\x03", "GGUF version"),
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", "duplicate tensor blk.0.ffn_up.weight"),
        (b"qwen3.context_length", b"qwen3.\xff\xfeontext_length", "not UTF-8"),
    ],
)
def test_damage_is_described(old, new, words, tools, model, tmp_path):
    path = tools.write_gguf(model, tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match=words):
        convert.open_source(path)


def test_a_nan_in_a_quantized_scale_is_named(tools, model, tmp_path):
    path = tools.write_gguf(model, tmp_path / "model.gguf", "Q8_0")
    tensor = read_gguf(path).tensors["blk.1.ffn_down.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.offset : tensor.offset + 2] = b"\0\x7e"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"blk.1.ffn_down.weight has a NaN"):
        convert.open_source(path).load("float32")


# Several parts.


@pytest.fixture
def parts(tools, model, tmp_path):
    """The model in three files, written as llama.cpp's gguf-split does: path by number."""
    weights = list(tools.gguf_weights(model).items())
    cuts = [weights[:5], weights[5:9], weights[9:]]

    def write(number, tensors=None, **changes):
        def split(writer):
            values = {"no": number, "count": 3, "tensors.count": len(weights)} | changes
            for key, value in values.items():
                if value is not None:
                    writer.add_uint16(f"split.{key}", value)

        path = tmp_path / f"model-{number + 1:05d}-of-00003.gguf"
        tensors = dict(cuts[number] if tensors is None else tensors)
        return tools.write_gguf(model, path, tensors=tensors, with_tokenizer=split)

    write.cuts = cuts
    write.paths = [write(number) for number in range(3)]
    return write


def test_a_file_in_parts_is_the_whole_model(parts, tools, model, tmp_path):
    opened = convert.open_source(parts.paths[0])
    whole = convert.open_source(tools.write_gguf(model, tmp_path / "whole.gguf"))
    assert opened.config == whole.config
    ours, theirs = flatten(opened.load("float32")), flatten(whole.load("float32"))
    assert set(ours) == set(theirs)
    for path in theirs:
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(theirs[path]))


def test_parts_that_do_not_fit_are_named(parts, tmp_path):
    first, second, third = parts.paths
    for other in (second, third):
        with pytest.raises(ValueError, match=r"name its first part, model-00001-of-00003\.gguf"):
            convert.open_source(other)
    whole = second.read_bytes()
    for cut in (10, 500, len(whole) - 40):
        second.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model-00002-of-00003\.gguf"):
            convert.open_source(first)
    second.unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.gguf does not exist"):
        convert.open_source(first)
    wrong = [
        ({"no": 2}, r"split.no in .*00002.* is 2; allowed: 1"),
        ({"no": None}, r"split.no in .*00002.* is None"),
        ({"count": 4}, r"split.count in .*00002.* is 4; allowed: 3"),
        ({"tensors": parts.cuts[0]}, r"00002.* tensor blk.0.attn_k.weight is in another part"),
        ({"tensors": parts.cuts[1][1:]}, r"split.tensors.count in .*00001"),
    ]
    for changes, words in wrong:
        parts(1, **changes)
        with pytest.raises(ValueError, match=words):
            convert.open_source(first)
    parts(1)
    convert.open_source(first).check()
    first.rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"split.count = 3.*model-00001-of-00003"):
        convert.open_source(tmp_path / "model.gguf")
