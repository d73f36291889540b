"""Where arrays lie on a mesh of devices: logical axes → axes of the mesh, by rules.

    tp  heads, the MLP's channels, the vocabulary    parameters, cache
    cp  tiles of the planes, positions that are      cache; of a prompt that is read, its rows
        not coded: the context
    dp  sequences                                    cache, the rest of the state

A mesh has any of these axes; all other dimensions lie whole on each device. A packed weight is
split by whole groups of input channels and whole outputs, a tiled one by whole strips. On a mesh of
one device arrays lie as they do without a mesh, so that programs are compiled as without one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AbstractMesh,
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
from quantspec_jax.models.module import initial
from quantspec_jax.models.parameters import Params, flatten, nest, parameter_shapes
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.sizes import layer_formats

if TYPE_CHECKING:
    from quantspec_jax.generate.state import DecodeState
    from quantspec_jax.loading import Model

RULES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "tp")
    | {"tiles": "cp", "positions": "cp", "rows": "cp", "batch": "dp"}
)
GROUPS = (128, 64, 32, 16, 8)  # of input channels, as drafts have them


def one_device(device: jax.Device | Mesh | None = None) -> Mesh:
    """The mesh of one device, the default one where none is named; a mesh as it is."""
    if isinstance(device, Mesh):
        return device
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
    _check_axes(mesh)

    def one(path: Any, x: Any, names: tuple[str, ...]) -> Sharding:
        if mesh.size == 1:
            return SingleDeviceSharding(mesh.devices.item())
        over = [axis_of(name, mesh) for name in names]
        for name, axis, size in zip(names, over, x.shape, strict=True):
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            _require_divided(f"{where} ({name})", size, mesh, axis)
        return NamedSharding(mesh, PartitionSpec(*over))

    return jax.tree_util.tree_map_with_path(one, tree, axes)


def _check_axes(mesh: Mesh | AbstractMesh) -> None:
    names = sorted(set(RULES.values()))
    require(set(mesh.axis_names) <= set(names), "mesh axes", mesh.axis_names, ", ".join(names))
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    require(automatic, "mesh axis_types", mesh.axis_types, "AxisType.Auto")


def check_mesh(config: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """ValueError unless the model can be split over the mesh, before anything of it is read."""
    _check_axes(mesh)
    config = heads_over(config, mesh)
    for name in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
        _require_divided(name, getattr(config, name), mesh, "tp")


def check_draft(config: ModelConfig, draft: DraftConfig, mesh: Mesh | AbstractMesh) -> None:
    """ValueError unless each device has whole groups of a draft's weights, before any is there."""
    for layer, channels, size in _split_groups(config, draft, mesh):
        groups = ", ".join(str(g) for g in GROUPS if channels % g == 0) or "none, but bits None"
        what = f"what divides the {channels} input channels of {layer} that a device has: {groups}"
        raise ValueError(f"draft group_size is {size}; allowed: {what}")


def default_draft(config: ModelConfig, mesh: Mesh | AbstractMesh) -> DraftConfig:
    """`DraftConfig()`; where a device has no whole groups of it, in the largest smaller ones."""
    default = DraftConfig()
    sizes = (g for g in GROUPS if g <= default.group_size)
    drafts = (dataclasses.replace(default, group_size=g) for g in sizes)
    return next((draft for draft in drafts if draft_fits(config, draft, mesh)), default)


def draft_fits(config: ModelConfig, draft: DraftConfig, mesh: Mesh | AbstractMesh) -> bool:
    """Whether `check_draft` takes it."""
    return not any(_split_groups(config, draft, mesh))


def _split_groups(
    config: ModelConfig, draft: DraftConfig, mesh: Mesh | AbstractMesh
) -> Iterator[tuple[str, int, int]]:
    """The draft's layers whose groups would be split: name, a device's input channels, group."""
    shapes = parameter_shapes(config)
    for layer, stored in layer_formats(config, draft).items():
        kernel = shapes[f"{layer}.kernel"]
        parts = mesh.shape.get(RULES.get(kernel.axes[0]), 1)
        channels = kernel.shape[0] // parts
        if parts > 1 and stored.bits < 16 and channels % stored.group_size:
            yield layer, channels, stored.group_size


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of devices that need not be there. Axes are Auto, which from JAX 0.12 on has to be
    said."""
    automatic = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=automatic)


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh of the first devices that there are, {"tp": 2, "cp": 2}.

    Raises:
      ValueError: an axis that there is not, or more devices than there are.
    """
    number, there = math.prod(sizes.values()), len(jax.devices())
    require(min(sizes.values()) >= 1, "mesh", dict(sizes), "axes of 1 and more devices")
    require(number <= there, "mesh", dict(sizes), f"at most {there} devices, as many as there are")
    part = jax.process_count() > 1 and number < there  # a process must not be left out
    require(
        not part, "mesh", dict(sizes), f"all {there} devices of {jax.process_count()} processes"
    )
    mesh = Mesh(np.array(jax.devices()[:number]).reshape(tuple(sizes.values())), tuple(sizes))
    _check_axes(mesh)
    return mesh


def _require_divided(what: str, size: int, mesh: Mesh | AbstractMesh, axis: str | None) -> None:
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


def heads_over(config: ModelConfig, mesh: Mesh | AbstractMesh) -> ModelConfig:
    """The model with as many key-value heads as devices, where it has fewer: each is there several
    times (`with_heads`)."""
    devices, heads = mesh.shape.get(RULES["kv_heads"], 1), config.num_kv_heads
    if heads >= devices or devices % heads:
        return config
    return dataclasses.replace(config, num_kv_heads=devices)


def with_heads(config: ModelConfig, params: Params, heads: int) -> Params:
    """Parameters with `heads` key-value heads, a multiple of the model's, each of which is there
    several times side by side: what attention makes of them is the same."""
    times = heads // config.num_kv_heads
    if times == 1:
        return params

    def repeated(x: jax.Array, axis: int) -> jax.Array:
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        by_head = x.reshape(*before, config.num_kv_heads, -1, *after)
        return jnp.repeat(by_head, times, axis).reshape(*before, -1, *after)

    def one(path: str, leaf: Any) -> Any:
        name = path.split(".")[-2:]
        if name[0] not in ("k", "v") or name[1] == "order":
            return leaf
        strips = isinstance(leaf, TiledWeight)  # the outputs are their second axis, else the last
        return jax.tree.map(lambda x: repeated(x, 1 if strips else x.ndim - 1), leaf)

    return nest({path: one(path, leaf) for path, leaf in flatten(params).items()})


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
        if there or sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
            return x if there else jax.device_put(x, sharding)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x), sharding))
        own = np.asarray(x)  # of several processes each has all of it, and keeps its part
        return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])

    return jax.tree.map(one, tree, where)


def init_params_over(config: ModelConfig, key: jax.Array, dtype: Any, mesh: Mesh) -> Params:
    """Random parameters, as those of `init_params` are: each device makes its parts, so that none
    ever holds the whole."""
    specs = parameter_shapes(config)
    shapes = {path: jax.ShapeDtypeStruct(spec.shape, dtype) for path, spec in specs.items()}
    where = flatten(param_shardings(config, nest(shapes), mesh))
    keys = dict(zip(specs, jax.random.split(key, len(specs)), strict=True))

    def make(path: str) -> jax.Array:
        name = path.rpartition(".")[2]
        return _maker(name, specs[path].shape, dtype, where[path])(keys[path])

    return nest({path: make(path) for path in specs})


@functools.cache
def _maker(
    name: str, shape: tuple[int, ...], dtype: Any, where: Sharding
) -> Callable[[jax.Array], jax.Array]:
    """Compiled once for all layers."""
    return jax.jit(lambda key: initial(name, shape, dtype, lambda: key), out_shardings=where)


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
    """The model on a mesh, its draft too, which shares the arrays it has of the target. A draft
    that is not there yet is made of the parts, on the devices that have them."""
    check_mesh(model.config, mesh)
    check_draft(model.config, model.draft, mesh)
    config = heads_over(model.config, mesh)
    params = with_heads(model.config, model.params, config.num_kv_heads)
    moved = copy.copy(model)
    moved.config, moved.params = config, place_params(config, params, mesh)
    made = vars(moved).pop("draft_params", None)
    if made is not None:
        moved.draft_params = _placed_draft(model, moved, made, mesh)
    elif model.draft_entries is not None:
        moved.draft_entries = with_heads(model.config, model.draft_entries, config.num_kv_heads)
    return moved


def _placed_draft(model: Model, moved: Model, draft: Params, mesh: Mesh) -> Params:
    """A draft's tree, with the moved target's arrays where it has the target's."""
    target, placed, shared = flatten(model.params), flatten(moved.params), flatten(draft)
    own = flatten(with_heads(model.config, draft, moved.config.num_kv_heads))
    tree = {
        path: placed[path] if x is target.get(path) else own[path] for path, x in shared.items()
    }
    return place_params(moved.config, nest(tree), mesh)
