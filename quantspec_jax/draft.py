"""Weights of the draft: 4-bit groups, packed, sharing everything else with the target."""

from __future__ import annotations

import fnmatch
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.int4_matmul.reference import dequantize
from pallas_kernels.layout import QuantizedWeight, can_tile, pack, tile
from quantspec_jax.config import DraftConfig, ModelConfig, WeightFormat, require
from quantspec_jax.dtypes import BFLOAT16
from quantspec_jax.models.parameters import LINEAR_LAYERS, linear_layers, nest, parameter_shapes


def layer_formats(model: ModelConfig, config: DraftConfig) -> dict[str, WeightFormat]:
    """How the draft stores each linear layer of the blocks, by name (`layers.3.down`).

    Raises:
      ValueError: a pattern of `config.layers`, or a name in `config.formats`, fits no layer.
    """
    names = linear_layers(model)
    for pattern in config.patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"draft layers is {config.layers!r}: {pattern!r} fits no layer; names "
                             f"are {names[0]} to {names[-1]}")  # fmt: skip
    for name, _ in config.formats:
        require(name in names, "draft formats", name, f"{names[0]} to {names[-1]}")
    return {name: config.format_of(name) for name in names}


def quantize_weight(kernel: jax.Array, group_size: int, symmetric: bool) -> QuantizedWeight:
    """[Kin, N] → 4-bit groups of `group_size` input channels, rounded to nearest.

    Symmetric: the weight of the largest magnitude has code −8 whatever its sign, so all sixteen
    codes are used and the scale may be negative. Scale and minimum are rounded to bf16 first and
    the codes computed against what is stored. Where `group_size` does not divide Kin the last group
    is shorter, and filled up with unused codes.
    """
    kin, n = kernel.shape
    groups = -(-kin // group_size)
    rows = jnp.arange(groups * group_size).reshape(groups, group_size, 1)
    w = jnp.pad(kernel.astype(jnp.float32), ((0, groups * group_size - kin), (0, 0)))
    w = w.reshape(groups, group_size, n)
    if symmetric:
        low, high = jnp.min(w, 1), jnp.max(w, 1)
        scale = (jnp.where(high > -low, high, low) / -8).astype(jnp.bfloat16)
        codes = jnp.round(w / _nonzero(scale)[:, None])
        return QuantizedWeight(_pack(codes), scale, None)
    low = jnp.min(w, 1, initial=jnp.inf, where=rows < kin)
    high = jnp.max(w, 1, initial=-jnp.inf, where=rows < kin)
    minimum = low.astype(jnp.bfloat16)
    scale = ((high - minimum.astype(jnp.float32)) / 15).astype(jnp.bfloat16)
    codes = jnp.round((w - minimum.astype(jnp.float32)[:, None]) / _nonzero(scale)[:, None]) - 8
    return QuantizedWeight(_pack(codes), scale, minimum)


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale != 0, scale, 1).astype(jnp.float32)


def _pack(codes: jax.Array) -> jax.Array:
    return pack(jnp.clip(codes, -8, 7).astype(jnp.int8))


@partial(jax.jit, static_argnums=1)
def quantize_linear(kernel: jax.Array, stored: WeightFormat) -> dict[str, QuantizedWeight]:
    """[Kin, N] → the entries of one linear layer in 4 or 8 bits, rounded to nearest: `kernel`, and
    for 8 bits `residual`, the codes of what `kernel` leaves. Their products add up."""
    upper = quantize_weight(kernel, stored.group_size, stored.symmetric)
    if stored.bits == 4:
        return {"kernel": upper}
    rest = kernel.astype(jnp.float32) - dequantize(upper)[: kernel.shape[0]]
    return {"kernel": upper, "residual": quantize_weight(rest, stored.group_size, True)}


def quantize_params(params: dict[str, Any], config: DraftConfig) -> dict[str, Any]:
    """The draft's own entries of the tree: {"layers": {i: {name: `quantize_linear`}}}."""
    entries = {}
    for i, block in params["layers"].items():
        for name in LINEAR_LAYERS:
            layer = f"layers.{i}.{name}"
            stored = config.format_of(layer)
            if stored.bits != 16:
                for part, weight in quantize_linear(block[name]["kernel"], stored).items():
                    entries[f"{layer}.{part}"] = weight
    return nest(entries) | quantize_lm_head(params, config)


def quantize_lm_head(params: dict[str, Any], config: DraftConfig) -> dict[str, Any]:
    """The draft's own lm_head, {"lm_head": {"kernel": 4-bit groups}}, or {} where it has none."""
    if config.lm_head_bits == 16:
        return {}
    kernel = params["lm_head"]["kernel"] if "lm_head" in params else params["embedding"].T
    return {"lm_head": quantize_linear(kernel, _lm_head_format(config))}


def _lm_head_format(config: DraftConfig) -> WeightFormat:
    return WeightFormat(4, config.group_size, config.symmetric)


def draft_tree(params: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The draft's whole tree, ready for the default device: `own` where it has an entry, arranged
    as the device's kernels read it, else the target's array itself.

    The one way from the draft's own entries to what a draft step takes.
    """
    return merge(params, _arranged(own, params["embedding"].dtype))


def _arranged(own: dict[str, Any], activations: np.dtype) -> dict[str, Any]:
    """4-bit weights tiled where the product's kernel takes them with such activations, all else as
    it is."""
    if dispatch.device() is None or activations != BFLOAT16:
        return own

    def tiled(leaf: Any) -> Any:
        return _tile(leaf) if isinstance(leaf, QuantizedWeight) and can_tile(leaf) else leaf

    return jax.tree.map(tiled, own, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))


_tile = jax.jit(tile)


def merge(params: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The draft's whole tree: `own` where it has an entry, else the target's array itself."""
    merged = dict(params)
    for name, node in own.items():
        merged[name] = merge(params.get(name, {}), node) if isinstance(node, dict) else node
    return merged


def bits_per_weight(model: ModelConfig, config: DraftConfig) -> float:
    """Mean bits over all linear layers of the blocks; layers left alone count 16, scales and minima
    count."""
    shapes = parameter_shapes(model)
    bits = weights = 0
    for layer, stored in layer_formats(model, config).items():
        spec = shapes[f"{layer}.kernel"]
        bits += stored.stored_bits(*spec.shape)
        weights += spec.size
    return bits / weights


def draft_bytes(model: ModelConfig, config: DraftConfig) -> int:
    """Bytes of the draft's own arrays."""
    shapes = parameter_shapes(model)
    weights = [
        (shapes[f"{layer}.kernel"].shape, stored)
        for layer, stored in layer_formats(model, config).items()
        if stored.bits != 16
    ]
    if config.lm_head_bits == 4:
        weights.append(((model.hidden_size, model.vocab_size), _lm_head_format(config)))
    total = 0
    for (kin, n), stored in weights:
        filled = -(-kin // stored.group_size) * stored.group_size
        total += stored.stored_bits(filled, n) // 8
    return total
