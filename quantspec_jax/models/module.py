"""The Flax module that owns the parameters, with their logical axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import Params, nest, parameter_shapes


class Decoder(nnx.Module):
    """The parameters of a decoder, made at random: normal with standard deviation 0.02, norms 1,
    biases 0 (to load a checkpoint, only the tree matters)."""

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        tree = nest(
            {
                path: nnx.Param(
                    initial(path, spec.shape, dtype, rngs.params),
                    out_sharding=spec.axes,
                    eager_sharding=False,
                )
                for path, spec in parameter_shapes(config).items()
            }
        )
        for name, node in tree.items():
            setattr(self, name, _as_module(node))


def initial(
    path: str, shape: tuple[int, ...], dtype: Any, key: Callable[[], jax.Array]
) -> jax.Array:
    """The parameter of this path, or of its last part; `key` where it is random."""
    if path.endswith("norm"):
        return jnp.ones(shape, dtype)
    if path.endswith("bias"):
        return jnp.zeros(shape, dtype)
    return 0.02 * jax.random.normal(key(), shape, dtype)


def _as_module(node: Any) -> Any:
    if isinstance(node, dict):
        return nnx.Dict({name: _as_module(child) for name, child in node.items()})
    return node


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters as a tree of plain arrays, made on the device one at a time."""
    state = nnx.split(Decoder(config, dtype=dtype, rngs=nnx.Rngs(params=key)))[1]
    return nest({".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)})


def logical_axes(config: ModelConfig) -> Params:
    """The tree of parameters with a tuple of logical axis names in place of each array."""
    return nest({path: spec.axes for path, spec in parameter_shapes(config).items()})
