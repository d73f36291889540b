"""Configuration: frozen dataclasses, validated where they are made."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any, Literal

import numpy as np

from quantspec_jax.dtypes import FLOAT32, float_type

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
View = Literal["full", "int8", "int4"]
Mode = Literal["quantspec", "autoregressive"]
Backend = Literal["auto", "mosaic_gpu", "xla"]

FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3")
VIEWS: tuple[View, ...] = ("full", "int8", "int4")
MODES: tuple[Mode, ...] = ("quantspec", "autoregressive")
BACKENDS: tuple[Backend, ...] = ("auto", "mosaic_gpu", "xla")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def require(condition: bool, argument: str, given: Any, allowed: str) -> None:
    """Raise the ValueError that names the argument, what was given and what is allowed."""
    if not condition:
        raise ValueError(f"{argument} is {given!r}; allowed: {allowed}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder for the Llama family: what differs between families is data here.

    Letters as elsewhere: L num_layers, H num_heads, K num_kv_heads, D head_dim, N vocab_size.
    `max_context` is the longest sequence, in tokens, that the checkpoint says it handles, with the
    RoPE scaling counted.
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
    bos_id: int | None = None

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
            require(_is_int(value) and value >= 1, name, value, "an integer ≥ 1")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads = {self.num_heads}",
        )
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; an unknown key is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        require(not unknown, "model config keys", unknown, ", ".join(sorted(known)))
        values = dict(data)
        values["rope"] = RopeConfig(**values["rope"])
        values["eos_ids"] = tuple(values["eos_ids"])
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Shape of a key-value cache.

    Args:
      max_length: T, tokens that the cache can hold for each sequence.
      group_size: G, tokens a quantization group of the keys spans; also the size of each half
        of the full-precision buffer.
      view: what the target reads: `int8` both planes, `int4` the upper plane, `full` no planes.
      pass_width: S, the widest pass that will be appended.
      dtype: of the full-precision tokens.
    """

    max_length: int
    group_size: int = 128
    view: View = "int8"
    pass_width: int = 5
    dtype: np.dtype = FLOAT32

    def __post_init__(self) -> None:
        require(
            _is_int(self.max_length) and self.max_length >= 1,
            "max_length",
            self.max_length,
            "an integer ≥ 1",
        )
        require(
            _is_int(self.group_size) and self.group_size >= 8 and self.group_size % 8 == 0,
            "group_size",
            self.group_size,
            "a multiple of 8",
        )
        require(self.view in VIEWS, "view", self.view, ", ".join(VIEWS))
        object.__setattr__(self, "dtype", float_type(self.dtype))
        require(
            _is_int(self.pass_width) and 1 <= self.pass_width <= self.group_size,
            "pass_width",
            self.pass_width,
            f"1 to group_size = {self.group_size}",
        )

    @property
    def num_tiles(self) -> int:
        """Tiles of `group_size` tokens in the planes; 0 for the full view."""
        return 0 if self.view == "full" else -(-self.max_length // self.group_size)

    @property
    def buffer_length(self) -> int:
        """R, slots of the full-precision buffer: F1 and F2, or every token and a pass beyond."""
        if self.view == "full":
            return self.max_length + self.pass_width
        return 2 * self.group_size


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How one linear layer of the draft is stored.

    Args:
      bits: 4; 8, a second plane of 4 bits that holds what the first one leaves; or 16, the target's
        own weights.
      group_size: input channels that share a scale.
      symmetric: a scale a group only, or a scale and a minimum. (The second plane has scales only.)
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        require(self.bits in (4, 8, 16), "draft bits", self.bits, "4, 8 or 16")
        require(
            _is_int(self.group_size) and self.group_size >= 8 and self.group_size % 8 == 0,
            "draft group_size",
            self.group_size,
            "a multiple of 8",
        )

    def stored_bits(self, kin: int, n: int) -> int:
        """Bits that a [Kin, N] weight takes, scales and minima counted; 16 a weight left alone."""
        if self.bits == 16:
            return 16 * kin * n
        numbers = (1 if self.symmetric else 2) + (self.bits == 8)
        return self.bits * kin * n + 16 * numbers * n * -(-kin // self.group_size)


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """Weights of the draft pass.

    Args:
      bits: 4, 8, or None to draft with the full weights (the 4-bit cache alone).
      group_size: input channels that share a scale.
      symmetric: a scale a group only, or a scale and a minimum.
      layers: which linear layers of the blocks: `all`, `mlp`, or patterns with commas between them,
        such as `layers.*.down,layers.1?.o`.
      method: `rtn` (round to nearest), `gptq` (calibrated on text), or `imported` (the codes of an
        existing 4-bit checkpoint).
      average_bits: mixed precision: each layer of 4 bits gets a format of its own, 4 bits in groups
        of 128 or 64 with or without minima, or 8 bits, so that what rounding costs is least while
        the mean over all linear layers of the blocks, scales counted, is no more than this. Needs
        `gptq`. `group_size` and `symmetric` (then nothing has minima) say where the search starts.
      formats: layers that are stored otherwise than `bits`, `group_size` and `symmetric` say, by
        name (`layers.3.down`): what a mixed-precision search or an import found.
      lm_head_bits: 16: the draft's logits come from the target's lm_head (or tied embedding). 4:
        from a copy of it, rounded to nearest in groups as above; pays off for a large vocabulary.
    """

    bits: int | None = 4
    group_size: int = 64
    symmetric: bool = False
    layers: str = "all"
    method: str = "rtn"
    average_bits: float | None = None
    formats: tuple[tuple[str, WeightFormat], ...] = ()
    lm_head_bits: int = 16

    def __post_init__(self) -> None:
        require(self.bits in (4, 8, None), "draft bits", self.bits, "4, 8 or None")
        require(self.lm_head_bits in (4, 16), "draft lm_head_bits", self.lm_head_bits, "4 or 16")
        WeightFormat(4, self.group_size)
        require(
            isinstance(self.layers, str) and all(self.patterns),
            "draft layers",
            self.layers,
            "all, mlp, or names of layers with * and ?, commas between them",
        )
        methods = ("rtn", "gptq", "imported")
        require(self.method in methods, "draft method", self.method, ", ".join(methods))
        if self.average_bits is not None:
            possible = _is_number(self.average_bits) and 4 < self.average_bits <= 16
            require(possible, "draft average_bits", self.average_bits, "a number over 4, up to 16")
            require(
                self.method == "gptq", "draft method", self.method, "gptq (average_bits is set)"
            )

    @property
    def patterns(self) -> tuple[str, ...]:
        """`layers` as patterns that a layer's name matches or not."""
        if self.layers == "all":
            return ("*",)
        if self.layers == "mlp":
            return ("*.gate", "*.up", "*.down")
        return tuple(pattern.strip() for pattern in self.layers.split(","))

    def format_of(self, layer: str) -> WeightFormat:
        """How the linear layer of this name, such as `layers.3.down`, is stored."""
        for name, stored in self.formats:
            if name == layer:
                return stored
        if self.bits is None or not any(fnmatch.fnmatchcase(layer, p) for p in self.patterns):
            return WeightFormat(16)
        return WeightFormat(self.bits, self.group_size, self.symmetric)

    def describe(self) -> str:
        """One line for people: what the draft's weights are."""
        head = ", lm_head 4-bit" if self.lm_head_bits == 4 else ""
        if self.bits is None:
            return f"full weights{head}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        bits = f"{self.bits}-bit"
        if self.average_bits is not None:
            bits = f"mixed {self.average_bits:g}-bit"
        return f"{bits} {self.method}, {kind}, group {self.group_size}, {self.layers}{head}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` reads back."""
        return dataclasses.asdict(self) | {
            "formats": {name: dataclasses.asdict(stored) for name, stored in self.formats}
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DraftConfig:
        """Inverse of `to_dict`; an unknown key is a TypeError."""
        formats = data.get("formats", {}).items()
        stored = tuple((name, WeightFormat(**values)) for name, values in formats)
        return cls(**{**data, "formats": stored})


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to decode. Defaults as on the command line; `temperature` 0 is greedy.

    `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 mean off. `kv` None: `int8` in mode
    quantspec (where nothing else is allowed), `full` in mode autoregressive. `gamma`: tokens
    drafted a round (mode quantspec alone); "auto": as many in each round, 0 to 7, as pay off at the
    acceptance of late and at `draft_cost`, what a draft step costs over a verification. None: it is
    measured in the first rounds where decoding is greedy, and else taken from the bytes that they
    read, since sampled tokens, but not greedy ones, depend on how many were drafted. `pass_width`:
    rows an autoregressive pass is padded to. `max_length`: tokens the cache is allocated for; None:
    what the prompts and `max_new_tokens` need, rounded up to a bucket. `rounds_per_chunk`: rounds
    decoded on the device between two looks of the host (streaming, stop strings, interruption).
    """

    max_new_tokens: int = 256
    gamma: int | Literal["auto"] = 4
    mode: Mode = "quantspec"
    kv: View | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    pass_width: int = 1
    group_size: int = 128
    max_length: int | None = None
    backend: Backend = "auto"
    rounds_per_chunk: int = 16
    draft_cost: float | None = None

    def __post_init__(self) -> None:
        def positive(name: str) -> None:
            value = getattr(self, name)
            require(_is_int(value) and value >= 1, name, value, "an integer ≥ 1")

        for name in ("max_new_tokens", "pass_width", "rounds_per_chunk"):
            positive(name)
        require(
            self.gamma == "auto" or (_is_int(self.gamma) and 1 <= self.gamma < self.group_size),
            "gamma",
            self.gamma,
            f"an integer from 1 to {self.group_size - 1}, or auto",
        )
        require(
            self.draft_cost is None or (_is_number(self.draft_cost) and self.draft_cost > 0),
            "draft_cost",
            self.draft_cost,
            "a number > 0",
        )
        require(self.mode in MODES, "mode", self.mode, ", ".join(MODES))
        require(self.kv in (None, *VIEWS), "kv", self.kv, ", ".join(VIEWS))
        if self.mode == "quantspec":
            require(self.kv in (None, "int8"), "kv", self.kv, "int8 in mode quantspec (its target)")
            require(
                self.pass_width == 1,
                "pass_width",
                self.pass_width,
                "1 in mode quantspec (γ+1 rows)",
            )
        numbers = {
            "temperature": (lambda v: v >= 0, "a number ≥ 0 (0 is greedy)"),
            "top_p": (lambda v: 0 < v <= 1, "a number in (0, 1]"),
            "min_p": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
            "repetition_penalty": (lambda v: v > 0, "a number > 0"),
        }
        for name, (allowed, words) in numbers.items():
            value = getattr(self, name)
            finite = _is_number(value) and value == value and value not in (float("inf"),)
            require(finite and allowed(value), name, value, words)
        require(_is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "an integer ≥ 0")
        require(self.backend in BACKENDS, "backend", self.backend, ", ".join(BACKENDS))
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        require(all(isinstance(s, str) and s for s in stop), "stop", self.stop, "non-empty strings")
        object.__setattr__(self, "stop", stop)

    @property
    def target_view(self) -> View:
        """What the target reads of the cache."""
        return self.kv or ("int8" if self.mode == "quantspec" else "full")
