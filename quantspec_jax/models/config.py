"""What a model is: architecture and rotary embedding, as data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from quantspec_jax.checks import is_int, is_number, require

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
        require(self.type in ROPE_TYPES, "rope type", self.type, ", ".join(ROPE_TYPES))
        require(self.theta > 0, "rope theta", self.theta, "a positive number")
        require(self.factor >= 1, "rope factor", self.factor, "a number ≥ 1")
        if self.type in ("dynamic", "yarn", "llama3"):
            require(
                self.original_max_position is not None,
                "rope original_max_position",
                None,
                f"a length in tokens (type {self.type} needs it)",
            )


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


_LONGEST = 2**31 - 1  # positions are int32

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
        require(self.family in FAMILIES, "family", self.family, ", ".join(FAMILIES))
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
            require(is_int(value) and value >= 1, name, value, "an integer ≥ 1")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads = {self.num_heads}",
        )
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number")

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
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key not in _WRITTEN_ONCE}
        unknown = sorted(set(values) - known)
        require(not unknown, "model config keys", unknown, ", ".join(sorted(known)))
        values["rope"] = RopeConfig(**values["rope"])
        values["eos_ids"] = tuple(values["eos_ids"])
        return cls(**values)
