"""Shapes of arrays in signatures, by the letters that are used everywhere:

    B batch · T cached tokens · S tokens of a pass · H query heads · K key-value heads · D head_dim
    G group size · N vocabulary, or outputs of a linear layer

A letter stands for one size in all arguments and results of a call. `shaped` has that checked where
a checker is set, as tests do before they import the packages; else it leaves a function as it is.
A checked function under `jax.jit` is checked while it is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Key, jaxtyped

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray  # as in JAX itself, NumPy's arrays do

Queries = Float[Array, "B S H D"]  # and attention's output
Tables = Float32[Array, "#B S 1 D"]  # cos and sin
PassKV = Float[Array, "B S K D"]  # keys or values, a token after the other
CacheKV = Float[Array, "B K T D"]  # keys or values, a head after the other
RowSums = Float32[Array, "B S H"]  # a number for each query

Ids = Int[Array, "B S"]  # tokens, or their positions
Each = Int[Array, "B"]  # of each sequence a length, a position, a number or a token
EachDue = Bool[Array, "B"]
Keys = Key[Array, "B"]  # typed PRNG keys

Logits = Float[Array, "B S N"]
Judged = Float[Array, "B S+1 N"]  # of S proposals, and of what follows them
SeenRows = Bool[Array, "B S N"]
LastLogits = Float[Array, "B N"]
Seen = Bool[Array, "B N"]

Inputs = Float[Array, "*rows Kin"]  # of a linear layer
Outputs = Float[Array, "*rows N"]

Function = TypeVar("Function", bound=Callable[..., Any])

checker: Callable[..., Any] | None = None  # such as `beartype.beartype`


def shaped(function: Function) -> Function:
    """Check the annotations of a function at each call, where there is a checker."""
    if checker is None:
        return function
    return jaxtyped(typechecker=checker)(function)
