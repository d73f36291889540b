"""config.json of a Hugging Face model → ModelConfig.

Every key is accounted for: it is read, or it is known to leave the computation alone, or its value
must be the neutral one, or it is refused by name. Missing keys take transformers' defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from quantspec_jax.checks import is_int, is_number, require
from quantspec_jax.models.config import FAMILIES, ROPE_TYPES, ModelConfig, RopeConfig

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

_REQUIRED = object()


class _Keys:
    """A config's keys; remembers which were asked for, so that the rest can be refused."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self._values = {**defaults, **values}
        self._given = set(values)
        self._asked: set[str] = set()
        self._where = where

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        self._asked.add(key)
        value = self._values.get(key)
        if value is None and default is _REQUIRED:
            raise ValueError(f"{self._where} has no {key}")
        return default if value is None else value

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        require(isinstance(value, bool), f"{key} in {self._where}", value, "true, false")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.get(key, default)
        allowed = value is default or (isinstance(value, int | float) and value is not True)
        require(allowed and value is not False, f"{key} in {self._where}", value, "a number")
        return value

    def refuse_the_rest(self) -> None:
        for key in sorted(self._given - self._asked):
            value = self._values[key]
            if value is None or key in HARMLESS:
                continue
            if key in NEUTRAL:
                if any(value == neutral for neutral in NEUTRAL[key]):
                    continue
                allowed = ", ".join([*map(repr, NEUTRAL[key]), "null"])
                if key == "quantization_config":
                    allowed += " (4-bit weights can be the draft of their model: --draft-from)"
                shown = value if len(repr(value)) < 80 else repr(value)[:77] + "..."
                require(False, f"{key} in {self._where}", shown, allowed)
            raise ValueError(
                f"{self._where} has {key}, which is not known; it may change the computation, so "
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
    family: Any = values.get("model_type")
    require(family in FAMILIES, f"model_type in {where}", family, ", ".join(FAMILIES))
    keys = _Keys(values, _DEFAULTS[family], where)
    heads = keys.number("num_attention_heads")
    hidden = keys.number("hidden_size")
    rope, context = _parse_rope(keys, keys.number("max_position_embeddings"), where)
    config = ModelConfig(
        family=family,
        vocab_size=keys.number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.number("intermediate_size"),
        num_layers=keys.number("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=keys.number("num_key_value_heads", heads),
        head_dim=keys.number("head_dim", hidden // max(heads, 1)),
        max_context=context,
        rms_norm_eps=float(keys.number("rms_norm_eps", 1e-6)),
        rope=rope,
        tie_embeddings=keys.flag("tie_word_embeddings"),
        qk_norm=family == "qwen3",
        eos_ids=_eos_ids(
            keys.get("eos_token_id", None), generation or {}, keys.number("vocab_size"), where
        ),
        **_biases(family, keys, where),
    )
    window = _sliding_window(keys, config, where)
    _check_auto_map(keys.get("auto_map", None), where)
    keys.refuse_the_rest()
    return dataclasses.replace(config, sliding_window=window)


def _biases(family: str, keys: _Keys, where: str) -> dict[str, bool]:
    """Which linear layers have a bias. transformers reads the keys in some families only."""
    attention = keys.flag("attention_bias") if family in ("llama", "qwen3") else False
    mlp = keys.flag("mlp_bias") if family == "llama" else False
    for key in ("attention_bias", "mlp_bias", "qkv_bias"):
        if keys.get(key, False) and not (attention or mlp):
            require(False, f"{key} in {where}", True, f"false for model_type {family}")
    return {
        "qkv_bias": attention or family == "qwen2",
        "output_bias": attention,
        "mlp_bias": mlp,
    }


def _eos_ids(
    of_config: Any, generation: Mapping[str, Any], vocab_size: int, where: str
) -> tuple[int, ...]:
    """The union of both files' ids, generation_config.json's first. An id that is no token of the
    vocabulary (−1, say) is none."""

    def ids(value: Any) -> list[int]:
        several = value if isinstance(value, list | tuple) else [value]
        numbers = [v for v in several if v is not None]
        whole = all(type(v) is int for v in numbers)
        require(whole, f"eos_token_id in {where}", value, "a token id, or a list of them")
        return [v for v in numbers if 0 <= v < vocab_size]

    return tuple(dict.fromkeys(ids(generation.get("eos_token_id")) + ids(of_config)))


def _check_auto_map(auto_map: Any, where: str) -> None:
    """Python of the checkpoint's own is never run. Where it is the model's, it may compute
    something else than the decoder; a tokenizer's or a configuration's is passed over."""
    names = sorted(map(str, auto_map)) if isinstance(auto_map, Mapping | list) else []
    models = [name for name in names if name.startswith("AutoModel")]
    require(not models, f"auto_map in {where}", models, "no Python code for the model")


def _sliding_window(keys: _Keys, config: ModelConfig, where: str) -> int | None:
    """The window, where a layer has one; one that the context can outgrow is refused."""
    window = keys.get("sliding_window", None)
    kinds = {str(kind) for kind in keys.get("layer_types", None) or ()}
    first_layers = keys.get("max_window_layers", 28)  # which, in qwen, have no window
    if config.family in ("qwen2", "qwen3"):
        on = keys.flag("use_sliding_window")
        windowed = on and (
            "sliding_attention" in kinds if kinds else first_layers < config.num_layers
        )
    else:
        keys.flag("use_sliding_window")
        windowed = True  # layer_types or not
    allowed = {"full_attention"} | ({"sliding_attention"} if window is not None else set())
    require(kinds <= allowed, f"layer_types in {where}", sorted(kinds), "full_attention")
    if not windowed or window is None:
        return None
    require(
        is_int(window) and window >= config.max_context,
        f"sliding_window in {where}",
        window,
        f"null, or at least the context of {config.max_context} tokens",
    )
    return window


def _parse_rope(keys: _Keys, max_position: int, where: str) -> tuple[RopeConfig, int]:
    """Both spellings (`rope_parameters`; `rope_theta` and `rope_scaling`) → RopeConfig, context.

    Where both are there, they must say the same.
    """
    names = ("rope_scaling", "rope_parameters")
    given = {name: value for name in names if (value := keys.get(name, None))}
    for name, value in given.items():
        require(isinstance(value, Mapping), f"{name} in {where}", value, "an object")
    theta = _theta(keys, given, where)
    parsed = {
        name: _parse_scaling(name, value, theta, keys, max_position, where)
        for name, value in (given or {"rope_parameters": {}}).items()
    }
    if len(set(parsed.values())) > 1:
        raise ValueError(
            f"{where} has rope_scaling {given['rope_scaling']!r} and rope_parameters "
            f"{given['rope_parameters']!r}; allowed: one of them, or two that say the same"
        )
    return next(iter(parsed.values()))


def _theta(keys: _Keys, given: Mapping[str, Mapping[str, Any]], where: str) -> float:
    """The one `rope_theta`, at the top or within; 10000 where there is none."""
    places = {"rope_theta": keys.get("rope_theta", None)}
    places |= {f"{name}.rope_theta": value.get("rope_theta") for name, value in given.items()}
    stated = {place: value for place, value in places.items() if value is not None}
    for place, value in stated.items():
        require(is_number(value), f"{place} in {where}", value, "a number")
    if len(set(stated.values())) > 1:
        raise ValueError(f"{where} has several bases of RoPE, {stated}; allowed: one")
    return float(next(iter(stated.values()), 10000.0))


def _parse_scaling(
    name: str,
    given: Mapping[str, Any],
    theta: float,
    keys: _Keys,
    max_position: int,
    where: str,
) -> tuple[RopeConfig, int]:
    values = {key: value for key, value in given.items() if value is not None}
    unknown = sorted(set(values) - _ROPE_KEYS)
    kind = values.get("rope_type", values.get("type", "default"))
    require(kind in ROPE_TYPES, f"rope_type in {where}", kind, ", ".join(ROPE_TYPES))
    if unknown:
        raise ValueError(f"{name} in {where} has {', '.join(unknown)}, which is not known")
    partial = values.get("partial_rotary_factor", 1)
    require(partial == 1, f"partial_rotary_factor in {where}", partial, "1")

    def needed(key: str) -> Any:
        if key not in values:
            raise ValueError(f"{name} in {where} has no {key}, which rope_type {kind} needs")
        return values[key]

    original = keys.get("original_max_position_embeddings", None)
    original = original or values.get("original_max_position_embeddings", max_position)
    if kind == "default":
        return RopeConfig(theta=theta), max_position
    if kind == "linear":
        factor = float(needed("factor"))
        return RopeConfig("linear", theta, factor), int(max_position * factor)
    if kind == "dynamic":
        # transformers grows the base from max_position_embeddings on, whatever the other key says.
        require(
            original == max_position,
            f"original_max_position_embeddings in {where}",
            original,
            f"max_position_embeddings = {max_position} for rope_type dynamic",
        )
        factor = float(needed("factor"))
        return RopeConfig("dynamic", theta, factor, max_position), int(max_position * factor)
    if kind == "llama3":
        rope = RopeConfig(
            "llama3",
            theta,
            float(needed("factor")),
            original,
            low_freq_factor=float(needed("low_freq_factor")),
            high_freq_factor=float(needed("high_freq_factor")),
        )
        return rope, max_position
    factor = float(values.get("factor", max_position / original))
    rope = RopeConfig(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=float(values.get("beta_fast") or 32),
        beta_slow=float(values.get("beta_slow") or 1),
        attention_factor=values.get("attention_factor"),
        mscale=values.get("mscale"),
        mscale_all_dim=values.get("mscale_all_dim"),
        truncate=values.get("truncate", True),
    )
    return rope, max(max_position, int(original * factor))
