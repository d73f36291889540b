"""Where arrays lie on a mesh of devices: logical axes → axes of the mesh, by rules.

    tp  heads, the MLP's channels, the vocabulary    parameters, cache
    cp  tiles of the planes: the context             cache
    dp  sequences                                    cache, the rest of the state

A mesh has any of these axes; all other dimensions lie whole on each device. A packed weight is
split by whole groups of input channels and whole outputs, a tiled one by whole strips. On a mesh of
one device arrays lie as they do without a mesh, so that programs are compiled as without one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from pallas_kernels.layout import QuantizedWeight, TiledWeight
from quantspec_jax.cache import KVCache, logical_axes
from quantspec_jax.checks import require
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import Params, flatten, nest, parameter_shapes

if TYPE_CHECKING:
    from quantspec_jax.generate.state import DecodeState
    from quantspec_jax.loading import Model

RULES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "tp") | {"tiles": "cp", "batch": "dp"}
)


def one_device(device: jax.Device | None = None) -> Mesh:
    """The mesh of one device, the default one where none is named."""
    return Mesh(np.array([device or jax.devices()[0]]), ("tp",))


def mesh_of(params: Params) -> Mesh:
    """The mesh that parameters lie on; the default device's where they are NumPy arrays."""
    embedding = params["embedding"]
    if not isinstance(embedding, jax.Array):
        return one_device()
    mesh = getattr(embedding.sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else one_device(*embedding.devices())


def axis_of(name: str, mesh: Mesh) -> str | None:
    """The mesh's axis over which a logical one is split; None: over none."""
    axis = RULES.get(name)
    return axis if axis in mesh.shape else None


def shardings(tree: Any, axes: Any, mesh: Mesh) -> Any:
    """The tree with a sharding in place of each array, or shape.

    Args:
      axes: the tree with a tuple of logical axis names in place of each array.

    Raises:
      ValueError: the mesh has another axis than the rules, or does not divide a dimension.
    """
    names = sorted(set(RULES.values()))
    require(set(mesh.axis_names) <= set(names), "mesh axes", mesh.axis_names, ", ".join(names))
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    require(automatic, "mesh axis_types", mesh.axis_types, "AxisType.Auto")

    def one(path: Any, x: Any, names: tuple[str, ...]) -> Sharding:
        if mesh.size == 1:
            return SingleDeviceSharding(mesh.devices.item())
        over = [axis_of(name, mesh) for name in names]
        for name, axis, size in zip(names, over, x.shape, strict=True):
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            _require_divided(f"{where} ({name})", size, mesh, axis)
        return NamedSharding(mesh, PartitionSpec(*over))

    return jax.tree_util.tree_map_with_path(one, tree, axes)


def _require_divided(what: str, size: int, mesh: Mesh, axis: str | None) -> None:
    parts = mesh.shape.get(axis, 1)  # an axis that the mesh has not splits nothing
    require(size % parts == 0, what, size, f"multiples of {parts}, the mesh's {axis}")


def parameter_axes(config: ModelConfig, params: Params) -> Params:
    """The logical axes of every array of the target's tree, or of a draft's."""
    specs = parameter_shapes(config)

    def axes(path: str, leaf: Any) -> Any:
        layer = path.rpartition(".")[0]
        if path == "lm_head.kernel":  # a draft has its own where the target's is tied
            inputs, outputs = "embed", "vocab"
        elif isinstance(leaf, QuantizedWeight | TiledWeight):  # a residual lies like its kernel
            inputs, outputs = specs[f"{layer}.kernel"].axes
        else:  # the order of a kernel's input channels is whole everywhere
            return specs[path].axes if path in specs else ("whole",) * len(leaf.shape)
        if isinstance(leaf, TiledWeight):
            return TiledWeight((inputs, outputs, "strip"))  # type: ignore[arg-type]
        if isinstance(leaf, QuantizedWeight):
            numbers: Any = (inputs, outputs)
            minimum = None if leaf.symmetric else numbers
            return QuantizedWeight((inputs, "group", outputs), numbers, minimum)  # type: ignore[arg-type]
        return inputs, outputs

    return nest({path: axes(path, leaf) for path, leaf in flatten(params).items()})


def param_shardings(config: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """Of the target's parameters, or a draft's: no head is split."""
    _require_divided("num_heads", config.num_heads, mesh, RULES["heads"])
    _require_divided("num_kv_heads", config.num_kv_heads, mesh, RULES["kv_heads"])
    return shardings(params, parameter_axes(config, params), mesh)


def cache_shardings(cache: KVCache, mesh: Mesh) -> KVCache:
    """Of a cache's arrays, by its codec's axes."""
    return shardings(cache, logical_axes(cache), mesh)


def state_shardings(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Of the state between rounds."""
    return shardings(state, state_axes(state), mesh)


def state_axes(state: DecodeState) -> DecodeState:
    """The logical axes of every array of a state: the batch first."""
    names = [field.name for field in dataclasses.fields(state) if field.name != "cache"]
    rest = {name: getattr(state, name) for name in names}
    axes = jax.tree.map(lambda x: ("batch", *["whole"] * (x.ndim - 1)), rest)
    axes["memory"] = jax.tree.map(memory_axes, state.memory)
    return dataclasses.replace(state, cache=logical_axes(state.cache), **axes)


def memory_axes(x: jax.Array) -> tuple[str, ...]:
    """Of what a draft policy remembers: votes [B, L, K, T/G], or numbers of a sequence."""
    votes = ("batch", "layers", "kv_heads", "tiles")
    return votes if x.ndim == 4 else ("batch", *["whole"] * (x.ndim - 1))


def place(tree: Any, where: Any) -> Any:
    """Move each array to its sharding; one that lies there stays the same array."""

    def one(x: jax.Array, sharding: Sharding) -> jax.Array:
        there = isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim)
        return x if there else jax.device_put(x, sharding)

    return jax.tree.map(one, tree, where)


def place_params(config: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """The target's parameters, or a draft's."""
    return place(params, param_shardings(config, params, mesh))


def place_cache(cache: KVCache, mesh: Mesh) -> KVCache:
    """A cache, with what is in it."""
    return place(cache, cache_shardings(cache, mesh))


def place_state(state: DecodeState, mesh: Mesh) -> DecodeState:
    """A state between two rounds."""
    return place(state, state_shardings(state, mesh))


def place_model(model: Model, mesh: Mesh) -> Model:
    """The model on a mesh, its draft too, which shares the arrays it has of the target."""
    params = place_params(model.config, model.params, mesh)
    target, placed = flatten(model.params), flatten(params)
    draft = {
        path: placed[path] if leaf is target.get(path) else leaf
        for path, leaf in flatten(model.draft_params).items()
    }
    moved = copy.copy(model)
    moved.params = params
    moved.draft_params = place_params(model.config, nest(draft), mesh)
    return moved
