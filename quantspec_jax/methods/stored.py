"""What AQUA-KV has learned, as it is stored with a checkpoint (`quantspec_jax.stored_kv`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.checks import require
from quantspec_jax.methods.aqua import Predictors
from quantspec_jax.methods.method import channels
from quantspec_jax.models.config import ModelConfig


def shapes(config: ModelConfig) -> dict[str, Any]:
    """Of the arrays, by layer and name: predictors, of the first layer the means, float16."""
    n = channels(config)

    def layer(inputs: int) -> dict[str, Any]:
        sizes = (inputs + 1, 2 * inputs + 1)
        of_keys, of_values = (jax.ShapeDtypeStruct((m, n), jnp.float16) for m in sizes)
        return {"of_keys": of_keys, "of_values": of_values}

    return {str(i): layer(n if i else 0) for i in range(config.num_layers)}


def check_model(config: ModelConfig) -> None:
    """Raises where there is nothing to predict from."""
    require(config.num_layers > 1, "--kv", "aqua of a model of one layer", "two layers or more")


def to_arrays(learned: list[Any]) -> dict[str, Any]:
    """What `Aqua` learned → the tree of `shapes`."""
    return {
        str(i): {name: x.astype(jnp.float16) for name, x in one._asdict().items()}
        for i, one in enumerate(learned)
    }


def from_arrays(arrays: dict[str, Any], config: ModelConfig) -> list[Any]:
    """Inverse of `to_arrays`."""
    layers = (arrays[str(i)] for i in range(config.num_layers))
    return [*(Predictors(**{k: x.astype(jnp.float32) for k, x in a.items()}) for a in layers)]
