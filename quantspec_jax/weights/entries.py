"""The draft's own entries of the parameter tree, and the tree that a draft step reads."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.layout import QuantizedWeight, can_tile, tile
from quantspec_jax.dtypes import BFLOAT16
from quantspec_jax.models.parameters import LINEAR_LAYERS, nest
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.rounding import quantize_linear
from quantspec_jax.weights.sizes import lm_head_format


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
    return {"lm_head": quantize_linear(kernel, lm_head_format(config))}


def with_first(params: dict[str, Any], own: dict[str, Any], config: DraftConfig) -> dict[str, Any]:
    """`own` with the target's lm_head for the first R tokens, [R, E] as an embedding, where the
    draft takes their logits from these; of a smaller vocabulary, for all."""
    if config.lm_head_first == 0:
        return own
    count = config.lm_head_first
    tied = "lm_head" not in params
    first = params["embedding"][:count] if tied else params["lm_head"]["kernel"][:, :count].T
    return own | {"lm_head": own["lm_head"] | {"first": first}}


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
