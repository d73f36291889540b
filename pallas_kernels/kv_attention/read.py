"""What a pass of attention reads of a cache, and what it gives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
           beyond `count` hold anything. None: the first ones
    count  [B] int32, up to P, or up to the number of tiles that the planes have
    """

    tiles: jax.Array | None
    count: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["parts", "written"], meta_fields=["tokens"]
)
@dataclasses.dataclass(frozen=True)
class PageLogSums:
    """The log-sum-exp of a row's scores with each tile's tokens, as it was written.

    parts    [B, K, T/G, W, R] float32, each of W shares of the tile's tokens; rows are those of a
             key-value head, R = H/K · S, tokens last. −∞ where a row reads none of the tokens, or
             only such as weigh less than 2⁻¹²⁶ of its largest so far
    written  [B] int32: from that tile on they are anything
    tokens   S
    """

    parts: jax.Array
    written: jax.Array
    tokens: int

    @property
    def by_tile(self) -> jax.Array:
        """[B, K, T/G, R], −∞ for tiles that were not read."""
        read = jnp.arange(self.parts.shape[2])[None] < self.written[:, None]
        # Of each pair of shares: all of it is one fusion, which reductions would not be.
        joined = functools.reduce(jnp.logaddexp, jnp.moveaxis(self.parts, 3, 0))
        return jnp.where(read[:, None, :, None], joined, -jnp.inf)

    @property
    def by_row(self) -> jax.Array:
        """[B, S, H, T/G]."""
        b, k, tiles, _, rows = self.parts.shape
        by_token = self.by_tile.reshape(b, k, tiles, rows // self.tokens, self.tokens)
        heads = k * rows // self.tokens
        return by_token.transpose(0, 4, 1, 3, 2).reshape(b, self.tokens, heads, tiles)


def side_by_side(parts: Sequence[PageLogSums]) -> PageLogSums:
    """Those of a pass from those of its parts, in order of their tokens."""
    group = parts[0].parts.shape[-1] // parts[0].tokens
    shaped = [x.by_tile.reshape(*x.parts.shape[:3], group, x.tokens) for x in parts]
    joined = jnp.concatenate(shaped, -1)
    tokens = joined.shape[-1]
    rows = joined.reshape(*joined.shape[:3], 1, group * tokens)
    return PageLogSums(rows, parts[0].written, tokens)


class ByPage(NamedTuple):
    """Attention of a pass by page: the log-sums of its rows' scores with each page's tokens, and
    with all that they see [B, S, H]."""

    log_sums: PageLogSums
    log_sum_exp: jax.Array

    @classmethod
    def of(cls, masses: jax.Array, kv_heads: int) -> ByPage:
        """From `masses`."""
        b, tokens, heads, tiles = masses.shape
        by_head = jnp.log(masses).reshape(b, tokens, kv_heads, heads // kv_heads, tiles)
        parts = by_head.transpose(0, 2, 4, 3, 1).reshape(b, kv_heads, tiles, 1, -1)
        sums = PageLogSums(parts, jnp.full(b, tiles, jnp.int32), tokens)
        return cls(sums, jnp.zeros((b, tokens, heads)))

    @property
    def masses(self) -> jax.Array:
        """[B, S, H, T/G] float32: the share of a row's attention that each page has."""
        return jnp.exp(self.log_sums.by_row - self.log_sum_exp[..., None])


class Attended(NamedTuple):
    """What a pass gives.

    out            [B, S, H, D]
    log_sum_exp    [B, S, H] float32, of all scores of a row; −∞ where it sees nothing
    page_log_sums  of each tile's tokens; exp(page_log_sums − log_sum_exp) is a page's attention
                   mass. None unless asked for
    """

    out: jax.Array
    log_sum_exp: jax.Array
    page_log_sums: PageLogSums | None
