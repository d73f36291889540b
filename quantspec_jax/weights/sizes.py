"""Which format each layer of a draft has, and what it takes."""

from __future__ import annotations

import fnmatch

from quantspec_jax.checks import require
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import linear_layers, parameter_shapes
from quantspec_jax.weights.formats import DraftConfig, WeightFormat


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


def lm_head_format(config: DraftConfig) -> WeightFormat:
    return WeightFormat(4, config.group_size, config.symmetric)


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
        weights.append(((model.hidden_size, model.vocab_size), lm_head_format(config)))
    total = 0
    for (kin, n), stored in weights:
        filled = -(-kin // stored.group_size) * stored.group_size
        total += stored.stored_bits(filled, n) // 8
    return total
