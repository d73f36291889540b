"""What a model is: architecture and rotary embedding, as data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from quantspec_jax.checks import (
    LARGEST_INT,
    fields_of,
    is_int,
    is_number,
    require,
    require_number,
)

Family = Literal["llama", "mistral", "qwen2", "qwen3"]


FAMILIES: tuple[Family, ...] = get_args(Family)


ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; the fields are Hugging Face's `rope_scaling`.

    `original_max_position` is the context of pre-training that yarn and llama3 extend (for
    dynamic NTK: the length from which the base grows). `attention_factor` None: yarn's default,
    0.1 ln(factor) + 1, or what `mscale` and `mscale_all_dim` give.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        known = isinstance(self.type, str) and self.type in ROPE_TYPES
        require(known, "rope type", self.type, ", ".join(ROPE_TYPES))
        for name, (least, most) in _ROPE_BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                require_number(f"rope {name}", value, least, most)
        require(isinstance(self.truncate, bool), "rope truncate", self.truncate, "true, false")
        original = self.original_max_position
        if original is not None or self.type in ("dynamic", "yarn", "llama3"):
            whole = is_int(original) and original is not None and 1 <= original <= LARGEST_INT
            allowed = f"a length in tokens, from 1 to {LARGEST_INT} (type {self.type} needs it)"
            require(whole, "rope original_max_position", original, allowed)
        if self.type == "llama3":  # the blend between them divides by their distance
            high, low = self.high_freq_factor, self.low_freq_factor
            require(high > low, "rope high_freq_factor", high, f"over low_freq_factor, {low:g}")
        if self.type == "yarn":
            fast, slow = self.beta_fast, self.beta_slow
            require(fast >= slow, "rope beta_fast", fast, f"at least beta_slow, {slow:g}")


# What keeps all frequencies finite in float32, with room around whatever was published.
_ROPE_BOUNDS: dict[str, tuple[float, float]] = {
    "theta": (1.001, 1e30),
    "factor": (1, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "attention_factor": (1e-6, 1e6),
    "mscale": (0, 1e6),
    "mscale_all_dim": (0, 1e6),
}
_OPTIONAL = ("attention_factor", "mscale", "mscale_all_dim")


ROPE_SCALINGS = ("none", "linear", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How to stretch a model's context when it is loaded: `ModelConfig.scaled`.

    type    linear: positions are divided by the factor (position interpolation, arXiv 2306.15595);
            yarn: fast dimensions stay, slow ones are interpolated, and the attention is tempered
            (arXiv 2309.00071); none: the scaling that the checkpoint has is taken away
    factor  the new context over the model's own; > 1, and none has no factor (1)
    """

    type: str
    factor: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.type in ROPE_SCALINGS, "rope scaling type", self.type, ", ".join(ROPE_SCALINGS)
        )
        number = is_number(self.factor) and math.isfinite(self.factor)
        if self.type == "none":
            allowed = number and self.factor == 1
            require(allowed, "rope scaling factor", self.factor, "1, for type none")
        else:
            allowed = number and self.factor > 1
            require(allowed, "rope scaling factor", self.factor, "a number > 1")


_LONGEST = LARGEST_INT
MOST_LAYERS = 10_000  # fifty times the deepest model's; names are made for all of them

# Fields of older versions, which nothing read.
_WRITTEN_ONCE = frozenset({"bos_id"})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder for the Llama family: what differs between families is data here.

    Letters as elsewhere: L num_layers, H num_heads, K num_kv_heads, D head_dim, N vocab_size.
    `max_context` is the longest sequence, in tokens, that the checkpoint says it handles, with the
    RoPE scaling counted. `sliding_window`: positions that the model's attention sees, at least
    `max_context`, so that it never cuts; None: all of them.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_ids: tuple[int, ...] = ()
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        known = isinstance(self.family, str) and self.family in FAMILIES
        require(known, "family", self.family, ", ".join(FAMILIES))
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_context",
        ):
            value = getattr(self, name)
            most = MOST_LAYERS if name == "num_layers" else LARGEST_INT
            inside = is_int(value) and 1 <= value <= most
            require(inside, name, value, f"an integer ≥ 1, at most {most}")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads = {self.num_heads}",
        )
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number")
        require_number("rms_norm_eps", self.rms_norm_eps, 1e-30, 1)
        for name in ("tie_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm"):
            value = getattr(self, name)
            require(isinstance(value, bool), name, value, "true, false")
        ids = self.eos_ids
        whole = isinstance(ids, tuple) and all(is_int(i) and 0 <= i < self.vocab_size for i in ids)
        require(whole, "eos_ids", ids, f"ids from 0 to {self.vocab_size - 1}")
        window = self.sliding_window
        longer = window is None or (is_int(window) and window >= 1)
        require(longer, "sliding_window", window, "null, or an integer ≥ 1")
        if self.rope.type == "dynamic":
            self._check_dynamic()

    def _check_dynamic(self) -> None:
        """The base that dynamic NTK grows to is a float32."""
        require(self.head_dim > 2, "head_dim", self.head_dim, "over 2 for rope type dynamic")
        rope, d = self.rope, self.head_dim
        grown = 1 + rope.factor * self.max_context / (rope.original_max_position or 1)
        base = math.log(rope.theta) + d / (d - 2) * math.log(grown)
        require(base < 87, "rope factor", rope.factor, "less: the base of RoPE is no float32")

    @property
    def original_context(self) -> int:
        """Tokens of context without the RoPE scaling."""
        if self.rope.type == "linear":
            return round(self.max_context / self.rope.factor)
        return self.rope.original_max_position or self.max_context

    def scaled(self, scaling: RopeScaling | None) -> ModelConfig:
        """The same weights with another RoPE scaling; None: as it is.

        The scaling is the whole of it, as in vLLM's `hf_overrides` and with llama.cpp's
        `--rope-scaling`: it begins at the model's own context, keeps θ and has the type's defaults
        beside its factor. On a model that is scaled already, it replaces one of the same type. One
        of another type was trained with or chosen for a reason: `none` first takes it away.

        Raises:
          ValueError: the model has a scaling of another type, or windows that are too short.
        """
        if scaling is None:
            return self
        theta, context = self.rope.theta, self.original_context
        if scaling.type == "none":
            return dataclasses.replace(self, rope=RopeConfig(theta=theta), max_context=context)
        given, own = (f"{rope.type} {rope.factor:g}" for rope in (scaling, self.rope))
        replaceable = self.rope.type in ("default", scaling.type)
        allowed = "none (the model is scaled already, by {own}), or another factor of its own type"
        require(replaceable, "rope scaling", given, allowed.format(own=own))
        longest = int(context * scaling.factor)
        most = min(self.sliding_window or _LONGEST, _LONGEST)
        require(longest <= most, "rope scaling", given, f"at most {most} tokens (not {longest})")
        original = context if scaling.type == "yarn" else None
        rope = RopeConfig(scaling.type, theta, float(scaling.factor), original)
        return dataclasses.replace(self, rope=rope, max_context=longest)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; an unknown key is a ValueError."""
        require(isinstance(data, dict), "model config", data, "an object")
        kept = {key: value for key, value in data.items() if key not in _WRITTEN_ONCE}
        values = fields_of(cls, kept, "model config")
        values["rope"] = RopeConfig(**fields_of(RopeConfig, values.get("rope", {}), "rope"))
        ids = values.get("eos_ids", ())
        require(isinstance(ids, list | tuple), "eos_ids", ids, "a list of token ids")
        values["eos_ids"] = tuple(ids)
        return cls(**values)
