"""Weights of the draft: 4-bit groups, packed, sharing everything else with the target."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.layout import QuantizedWeight, pack
from quantspec_jax.config import DraftConfig, ModelConfig
from quantspec_jax.models.parameters import LINEAR_LAYERS, Spec, parameter_shapes

MLP_LAYERS = ("gate", "up", "down")


def quantized_layers(config: DraftConfig) -> tuple[str, ...]:
    """Names of the linear layers of a block that the draft holds in 4 bits."""
    if config.bits is None:
        return ()
    return MLP_LAYERS if config.layers == "mlp" else LINEAR_LAYERS


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


_quantize_weight = jax.jit(quantize_weight, static_argnums=(1, 2))


def quantize_params(params: dict[str, Any], config: DraftConfig) -> dict[str, Any]:
    """The draft's own entries of the tree: {"layers": {i: {name: {"kernel": QuantizedWeight}}}}."""
    names = quantized_layers(config)
    if not names:
        return {}
    return {
        "layers": {
            i: {
                name: {
                    "kernel": _quantize_weight(
                        block[name]["kernel"], config.group_size, config.symmetric
                    )
                }
                for name in names
            }
            for i, block in params["layers"].items()
        }
    }


def merge(params: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The draft's whole tree: `own` where it has an entry, else the target's array itself."""
    return {
        name: merge(node, own.get(name, {})) if isinstance(node, dict) else own.get(name, node)
        for name, node in params.items()
    }


def bits_per_weight(model: ModelConfig, config: DraftConfig) -> float:
    """Mean bits over all linear layers of the blocks; layers left alone count 16, scales and minima
    count."""
    names = quantized_layers(config)
    bits = count = 0.0
    for path, spec in parameter_shapes(model).items():
        if not (path.startswith("layers.") and path.endswith(".kernel")):
            continue
        weights = spec.size
        if path.split(".")[2] in names:
            bits += _quantized_bits(spec, config)
        else:
            bits += 16 * weights
        count += weights
    return bits / count


def _quantized_bits(spec: Spec, config: DraftConfig) -> int:
    kin, n = spec.shape
    groups = -(-kin // config.group_size)
    return 4 * kin * n + groups * n * 16 * (1 if config.symmetric else 2)


def draft_bytes(model: ModelConfig, config: DraftConfig) -> int:
    """Bytes of the draft's own arrays."""
    names = quantized_layers(config)
    total = 0
    for path, spec in parameter_shapes(model).items():
        parts = path.split(".")
        if parts[0] == "layers" and parts[-1] == "kernel" and parts[2] in names:
            kin, n = spec.shape
            groups = -(-kin // config.group_size)
            total += groups * n * (config.group_size // 2 + (2 if config.symmetric else 4))
    return total
