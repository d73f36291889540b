"""What 4-bit checkpoints have in common: codes → packed weights, checked against the target's.

Codes are carried over exactly, scales and minima rounded to bfloat16 (by 2⁻⁸ of their size at
most). Layers that the checkpoint holds in more than 4 bits get 8, rounded to nearest from the
target's own weights.
"""

from __future__ import annotations

import collections
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from convert.files.tensors import StoredTensor
from pallas_kernels.int4_matmul.xla import dequantize
from pallas_kernels.layout import QuantizedWeight, pack
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import LINEAR_LAYERS, flatten, linear_layers, nest
from quantspec_jax.sharding import mesh_of, place_params
from quantspec_jax.weights.formats import DraftConfig, WeightFormat
from quantspec_jax.weights.rounding import quantize_linear

MORE_BITS = WeightFormat(8, 64)  # of layers that are not in 4 bits
MOST_ERROR = 0.5  # 4 bits cost about 0.1, another model's weights are off by more than 1
_SAME = (
    "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Codes:
    """A [Kin, N] weight, w = minimum + scale · code, or scale · (code − 8) without a minimum.

    codes    uint8 [Kin, N], 0..15
    scale    float32 [⌈Kin/group_size⌉, N]
    minimum  float32, alike, or None
    order    int32 [Kin] or None: row i multiplies input channel order[i]
    """

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None
    group_size: int
    order: np.ndarray | None = None

    def weight(self) -> QuantizedWeight:
        """Packed. A group larger than the kernels' becomes several of the same scale."""
        kin, n = self.codes.shape
        group = stored_group(self.group_size)
        groups = -(-kin // group)

        def repeated(x: np.ndarray) -> np.ndarray:
            return np.repeat(x, self.group_size // group, 0)[:groups]

        scale = self.scale.astype(ml_dtypes.bfloat16)
        minimum = None
        if self.minimum is not None:  # what rounding the scale costs is least in the middle
            exact = self.minimum + 7.5 * (self.scale - scale.astype(np.float32))
            minimum = jnp.asarray(repeated(exact.astype(ml_dtypes.bfloat16)))
        codes = np.full((groups * group, n), 8, np.uint8)
        codes[:kin] = self.codes
        packed = _pack((codes.reshape(groups, group, n) - 8).view(np.int8))
        return QuantizedWeight(packed, jnp.asarray(repeated(scale)), minimum)


_pack = jax.jit(pack)


def stored_group(group_size: int) -> int:
    """The group of the draft for a checkpoint's: what the kernels take, where it divides."""
    return next((g for g in (128, 64, 32) if group_size % g == 0), group_size)


class QuantizedCheckpoint(ABC):
    """A 4-bit checkpoint that fits the target by its headers."""

    def __init__(self, source: str, config: ModelConfig, own: ModelConfig):
        self.source, self.config = source, config
        for name in _SAME:
            ours, theirs = getattr(config, name), getattr(own, name)
            if ours != theirs:
                raise ValueError(f"draft_from is {source!r}, a checkpoint of another model: its "
                                 f"{name} is {theirs}, the model's is {ours}")  # fmt: skip

    @abstractmethod
    def format_of(self, layer: str) -> WeightFormat:
        """How a linear layer (`layers.3.down`) will be stored, by the headers."""

    @abstractmethod
    def read(self, layer: str) -> Codes | None:
        """A linear layer's codes; None where it has more than 4 bits."""

    def draft_config(self) -> DraftConfig:
        """The draft's, by the headers (a minimum may turn out to be none)."""
        return draft_config({layer: self.format_of(layer) for layer in linear_layers(self.config)})

    def load(
        self, params: Mapping[str, Any], *, progress: bool = False
    ) -> tuple[DraftConfig, dict[str, Any]]:
        """Reads and checks all layers against the target's weights.

        Args:
          params: the target's tree.
          progress: a progress bar on standard error.

        Returns:
          The draft's configuration, and its own entries of the tree.

        Raises:
          ValueError: another model's weights, or a damaged file.
        """
        blocks = range(self.config.num_layers)
        entries: dict[str, Any] = {}
        for i in tqdm(blocks, desc="importing the draft", unit="layer", disable=not progress):
            block = self.block(i, params["layers"][str(i)])
            flat = {f"layers.{i}.{path}": array for path, array in block.items()}
            entries |= flatten(place_params(self.config, nest(flat), mesh_of(dict(params))))
        return self.found_config(entries), nest(entries)

    def found_config(self, entries: Mapping[str, Any]) -> DraftConfig:
        """The draft's, by its entries of the tree by path, or their shapes."""
        return draft_config({name: _format(entries, name) for name in linear_layers(self.config)})

    def block(self, i: int, target: Mapping[str, Any]) -> dict[str, Any]:
        """The draft's arrays of one block by their path in it, checked against the target's."""
        found: dict[str, Any] = {}
        for name in LINEAR_LAYERS:
            layer, kernel = f"layers.{i}.{name}", target[name]["kernel"]
            codes = self.read(layer)
            if codes is None:
                parts: dict[str, Any] = dict(quantize_linear(kernel, MORE_BITS))
            else:
                parts = {"kernel": codes.weight()}
                if codes.order is not None:
                    parts["order"] = jnp.asarray(codes.order)
                    kernel = kernel[parts["order"]]
                self.check_same(layer, restore(parts["kernel"], kernel), kernel)
            found |= {f"{name}.{part}": array for part, array in parts.items()}
        return found

    def check_same(self, layer: str, restored: jax.Array, kernel: jax.Array) -> None:
        """ValueError where the weights are not the target's, rounded."""
        error = float(_relative_error(restored, kernel))
        if not error <= MOST_ERROR:
            raise ValueError(f"draft_from is {self.source!r}, a checkpoint of another model: its "
                             f"weights in {layer} are off by {error:.0%} (4 bits cost about "
                             "10%)")  # fmt: skip


def _format(entries: Mapping[str, Any], layer: str) -> WeightFormat:
    kernel = entries[f"{layer}.kernel"]
    bits = 8 if f"{layer}.residual" in entries else 4
    return WeightFormat(bits, kernel.group_size, kernel.minimum is None)


def draft_config(formats: Mapping[str, WeightFormat]) -> DraftConfig:
    """An imported draft's: the most common 4-bit format, and the layers that have another one."""
    common = collections.Counter(f for f in formats.values() if f.bits == 4).most_common(1)[0][0]
    others = tuple((layer, f) for layer, f in formats.items() if f != common)
    return DraftConfig(
        4, common.group_size, common.symmetric, method="imported", formats=others
    )  # fmt: skip


@jax.jit
def restore(weight: QuantizedWeight, kernel: jax.Array) -> jax.Array:
    """float32 [Kin, N], the shape of `kernel`."""
    return dequantize(weight)[: kernel.shape[0]]


@jax.jit
def _relative_error(restored: jax.Array, kernel: jax.Array) -> jax.Array:
    """‖restored − kernel‖ / ‖kernel‖; 0 where both are 0."""
    kernel = kernel.astype(jnp.float32)
    off, size = jnp.linalg.norm(restored - kernel), jnp.linalg.norm(kernel)
    return jnp.where(off == 0, 0, off / size)


def check_finite(tensor: StoredTensor, *arrays: np.ndarray) -> None:
    """ValueError, naming the tensor, where a scale or minimum is not finite."""
    if not all(np.isfinite(values).all() for values in arrays):
        raise ValueError(f"{tensor.file}: tensor {tensor.name} has a NaN or infinite scale")
