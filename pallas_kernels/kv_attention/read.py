"""What a pass of attention reads of a cache, and what it gives."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax

VIEWS = ("full", "int8", "int4", "float8")


@dataclasses.dataclass(frozen=True)
class Read:
    """What a pass reads: handed through whole, and a constant of the program.

    view         of the planes: `int8` both, `int4` the upper one alone; a cache without planes is
                 read in full precision whatever is asked for (`full`: it has none), or in the 8-bit
                 floats that its buffer holds (`float8`)
    exact_tiles  in the view `int4`, the tiles at the beginning of each sequence that are read with
                 both planes: where attention sinks lie, whose keys its steps are too coarse for
    """

    view: str = "int8"
    exact_tiles: int = 0

    def __post_init__(self) -> None:
        if self.view not in VIEWS:
            raise ValueError(f"view is {self.view!r}; allowed: {', '.join(VIEWS)}")
        most = "an integer ≥ 0" if self.view == "int4" else f"0 in the view {self.view}"
        possible = type(self.exact_tiles) is int and self.exact_tiles >= 0
        if not possible or (self.exact_tiles and self.view != "int4"):
            raise ValueError(f"exact_tiles is {self.exact_tiles!r}; allowed: {most}")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tiles", "count"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Pages:
    """The tiles of the planes that a pass reads, for each sequence and key-value head. The buffer
    is read in any case.

    tiles  [B, K, P] int32: tiles that hold coded tokens, ascending, each once; entries at and
           beyond `count` hold anything
    count  [B] int32, up to P
    """

    tiles: jax.Array
    count: jax.Array


class Attended(NamedTuple):
    """What a pass gives.

    out            [B, S, H, D]
    log_sum_exp    [B, S, H] float32, of all scores of a row; −∞ where it sees nothing
    page_log_sums  [B, S, H, T/G] float32, of its scores with each tile's tokens; −∞ where it reads
                   none of them, or only such as weigh less than 2⁻¹²⁶ of its largest so far.
                   exp(page_log_sums − log_sum_exp) is a page's attention mass. None unless asked
                   for.
    """

    out: jax.Array
    log_sum_exp: jax.Array
    page_log_sums: jax.Array | None
