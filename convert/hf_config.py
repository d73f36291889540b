"""config.json of a Hugging Face model → ModelConfig.

Every key is accounted for: it is read, or it is known to leave the computation alone, or its value
must be the neutral one, or it is refused by name. Missing keys take transformers' defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from quantspec_jax.checks import is_int, require, within
from quantspec_jax.models.config import (
    FAMILIES,
    MOST_LAYERS,
    ROPE_TYPES,
    ModelConfig,
    RopeConfig,
)
from quantspec_jax.settings import Settings

# Bookkeeping, training, and generation defaults that older versions wrote beside the model's own
# keys: none of them changes a logit.
HARMLESS = {
    "_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype",
    "dtype", "name_or_path", "tokenizer_class", "transformers.js_config", "unsloth_fixed",
    "unsloth_version", "use_cache", "initializer_range", "attention_dropout", "hidden_dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "unk_token_id", "mask_token_id", "max_window_layers",
    "is_llama_config", "_attn_implementation", "_attn_implementation_autoset",
    "attn_implementation", "_flash_attn_2_enabled", "use_flash_attention_2",
    "gradient_checkpointing", "return_dict", "output_hidden_states", "output_attentions",
    "torchscript", "use_bfloat16", "is_decoder", "chunk_size_feed_forward", "id2label",
    "label2id", "problem_type", "task_specific_params", "prefix", "tie_encoder_decoder",
    "return_dict_in_generate", "output_scores", "num_return_sequences", "finetuning_task",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "begin_suppress_tokens", "suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "max_sequence_length",
    "model_max_length", "num_labels", "bos_token_id", "neftune_noise_alpha", "max_new_tokens",
    "min_p", "renormalize_logits", "cache_implementation", "classifier_dropout",
    "attention_probs_dropout_prob", "hidden_dropout_prob", "use_return_dict", "_commit_hash",
}  # fmt: skip

# Keys that would change the computation: only these values, or null, are what the decoder does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "quantization_config": (),
    "compression_config": (),
}

_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "low_freq_factor", "high_freq_factor", "partial_rotary_factor", "finetuned",
}  # fmt: skip

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


def _refuse_the_rest(keys: Settings) -> None:
    """Keys that nobody asked for: harmless, neutral, or a reason not to load the model."""
    for key in keys.not_asked():
        value = keys.values[key]
        if value is None or key in HARMLESS:
            continue
        if key in NEUTRAL:
            if any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[key]):
                continue
            allowed = ", ".join([*map(repr, NEUTRAL[key]), "null"])
            if key == "quantization_config":
                allowed += " (4-bit weights can be the draft of their model: --draft-from)"
            keys.require(key, False, value, allowed)
        raise ValueError(
            f"{keys.where} has {key}, which is not known; it may change the computation, so "
            "the model is not loaded"
        )


def parse_hf_config(
    values: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    where: str = "config.json",
) -> ModelConfig:
    """`config.json` and `generation_config.json`, as dicts → ModelConfig.

    Raises ValueError, naming the key, for what the decoder does not do.
    """
    keys = Settings(values, where)
    family = keys.choice("model_type", FAMILIES, default=None)
    keys = Settings({**_DEFAULTS[family], **values}, where)
    with within(where):
        config = _parse_model(family, keys, Settings(generation or {}, _generation_of(where)))
    _check_auto_map(keys.get("auto_map", None), where)
    _refuse_the_rest(keys)
    return config


def _generation_of(where: str) -> str:
    return where.removesuffix("config.json") + "generation_config.json"


def _parse_model(family: Any, keys: Settings, generation: Settings) -> ModelConfig:
    heads = keys.integer("num_attention_heads")
    hidden = keys.integer("hidden_size")
    vocab = keys.integer("vocab_size")
    rope, context = _parse_rope(keys, keys.integer("max_position_embeddings"))
    config = ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size"),
        num_layers=keys.integer("num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("head_dim", hidden // heads),
        max_context=context,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6, most=1),
        rope=rope,
        tie_embeddings=keys.flag("tie_word_embeddings"),
        qk_norm=family == "qwen3",
        eos_ids=tuple(dict.fromkeys(_eos_ids(generation, vocab) + _eos_ids(keys, vocab))),
        **_biases(family, keys),
    )
    return dataclasses.replace(config, sliding_window=_sliding_window(keys, config))


def _biases(family: str, keys: Settings) -> dict[str, bool]:
    """Which linear layers have a bias. transformers reads the keys in some families only."""
    attention = keys.flag("attention_bias") if family in ("llama", "qwen3") else False
    mlp = keys.flag("mlp_bias") if family == "llama" else False
    for key in ("attention_bias", "mlp_bias", "qkv_bias"):
        if keys.flag(key) and not (attention or mlp):
            keys.require(key, False, True, f"false for model_type {family}")
    return {
        "qkv_bias": attention or family == "qwen2",
        "output_bias": attention,
        "mlp_bias": mlp,
    }


def _eos_ids(keys: Settings, vocab_size: int) -> list[int]:
    """An id that is no token of the vocabulary (−1, say) is none. Both files' ids count,
    generation_config.json's first."""
    value = keys.get("eos_token_id", None)
    several = value if isinstance(value, list | tuple) else [value]
    numbers = [v for v in several if v is not None]
    keys.require("eos_token_id", all(map(is_int, numbers)), value, "a token id, or a list of them")
    return [v for v in numbers if 0 <= v < vocab_size]


def _check_auto_map(auto_map: Any, where: str) -> None:
    """Python of the checkpoint's own is never run. Where it is the model's, it may compute
    something else than the decoder; a tokenizer's or a configuration's is passed over."""
    names = sorted(map(str, auto_map)) if isinstance(auto_map, Mapping | list) else []
    models = [name for name in names if name.startswith("AutoModel")]
    require(not models, f"auto_map in {where}", models, "no Python code for the model")


def _sliding_window(keys: Settings, config: ModelConfig) -> int | None:
    """The window, where a layer has one; one that the context can outgrow is refused."""
    window = keys.get("sliding_window", None)
    kinds = set(keys.texts("layer_types", ()))
    first_layers = keys.integer("max_window_layers", 28, least=0)  # without a window, in qwen
    on = keys.flag("use_sliding_window")
    if config.family in ("qwen2", "qwen3"):
        windowed = on and (
            "sliding_attention" in kinds if kinds else first_layers < config.num_layers
        )
    else:
        windowed = True  # layer_types or not
    allowed = {"full_attention"} | ({"sliding_attention"} if window is not None else set())
    keys.require("layer_types", kinds <= allowed, sorted(kinds), "full_attention")
    if not windowed or window is None:
        return None
    keys.require(
        "sliding_window",
        is_int(window) and window >= config.max_context,
        window,
        f"null, or at least the context of {config.max_context} tokens",
    )
    return window


def _parse_rope(keys: Settings, max_position: int) -> tuple[RopeConfig, int]:
    """Both spellings (`rope_parameters`; `rope_theta` and `rope_scaling`) → RopeConfig, context.

    Where both are there, they must say the same.
    """
    names = ("rope_scaling", "rope_parameters")
    given = {name: value for name in names if (value := keys.entries(name, {}))}
    scalings = {name: Settings(value, keys.where) for name, value in given.items()}
    theta = _theta(keys, scalings)
    original = keys.integer("original_max_position_embeddings", None)
    parsed = {
        _parse_scaling(values, theta, original, max_position)
        for values in (scalings or {"": Settings({}, keys.where)}).values()
    }
    if len(parsed) > 1:
        raise ValueError(
            f"{keys.where} has rope_scaling {given['rope_scaling']!r} and rope_parameters "
            f"{given['rope_parameters']!r}; allowed: one of them, or two that say the same"
        )
    return parsed.pop()


def _theta(keys: Settings, scalings: Mapping[str, Settings]) -> float:
    """The one `rope_theta`, at the top or within; 10000 where there is none."""
    places = {"rope_theta": keys.number("rope_theta", None)}
    places |= {f"{name}.rope_theta": s.number("rope_theta", None) for name, s in scalings.items()}
    stated = {place: value for place, value in places.items() if value is not None}
    if len(set(stated.values())) > 1:
        raise ValueError(f"{keys.where} has several bases of RoPE, {stated}; allowed: one")
    return next(iter(stated.values()), 10000.0)


def _parse_scaling(
    values: Settings, theta: float, original: int | None, max_position: int
) -> tuple[RopeConfig, int]:
    """`original`: what the model's own original_max_position_embeddings says, which comes first."""
    old_name = values.get("type", "default")
    kind = values.get("rope_type", old_name)
    values.require("rope_type", isinstance(kind, str) and kind in ROPE_TYPES, kind, _ROPE_TYPES)
    unknown = sorted(k for k in values.values if k not in _ROPE_KEYS and values.get(k, None))
    if unknown:
        raise ValueError(f"{values.where} has {', '.join(unknown)}, which is not known")
    partial = values.number("partial_rotary_factor", 1.0)
    values.require("partial_rotary_factor", partial == 1, partial, "1")
    within_it = values.integer("original_max_position_embeddings", max_position)
    original = original or within_it
    if kind == "default":
        return RopeConfig(theta=theta), max_position
    if kind == "yarn":
        return _parse_yarn(values, theta, original, max_position)
    factor = _needed(values, "factor", kind)
    if kind == "linear":
        return RopeConfig("linear", theta, factor), int(max_position * factor)
    if kind == "dynamic":
        # transformers grows the base from max_position_embeddings on, whatever the other key says.
        values.require(
            "original_max_position_embeddings",
            original == max_position,
            original,
            f"max_position_embeddings = {max_position} for rope_type dynamic",
        )
        return RopeConfig("dynamic", theta, factor, max_position), int(max_position * factor)
    low, high = (_needed(values, f"{end}_freq_factor", kind) for end in ("low", "high"))
    rope = RopeConfig("llama3", theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    return rope, max_position


_ROPE_TYPES = ", ".join(ROPE_TYPES)


def _needed(values: Settings, key: str, kind: str) -> float:
    number = values.number(key, None)
    if number is None:
        raise ValueError(f"{values.where} has no {key}, which rope_type {kind} needs")
    return number


def _parse_yarn(
    values: Settings, theta: float, original: int, max_position: int
) -> tuple[RopeConfig, int]:
    factor = values.number("factor", max_position / original)
    rope = RopeConfig(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=values.number("beta_fast", 32.0),
        beta_slow=values.number("beta_slow", 1.0),
        attention_factor=values.number("attention_factor", None),
        mscale=values.number("mscale", None, least=0),
        mscale_all_dim=values.number("mscale_all_dim", None, least=0),
        truncate=values.flag("truncate", True),
    )
    return rope, max(max_position, int(original * factor))
