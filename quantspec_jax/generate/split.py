"""Programs over a mesh: what runs on each device with its part of every array.

A stage of the prefill, or the decode loop, is written for one device. On a mesh it is the same
function, to which `jax.shard_map` gives the parts that `sharding` describes; where devices have to
meet, it asks `Program.axes`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.layout import LayerCache
from quantspec_jax.sharding import axis_of, memory_axes, parameter_axes, state_axes

Describe = Callable[[Any, Any], Any]  # (what a program is for, arrays or shapes) → logical axes


def _each(axes: Callable[[Any], Any]) -> Describe:
    return lambda program, tree: jax.tree.map(axes, tree)


def _block(program: Any, block: Any) -> Any:
    return parameter_axes(program.model, {"layers": {"0": block}})["layers"]["0"]


# What arguments and results may be, by name.
KINDS: Mapping[str, Describe] = MappingProxyType(
    {
        "params": lambda program, tree: parameter_axes(program.model, tree),
        "block": _block,
        "state": lambda program, state: state_axes(state),
        "layer": lambda program, layer: program.cache.codec.logical_axes(layer),
        "memory": _each(memory_axes),
        "pages": _each(lambda x: ("batch", "kv_heads", "tiles")),
        "batch": _each(lambda x: ("batch", *["whole"] * (x.ndim - 1))),
        "rows": _each(lambda x: ("batch", "rows", *["whole"] * (x.ndim - 2))),
        "peers": _each(lambda x: ("batch", "tiles", "heads", "whole")),
        "whole": _each(lambda x: ()),
    }
)


def split(
    given: str, made: str, like: int | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a pure function of arrays run over the mesh of its `program`, where that has one.

    Args:
      given, made: of each positional argument and of each result what it is, one of KINDS.
      like: which argument has the form of the only result; None: the program says what it makes.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def over_mesh(*args: Any, program: Any, **static: Any) -> Any:
            run = functools.partial(function, program=program, **static)
            if program.mesh is None:
                return run(*args)
            if like is None:
                alone = functools.partial(
                    function, program=dataclasses.replace(program, mesh=None), **static
                )
                shapes = jax.eval_shape(alone, *args)
            else:
                shapes = args[like]
            several = len(made.split()) > 1
            out = _specs(program, made, shapes if several else (shapes,))
            return jax.shard_map(
                run,
                mesh=program.mesh,
                in_specs=_specs(program, given, args),
                out_specs=out if several else out[0],
                check_vma=False,
            )(*args)

        return over_mesh

    return decorate


def _specs(program: Any, kinds: str, trees: Any) -> tuple[Any, ...]:
    pairs = zip(kinds.split(), trees, strict=False)  # the rest has defaults
    return tuple(_spec(tree, KINDS[kind](program, tree), program.mesh) for kind, tree in pairs)


def _spec(tree: Any, axes: Any, mesh: Mesh) -> Any:
    def one(_: Any, names: tuple[str, ...]) -> PartitionSpec:
        return PartitionSpec(*(axis_of(name, mesh) for name in names))

    return jax.tree.map(one, tree, axes)


def own_tiles(layer: LayerCache, deal: Callable[[jax.Array], jax.Array]) -> LayerCache:
    """A layer with the tiles of this device (`Axes.dealt`) of all."""
    keys, values = jax.tree.map(deal, (layer.keys, layer.values))
    return dataclasses.replace(layer, keys=keys, values=values)
