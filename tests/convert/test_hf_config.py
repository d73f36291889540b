"""config.json: read as transformers reads it, and refused by name where the decoder differs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import transformers

from convert.hf_config import parse_hf_config
from quantspec_jax.models.config import RopeConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}

# As published on the hub.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
    "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
MISTRAL_V1 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
QWEN_2_5 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584,
    "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 32768,
    "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_published_configs():
    smollm = parse_hf_config(SMOLLM2)
    assert (smollm.num_heads, smollm.num_kv_heads, smollm.head_dim) == (9, 3, 64)
    assert smollm.tie_embeddings
    assert smollm.rope == RopeConfig(theta=1e5)
    assert smollm.eos_ids == (2,)
    llama = parse_hf_config(LLAMA_3_1)
    assert llama.rope == RopeConfig("llama3", 500000.0, 8.0, 8192, 1.0, 4.0)
    assert llama.max_context == 131072
    assert llama.eos_ids == (128001, 128008, 128009)
    qwen = parse_hf_config(QWEN_2_5)
    assert qwen.qkv_bias
    assert (qwen.output_bias, qwen.mlp_bias, qwen.qk_norm) == (False, False, False)
    qwen3 = parse_hf_config(QWEN3)
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)
    with pytest.raises(ValueError, match=r"sliding_window in config.json is 4096"):
        parse_hf_config(MISTRAL_V1)
    assert parse_hf_config(MISTRAL_V1 | {"sliding_window": None}).num_kv_heads == 8
    assert parse_hf_config(MISTRAL_V1 | {"sliding_window": 32768}).max_context == 32768


CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


@pytest.mark.parametrize("family", CLASSES)
def test_missing_keys_take_transformers_defaults(family, tmp_path):
    required = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads",
    )  # fmt: skip
    sparse = {key: LLAMA[key] for key in required} | {"model_type": family, "sliding_window": None}
    sparse["num_attention_heads"] = 32
    theirs = CLASSES[family].from_dict(dict(sparse))
    ours = parse_hf_config(sparse)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", None) or theirs.hidden_size // 32
    assert ours.max_context == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    for key in required:
        with pytest.raises(ValueError, match=f"has no {key}"):
            parse_hf_config({k: v for k, v in sparse.items() if k != key})


ROPES = [
    ({"rope_type": "default"}, RopeConfig(theta=5e5), 4096),
    ({"rope_type": "linear", "factor": 4.0}, RopeConfig("linear", 5e5, 4.0), 16384),
    ({"rope_type": "dynamic", "factor": 2.0}, RopeConfig("dynamic", 5e5, 2.0, 4096), 8192),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        RopeConfig("yarn", 5e5, 4.0, 2048),
        8192,
    ),
    (
        {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024,
            "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.5,
            "attention_factor": 1.5, "truncate": False,
        },
        RopeConfig(
            "yarn", 5e5, 2.0, 1024, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.5,
            attention_factor=1.5, truncate=False,
        ),
        4096,
    ),
    (
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        RopeConfig("llama3", 5e5, 8.0, 512, 1.0, 4.0),
        4096,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "expected", "context"), ROPES)
def test_rope_in_every_spelling(scaling, expected, context, tmp_path):
    """The old keys, the older `type`, the new one, and what transformers itself writes."""
    older = {("type" if k == "rope_type" else k): v for k, v in scaling.items()}
    spellings = [
        {"rope_theta": 500000.0, "rope_scaling": scaling},
        {"rope_theta": 500000.0, "rope_scaling": older},
        {"rope_parameters": {"rope_theta": 500000.0, **scaling}},
    ]
    transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_theta": 5e5, **scaling}
    ).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    configs = [parse_hf_config(LLAMA | spelling) for spelling in spellings]
    for config in [*configs, parse_hf_config(written)]:
        assert config.rope == expected
        assert config.max_context == context


@pytest.mark.parametrize("name", ["longrope", "su", "mrope", "proportional", "xpos"])
def test_other_rope_types_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"rope_type in config.json is '{name}'"):
        parse_hf_config(LLAMA | {"rope_scaling": {"rope_type": name, "factor": 2.0}})


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "linear"}, "has no factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "has no low_freq_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ({"rope_type": "linear", "factor": 0.5}, "rope factor is 0.5"),
        ("linear", "rope_scaling in config.json is 'linear'"),
    ],
)
def test_rope_settings_that_are_not_done_are_refused_by_name(scaling, words):
    with pytest.raises(ValueError, match=words):
        parse_hf_config(LLAMA | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("pretraining_tp", 2),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("use_mrope", True),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("is_encoder_decoder", True),
        ("num_local_experts", 8),
        ("logits_scaling", 8.0),
        ("residual_multiplier", 0.22),
        ("a_key_of_the_future", 0),
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}),
        ("sliding_window", 1024),
        ("layer_types", ["full_attention", "linear_attention"]),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("tie_word_embeddings", "yes"),
        ("hidden_size", "64"),
        ("num_attention_heads", None),
        ("num_key_value_heads", 3),
        ("qkv_bias", True),
    ],
)
def test_what_changes_the_computation_is_refused_by_name(key, value):
    name = {"num_key_value_heads": "num_kv_heads"}.get(key, key)
    with pytest.raises(ValueError, match=name):
        parse_hf_config(LLAMA | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "swish"),
        ("pretraining_tp", 1),
        ("quantization_config", None),
        ("a_key_of_the_future", None),
        ("sliding_window", 4096),
        ("temperature", 0.7),
        ("attention_dropout", 0.1),
        ("use_cache", False),
        ("bos_token_id", [1]),
        ("bos_token_id", -1),
        ("pad_token_id", 2**32 - 1),
        ("pad_token_id", "<pad>"),
        ("neftune_noise_alpha", 5.0),
    ],
)
def test_what_leaves_it_alone_is_accepted(key, value):
    """But for a window that the context fills, which counts when that is stretched."""
    window = value if key == "sliding_window" else None
    expected = dataclasses.replace(parse_hf_config(LLAMA), sliding_window=window)
    assert parse_hf_config(LLAMA | {key: value}) == expected


@pytest.mark.parametrize("family", ["gemma", "mixtral", "phi3", "qwen2_moe", None, "LLAMA"])
def test_other_families_are_refused_by_name(family):
    with pytest.raises(ValueError, match=f"model_type in config.json is {family!r}"):
        parse_hf_config(LLAMA | {"model_type": family})


def test_qwen_windows_count_only_where_they_are_on():
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 1024, "max_window_layers": 1}
    parse_hf_config(qwen)
    parse_hf_config(qwen | {"use_sliding_window": False})
    parse_hf_config(qwen | {"use_sliding_window": True, "max_window_layers": 2})
    parse_hf_config(qwen | {"use_sliding_window": True, "layer_types": ["full_attention"] * 2})
    with pytest.raises(ValueError, match="sliding_window"):
        parse_hf_config(qwen | {"use_sliding_window": True})
    mixed = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="sliding_window"):
        parse_hf_config(qwen | {"use_sliding_window": True, "layer_types": mixed})


def test_biases_follow_the_family():
    biased = parse_hf_config(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert biased.qkv_bias
    assert biased.output_bias
    assert biased.mlp_bias
    qwen3 = parse_hf_config(LLAMA | {"model_type": "qwen3", "attention_bias": True})
    assert qwen3.qkv_bias
    assert qwen3.output_bias
    for family in ("mistral", "qwen2"):
        with pytest.raises(ValueError, match="attention_bias"):
            parse_hf_config(
                LLAMA | {"model_type": family, "attention_bias": True, "sliding_window": None}
            )


def test_eos_ids_are_the_union_generation_config_first():
    config = LLAMA | {"eos_token_id": [2, 5]}
    assert parse_hf_config(config).eos_ids == (2, 5)
    assert parse_hf_config(config, {"eos_token_id": [7, 2]}).eos_ids == (7, 2, 5)
    assert parse_hf_config(config | {"eos_token_id": None}, {"eos_token_id": 9}).eos_ids == (9,)
    assert parse_hf_config(config | {"eos_token_id": None}).eos_ids == ()
    for wrong in ("</s>", 2.0, True, [[2]], {"id": 2}):
        with pytest.raises(ValueError, match=r"eos_token_id in config\.json is"):
            parse_hf_config(config | {"eos_token_id": wrong})
        with pytest.raises(ValueError, match=r"eos_token_id in generation_config\.json is"):
            parse_hf_config(config, {"eos_token_id": wrong})


@pytest.mark.parametrize("value", [-1, 320, 2**31, 2**32 - 1, 2**63, 10**30])
def test_an_eos_id_that_is_no_token_is_none(value):
    assert parse_hf_config(LLAMA | {"eos_token_id": value}).eos_ids == ()
    assert parse_hf_config(LLAMA | {"eos_token_id": [value, 5]}).eos_ids == (5,)
    assert parse_hf_config(LLAMA | {"eos_token_id": 2}, {"eos_token_id": [value]}).eos_ids == (2,)


SCALING = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("scaling", "parameters", "theta"),
    [
        (SCALING, SCALING, 5e5),
        (SCALING, SCALING | {"rope_theta": 500000}, 5e5),
        (SCALING, SCALING | {"rope_theta": 5e5}, None),
        (SCALING | {"rope_theta": 5e5}, SCALING, None),
        ({"type": "yarn", **SCALING}, SCALING | {"factor": 2}, 5e5),
        (None, SCALING, 5e5),
        ({}, SCALING, 5e5),
        (SCALING, {}, 5e5),
        (SCALING, None, 5e5),
    ],
)
def test_both_spellings_of_a_scaling_may_say_the_same(scaling, parameters, theta):
    config = LLAMA | {"rope_scaling": scaling, "rope_parameters": parameters, "rope_theta": theta}
    assert parse_hf_config(config).rope == RopeConfig("yarn", 5e5, 2.0, 2048)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        (
            {"rope_scaling": SCALING, "rope_parameters": SCALING | {"factor": 4.0}},
            ["'factor': 2.0", "'factor': 4.0"],
        ),
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_parameters": SCALING},
            ["'default'", "'yarn'"],
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            ["10000.0", "1000000.0"],
        ),
    ],
)
def test_two_that_differ_are_refused_with_both_values(changes, given):
    with pytest.raises(ValueError, match="allowed: one") as caught:
        parse_hf_config(LLAMA | changes)
    assert all(value in str(caught.value) for value in given)


def test_python_of_a_checkpoint_counts_only_where_it_is_the_models():
    of_the_tokenizer = {"AutoTokenizer": ["tokenization_x.X", None], "AutoConfig": "config_x.X"}
    assert parse_hf_config(LLAMA | {"auto_map": of_the_tokenizer}) == parse_hf_config(LLAMA)
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        with pytest.raises(ValueError, match=f"auto_map in config.json is .*{name}"):
            parse_hf_config(LLAMA | {"auto_map": of_the_tokenizer | {name: "modeling_x.X"}})
