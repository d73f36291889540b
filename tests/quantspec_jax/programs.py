"""What a traced program does to arrays that it should read where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

# These take over what they are given, or hand it to a kernel that reads it in place.
IN_PLACE = frozenset(("reshape", "bitcast_convert_type", "optimization_barrier"))
# Kernels and products: what they write is no longer the array.
READERS = frozenset(("pallas_call", "core_map", "mpmd_map", "dot_general"))


def rewritten(closed: Any, watched: Sequence[bool], inside_loops: bool = True) -> list[str]:
    """Equations of a program's loops that write an array about as large as one that they were given
    and that the caller watches: transposed, converted, gathered, copied.

    Args:
      closed: the program, `traced.jaxpr`.
      watched: of each argument's leaf, whether it is one of the arrays.
      inside_loops: leave out what comes before and after the loops.
    """
    return list(_walk(closed.jaxpr, list(watched), not inside_loops))


def _walk(jaxpr: Any, watched: list[bool], counts: bool) -> Iterator[str]:
    """The equations of a jaxpr, and of those in it. What an equation makes of a watched array, if
    it is still as large as half of it, is watched as well."""
    taint = {v for v, w in zip(jaxpr.invars, watched, strict=True) if w}

    def is_watched(x: Any) -> bool:
        return isinstance(x, core.Var) and x in taint

    for eqn in jaxpr.eqns:
        found = [is_watched(x) for x in eqn.invars]
        if not any(found):
            continue
        name = eqn.primitive.name
        if name in READERS:
            continue
        inner = list(_inner(eqn, found))
        if inner:
            loop = name in ("while", "scan")
            for sub, passed in inner:
                yield from _walk(sub, passed, counts or loop)
            if name == "while":  # what is carried in is carried out
                carried = found[eqn.params["cond_nconsts"] + eqn.params["body_nconsts"] :]
                taint |= {v for v, w in zip(eqn.outvars, carried, strict=True) if w}
            elif name in ("jit", "pjit"):
                taint |= set(eqn.outvars) & _same_size(eqn, found)
            continue
        large = _same_size(eqn, found)
        taint |= large
        if large and counts and name not in IN_PLACE:
            yield f"{name}: {', '.join(str(x.aval) for x in eqn.invars)} → {eqn.outvars[0].aval}"


def _same_size(eqn: Any, found: list[bool]) -> set[Any]:
    """The results that are at least half as large, in elements, as a watched operand."""
    least = min(x.aval.size for x, w in zip(eqn.invars, found, strict=True) if w) / 2
    return {v for v in eqn.outvars if getattr(v.aval, "size", 0) >= least}


def _inner(eqn: Any, found: list[bool]) -> Iterator[tuple[Any, list[bool]]]:
    """The jaxprs in an equation, and which of their arguments are watched."""
    params = eqn.params
    if eqn.primitive.name == "while":
        cond, body = params["cond_nconsts"], params["body_nconsts"]
        yield params["body_jaxpr"].jaxpr, found[cond:]
        yield params["cond_jaxpr"].jaxpr, found[:cond] + found[cond + body :]
    elif eqn.primitive.name == "cond":
        for branch in params["branches"]:
            yield branch.jaxpr, found[1:]
    else:
        for name in ("jaxpr", "call_jaxpr", "call"):
            if name in params:
                inner = params[name]
                yield getattr(inner, "jaxpr", inner), found


def leaves_where(tree: Any, holds: Any, is_leaf: Any = None) -> list[bool]:
    """Of each leaf of `tree`, whether it lies in a node for which `holds`."""
    marks = jax.tree.map(
        lambda node: jax.tree.map(lambda _: holds(node), node), tree, is_leaf=is_leaf
    )
    return jax.tree.leaves(marks)
