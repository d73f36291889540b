"""Packed int32 weights in safetensors, GPTQ's and AWQ's, as a draft's weights.

    GPTQ   qweight int32 [Kin/8, N]      a word: 8 input channels, the lowest bits first
           qzeros  int32 [groups, N/8]   a word: 8 outputs; zero point − 1, unless the checkpoint's
                                         format is gptq_v2
           scales  [groups, N]           g_idx int32 [Kin]: the group of each input channel
    AWQ    qweight int32 [Kin, N/8]      a word: 8 outputs, in the order of `AWQ_ORDER`
           qzeros  int32 [groups, N/8]   in the same order, zero points as they are
           scales  [groups, N]

AWQ scales input channels before it quantizes, and undoes that in what comes before: in the norms,
which the draft therefore takes from the checkpoint; in `up`, which it takes too; and, in some
models, in `v`, which the draft cannot take so, because its values go beside the target's in one
cache. There v is scaled back, and o, whose input channels share groups, rounded to 8 bits.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.drafts.codes import (
    MORE_BITS,
    Codes,
    QuantizedCheckpoint,
    check_finite,
    restore,
    stored_group,
)
from convert.files.safetensors import read_directory, read_safetensors
from convert.files.tensors import FLOATS, StoredTensor
from convert.hf_config import parse_hf_config
from convert.weights import derivable, hf_name, with_prefix
from pallas_kernels.layout import QuantizedWeight
from quantspec_jax.checks import LARGEST_INT, is_int, require
from quantspec_jax.files import read_json
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import LINEAR_LAYERS, linear_layers, parameter_shapes
from quantspec_jax.settings import Settings
from quantspec_jax.weights.formats import WeightFormat
from quantspec_jax.weights.rounding import quantize_linear

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class PackedSafetensors(QuantizedCheckpoint):
    """A directory with packed int32 weights and a quantization config.

    `group_size`: input channels a scale; −1 in the config: all of them.
    """

    def __init__(self, source: str, directory: Path, config: ModelConfig, quantization: Settings):
        values = read_json(directory / "config.json")
        values.pop("quantization_config", None)
        own = parse_hf_config(values, where=str(directory / "config.json"))
        super().__init__(source, config, own)
        self.quantization = quantization
        bits = _first(quantization, "bits", "w_bit")
        require(is_int(bits) and bits == 4, f"bits in {source}", bits, "4")
        group = _first(quantization, "group_size", "q_group_size")
        whole = is_int(group) and (group == -1 or (0 < group <= LARGEST_INT and group % 8 == 0))
        require(whole, f"group_size in {source}", group, "a multiple of 8, or −1")
        self.group_size: int = group
        self.tensors = _packed_tensors(directory, own)
        self._shapes = parameter_shapes(config)
        for layer in linear_layers(config):
            self.check_tensors(layer)
        if not any(map(self.is_packed, linear_layers(config))):
            raise ValueError(f"draft_from is {source!r}, which has no packed layers (qweight)")

    def group_of(self, layer: str) -> int:
        """Input channels that share a scale in a layer; all of them: with the rest of 128."""
        kin = self._shapes[f"{layer}.kernel"].shape[0]
        return self.group_size if self.group_size > 0 else -(-kin // 128) * 128

    def tensor(self, layer: str, part: str) -> StoredTensor | None:
        return self.tensors.get(hf_name(f"{layer}.kernel").removesuffix("weight") + part)

    def is_packed(self, layer: str) -> bool:
        return self.tensor(layer, "qweight") is not None

    @abstractmethod
    def packed_shape(self, kin: int, n: int) -> tuple[int, int]:
        """Of qweight."""

    def check_tensors(self, layer: str) -> None:
        """ValueError where a tensor of a linear layer is missing, or has another shape or type."""
        kin, n = self._shapes[f"{layer}.kernel"].shape
        groups = -(-kin // self.group_of(layer))
        whole = kin % 8 == 0 and n % 8 == 0
        require(whole, f"{layer} in {self.source}", [kin, n], "multiples of 8")
        wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "qweight": (self.packed_shape(kin, n), ("I32",)),
            "qzeros": ((groups, n // 8), ("I32",)),
            "scales": ((groups, n), tuple(FLOATS)),
        }
        if not self.is_packed(layer) and self.tensor(layer, "weight") is not None:
            wanted = {"weight": ((n, kin), tuple(FLOATS))}
        elif self.tensor(layer, "g_idx") is not None:
            wanted["g_idx"] = ((kin,), ("I32",))
        for part, (shape, kinds) in wanted.items():
            tensor = self.tensor(layer, part)
            name = hf_name(f"{layer}.kernel").removesuffix("weight") + part
            if tensor is None:
                raise ValueError(f"draft_from is {self.source!r}: missing tensor {name}")
            if tensor.kind not in kinds or tensor.shape != shape:
                raise ValueError(
                    f"draft_from is {self.source!r}: tensor {name} is {tensor.kind} "
                    f"{list(tensor.shape)} (expected {' or '.join(kinds)} {list(shape)})"
                )

    def format_of(self, layer: str) -> WeightFormat:
        if not self.is_packed(layer):
            return MORE_BITS
        return WeightFormat(4, stored_group(self.group_of(layer)))

    def array(self, layer: str, part: str) -> np.ndarray:
        """A tensor of a layer; scales in float32, and checked."""
        tensor = self.tensor(layer, part)
        assert tensor is not None
        values = tensor.read()
        if tensor.kind in FLOATS:
            values = values.astype(np.float32)
            check_finite(tensor, values)
        return values

    def codes(
        self, layer: str, codes: np.ndarray, zeros: np.ndarray, order: np.ndarray | None = None
    ) -> Codes:
        """Symmetric where every zero point is 8; else minimum = −scale · zero."""
        scale = self.array(layer, "scales")
        minimum = None if (zeros == 8).all() else -scale * zeros
        return Codes(codes, scale, minimum, self.group_of(layer), order)


class Gptq(PackedSafetensors):
    """AutoGPTQ's and GPTQModel's packing."""

    def __init__(self, source: str, directory: Path, config: ModelConfig, quantization: Settings):
        form = _first(quantization, "checkpoint_format", "format") or "gptq"
        known = form in ("gptq", "gptq_v2")
        require(known, f"checkpoint_format in {source}", form, "gptq, gptq_v2")
        self._zero_offset = 1 if form == "gptq" else 0
        super().__init__(source, directory, config, quantization)

    def packed_shape(self, kin: int, n: int) -> tuple[int, int]:
        return kin // 8, n

    def read(self, layer: str) -> Codes | None:
        if not self.is_packed(layer):
            return None
        words = self.array(layer, "qweight")
        kin = 8 * len(words)
        codes = _unpacked(words).transpose(0, 2, 1).reshape(kin, -1)
        zeros = _unpacked(self.array(layer, "qzeros")).reshape(-1, codes.shape[1])
        order = self._order(layer, kin)
        zeros = (zeros + self._zero_offset) & 15
        return self.codes(layer, codes if order is None else codes[order], zeros, order)

    def _order(self, layer: str, kin: int) -> np.ndarray | None:
        """Input channels sorted by their group; None where they lie so already."""
        if self.tensor(layer, "g_idx") is None or self.group_size < 0:
            return None
        group = self.array(layer, "g_idx")
        order = np.argsort(group, kind="stable").astype(np.int32)
        if not np.array_equal(group[order], np.arange(kin) // self.group_of(layer)):
            raise ValueError(f"draft_from is {self.source!r}: g_idx of {layer} does not deal the "
                             f"channels to groups of {self.group_size}")  # fmt: skip
        return None if np.array_equal(order, np.arange(kin)) else order


class Awq(PackedSafetensors):
    """AutoAWQ's packing for its `gemm` kernels."""

    def __init__(self, source: str, directory: Path, config: ModelConfig, quantization: Settings):
        form = str(_first(quantization, "version", "format", "checkpoint_format") or "gemm")
        require(form.lower() == "gemm", f"version in {source}", form, "gemm")
        super().__init__(source, directory, config, quantization)
        for layer in linear_layers(config):
            if not self.is_packed(layer):
                raise ValueError(
                    f"draft_from is {source!r}, which leaves {layer} unpacked; allowed: AWQ in "
                    "all linear layers of the blocks"
                )
        for path, spec in self._shapes.items():
            scaled = path.endswith(("attention_norm", "mlp_norm", "up.bias"))
            tensor = self.tensors.get(hf_name(path))
            fits = tensor is not None and tensor.kind in FLOATS and tensor.shape == spec.shape
            if scaled and not fits:
                raise ValueError(
                    f"draft_from is {source!r}: missing or misshapen tensor {hf_name(path)}"
                )

    def packed_shape(self, kin: int, n: int) -> tuple[int, int]:
        return kin, n // 8

    def read(self, layer: str) -> Codes:
        n = self._shapes[f"{layer}.kernel"].shape[1]
        codes, zeros = (
            _unpacked(self.array(layer, part))[..., np.argsort(AWQ_ORDER)].reshape(-1, n)
            for part in ("qweight", "qzeros")
        )
        return self.codes(layer, codes, zeros)

    def _vector(self, path: str) -> np.ndarray:
        tensor = self.tensors[hf_name(path)]
        values = tensor.read().astype(np.float32)
        check_finite(tensor, values)
        return values

    def block(self, i: int, target: Mapping[str, Any]) -> dict[str, Any]:
        """As the base class; the target's weights are scaled first as the checkpoint's are."""
        found: dict[str, Any] = {}
        scaling: dict[str, jax.Array] = {}
        for norm, names in (("attention_norm", "qkv"), ("mlp_norm", ("gate", "up"))):
            own = jnp.asarray(self._vector(f"layers.{i}.{norm}"))
            found[norm] = own.astype(target[norm].dtype)
            whole = target[norm].astype(jnp.float32)
            ratio = jnp.where(own == 0, 1, whole / jnp.where(own == 0, 1, own))
            scaling |= dict.fromkeys(names, ratio[:, None])
        for name in LINEAR_LAYERS:
            layer = f"layers.{i}.{name}"
            weight = self.read(layer).weight()
            # What is left of the scaling: of v's and up's outputs, of o's and down's inputs.
            axis = {"v": 0, "up": 0, "o": 1, "down": 1}.get(name)
            scaled = _input_scaled(target[name]["kernel"], scaling.get(name, jnp.ones(())))
            restored, factor = _fit(weight, scaled, axis)
            self.check_same(layer, restored, scaled)
            parts: dict[str, Any] = {"kernel": weight}
            if name == "v" and _scales(factor):
                parts = {"kernel": _output_scaled(weight, factor)}
            elif name == "o" and _scales(factor):
                parts = dict(quantize_linear(restored, MORE_BITS))
            found |= {f"{name}.{part}": array for part, array in parts.items()}
        if self.config.mlp_bias:
            found["up.bias"] = jnp.asarray(self._vector(f"layers.{i}.up.bias"))
        return found


@jax.jit
def _input_scaled(kernel: jax.Array, scaling: jax.Array) -> jax.Array:
    return kernel.astype(jnp.float32) * scaling


@functools.partial(jax.jit, static_argnums=2)
def _fit(weight: QuantizedWeight, kernel: jax.Array, axis: int | None) -> tuple[jax.Array, ...]:
    """The dequantized weight times the factors, one a slice along `axis`, that bring it closest to
    `kernel`; and the factors. None: as it is."""
    restored = restore(weight, kernel)
    if axis is None:
        return restored, jnp.ones(())
    product, square = (jnp.sum(restored * x, axis, keepdims=True) for x in (kernel, restored))
    factor = jnp.where(square > 0, product / jnp.where(square > 0, square, 1), 1)
    return restored * factor, factor


def _scales(factor: jax.Array) -> bool:
    """Whether factors are more than what fitting to rounded weights makes of ones (about 1%)."""
    return bool(np.median(np.abs(np.asarray(factor) - 1)) > 0.05)


@jax.jit
def _output_scaled(weight: QuantizedWeight, factor: jax.Array) -> QuantizedWeight:
    """Outputs times `factor` [1, N]."""

    def times(x: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) * factor).astype(x.dtype)

    minimum = None if weight.minimum is None else times(weight.minimum)
    return QuantizedWeight(weight.packed, times(weight.scale), minimum)


def _unpacked(words: np.ndarray) -> np.ndarray:
    """int32 [..., M] → uint8 [..., M, 8], the lowest four bits first."""
    shifts = 4 * np.arange(8, dtype=np.uint32)
    return ((words.view(np.uint32)[..., None] >> shifts) & 15).astype(np.uint8)


def _first(values: Settings, *keys: str) -> Any:
    return next((v for key in keys if (v := values.get(key, None)) is not None), None)


def _packed_tensors(directory: Path, config: ModelConfig) -> Mapping[str, StoredTensor]:
    """Of the usual files, or of the only one with another name, such as gptq_model-4bit-128g."""
    files = list(directory.glob("*.safetensors"))
    indexed = any(directory.glob("*.safetensors.index.json"))
    if len(files) == 1 and not indexed:
        return with_prefix(read_safetensors(files[0]))
    return with_prefix(read_directory(directory, derivable(config)))
