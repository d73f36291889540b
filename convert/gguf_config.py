"""Metadata of a GGUF file → ModelConfig; as with config.json, every key is accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from convert.files.gguf import GgufFile
from convert.files.tensors import StoredTensor
from quantspec_jax.checks import LARGEST_INT, within
from quantspec_jax.files import open_file
from quantspec_jax.models.config import MOST_LAYERS, Family, ModelConfig, RopeConfig
from quantspec_jax.settings import Settings
from quantspec_jax.text.tokenizer import gguf_eos_ids

# llama.cpp stores Mistral under the architecture "llama": the computation is the same.
ARCHITECTURES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

ROPE_FACTORS = "rope_freqs.weight"

# What an architecture's key may hold beside what is read below (None: anything).
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "vocab_size": None,
    "tensor_data_layout": ("Meta AI original pth",),
    "rope.scaling.finetuned": None,
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "pooling_type": (0,),
}
# Settings of yarn beyond Hugging Face's; llama.cpp multiplies its attention factor by attn_factor.
_YARN_NEUTRAL = {
    "attn_factor": (1.0, 0.0),
    "yarn_attn_factor": (1.0, 0.0),
    "yarn_ext_factor": (1.0, -1.0),
    "yarn_log_multiplier": (0.0,),
}


class _Keys(Settings):
    """The keys of one architecture, without its prefix."""

    def get(self, key: str, *default: Any) -> Any:
        """A list of one number a layer, all the same, is that number."""
        value = super().get(key, *default)
        same = isinstance(value, list) and value and all(v == value[0] for v in value)
        return value[0] if same else value

    def refuse_the_rest(self) -> None:
        """Keys of other namespaces are notes about the file; these alone describe the model."""
        for name in self.not_asked():
            key, value = name.removeprefix(self.prefix), self.values[name]
            if key == name:
                continue
            if key not in _NEUTRAL:
                raise ValueError(
                    f"{self.where} has {name}, which is not known; it may change the computation, "
                    "so the model is not loaded"
                )
            neutral = _NEUTRAL[key]
            if neutral is not None:
                same = any(value == n and _is_bool(value) == _is_bool(n) for n in neutral)
                self.require(key, same, value, ", ".join(map(repr, neutral)))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def parse_gguf_config(file: GgufFile) -> ModelConfig:
    """Raises ValueError, naming the key or tensor, for what the decoder does not do."""
    where = str(file.path)
    architecture = Settings(file.metadata, where).choice(
        "general.architecture", ARCHITECTURES, default=None
    )
    keys = _Keys(file.metadata, where, f"{architecture}.")
    with within(where):
        config = _parse_model(ARCHITECTURES[architecture], keys, file)
    keys.refuse_the_rest()
    return config


def _parse_model(family: Family, keys: _Keys, file: GgufFile) -> ModelConfig:
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        value = keys.integer(key, head_dim)
        keys.require(key, value == head_dim, value, f"the head dimension, {head_dim}")
    context = keys.integer("context_length")
    rope, max_context = _parse_rope(keys, context, head_dim)
    rope = _apply_rope_factors(file, rope, head_dim)
    window = keys.integer("attention.sliding_window", None, least=0) or None
    if window is not None:
        allowed = f"at least the context of {max_context} tokens"
        keys.require("attention.sliding_window", window >= max_context, window, allowed)
    return ModelConfig(
        family=family,
        vocab_size=_vocab_size(file),
        hidden_size=hidden,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=_num_layers(keys, file),
        num_heads=heads,
        num_kv_heads=keys.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_context=max_context,
        rms_norm_eps=_shortest(keys.number("attention.layer_norm_rms_epsilon", most=1)),
        rope=rope,
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias=family == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm=family == "qwen3",
        eos_ids=gguf_eos_ids(file.metadata, _vocab_size(file), keys.where),
        sliding_window=window,
    )


def _num_layers(keys: _Keys, file: GgufFile) -> int:
    """A layer has tensors."""
    return keys.integer("block_count", most=min(MOST_LAYERS, len(file.tensors)))


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 where the file holds 9.99999974738e-06."""
    return float(str(np.float32(value)))


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{file.path}: missing or misshapen tensor token_embd.weight")
    return embedding.shape[0]


def _parse_rope(keys: _Keys, context: int, head_dim: int) -> tuple[RopeConfig, int]:
    """`rope.*` → RopeConfig and the longest sequence. llama.cpp knows none, linear and yarn."""
    theta = _shortest(keys.number("rope.freq_base", 10000.0))
    kind = keys.get("rope.scaling.type", None)
    # scale_linear: files of 2023, which have no type. 0: none
    old_factor = keys.number("rope.scale_linear", None, least=0)
    factor = keys.number("rope.scaling.factor", None, least=0) or old_factor
    if kind is None and factor:
        kind = "linear"
    factor = _shortest(factor) if factor else 1.0
    original = keys.integer("rope.scaling.original_context_length", context, least=0) or context
    settings = {name: keys.get(f"rope.scaling.{name}", None) for name in _YARN_NEUTRAL}
    fast, slow = (
        keys.number(f"rope.scaling.yarn_beta_{name}", default, least=0) or default
        for name, default in (("fast", 32.0), ("slow", 1.0))
    )
    known = kind in (None, "none", "linear", "yarn")
    keys.require("rope.scaling.type", known, kind, "none, linear, yarn")
    if kind in (None, "none") or (kind == "linear" and factor == 1):
        return RopeConfig(theta=theta), context
    if kind == "linear":
        rope = RopeConfig("linear", theta, factor)
        return rope, int(context * factor)
    for name, value in settings.items():
        allowed = _YARN_NEUTRAL[name]
        same = value is None or (value in allowed and not _is_bool(value))
        keys.require(f"rope.scaling.{name}", same, value, str(allowed[0]))
    rope = RopeConfig(
        "yarn", theta, factor, original, beta_fast=_shortest(fast), beta_slow=_shortest(slow)
    )
    return rope, max(context, int(original * factor))


def _apply_rope_factors(file: GgufFile, rope: RopeConfig, head_dim: int) -> RopeConfig:
    """llama.cpp stores Llama 3's RoPE scaling as a divisor of each frequency; find its rule."""
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return rope
    if tensor.shape != (head_dim // 2,):
        raise ValueError(
            f"{file.path}: tensor {ROPE_FACTORS} has shape {list(tensor.shape)}, not "
            f"[{head_dim // 2}]"
        )
    factors = _read_vector(tensor)
    if np.allclose(factors, 1, rtol=0, atol=1e-6):
        return rope
    found = llama3_from_factors(factors, rope.theta) if rope.type == "default" else None
    if found is None:
        raise ValueError(
            f"{file.path}: the frequency factors in tensor {ROPE_FACTORS} do not follow Llama 3's "
            "RoPE scaling, the only rule supported"
        )
    return found


def _read_vector(tensor: StoredTensor) -> np.ndarray:
    with open_file(tensor.file) as stream:
        return tensor.read_rows(stream, 0, 1)[0].astype(np.float64)


def llama3_factors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """[D/2]: what llama3 scaling divides each frequency by."""
    assert rope.original_max_position is not None
    wavelength = 2 * math.pi * rope.theta ** (np.arange(0, head_dim, 2) / head_dim)
    rotations = rope.original_max_position / wavelength
    span = rope.high_freq_factor - rope.low_freq_factor
    smooth = np.clip((rotations - rope.low_freq_factor) / span, 0, 1)
    return 1 / ((1 - smooth) / rope.factor + smooth)


def llama3_from_factors(factors: np.ndarray, theta: float) -> RopeConfig | None:
    """The llama3 scaling whose divisors these are, or None.

    A frequency that makes r turns within the original context is divided by

        1 / (smooth + (1 − smooth) / factor)        smooth = clip((r − low) / (high − low), 0, 1)

    Scaling context, low and high together changes nothing, so low = 1 fixes the solution; every
    published model has low = 1. The factor is the largest divisor, where a frequency is slow enough
    for it; else one of those that models have. Where few frequencies lie between the two ends,
    several contexts give the same divisors; published ones come first.
    """
    largest = float(f"{np.max(factors):.6g}")
    inside = np.all(np.isfinite(factors)) and np.min(factors) > 1 - 1e-5
    if not (inside and 1 < largest <= 1e6):
        return None
    head_dim = 2 * len(factors)
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # a token
    for factor in (largest, *(f for f in _FACTORS if f > largest)):
        smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
        for original, high in _contexts(turns, smooth):
            if not (1 <= original <= LARGEST_INT and 1 < high <= 1e6):
                continue
            rope = RopeConfig("llama3", theta, factor, original, 1.0, high)
            if np.allclose(llama3_factors(rope, head_dim), factors, rtol=1e-4, atol=0):
                return rope
    return None


_FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_HIGHS = (4.0, 2.0, 8.0, 3.0, 16.0, 32.0)  # high_freq_factor; models have 4
_ORIGINALS = (8192, *(2**n for n in range(5, 21)))


def _contexts(turns: np.ndarray, smooth: np.ndarray) -> Iterator[tuple[int, float]]:
    """Original contexts and high_freq_factors that may give `smooth`, with low_freq_factor 1."""
    inside = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if np.count_nonzero(inside) >= 2:  # smooth = (original · turns − 1) / (high − 1), a line
        slope, intercept = np.polyfit(turns[inside], smooth[inside], 1)
        if intercept < -1e-6 and 0 < slope < 1e6:
            high = 1 - 1 / intercept
            original = round(slope * (high - 1))
            yield from ((original, round(high, digits)) for digits in (2, 6))
    elif inside.any():
        (one,), (part,) = turns[inside], smooth[inside]
        yield from ((round((1 + part * (high - 1)) / one), high) for high in _HIGHS)
        yield from ((n, float(1 + (n * one - 1) / part)) for n in _ORIGINALS)
    yield from ((n, high) for high in _HIGHS for n in _ORIGINALS)
    slow, fast = turns[smooth < 0.5], turns[smooth > 0.5]
    if slow.size and fast.size:  # nothing between them: the ends lie where they are
        original = math.floor(1 / slow.max())
        yield original, float(original * fast.min())
