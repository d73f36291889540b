"""What each tile adds to the softmax's sums, by row: the log-sum-exp of its scores."""

from __future__ import annotations

import functools
import math

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.operands import Operands
from pallas_kernels.kv_attention.mosaic_gpu.plan import Plan
from pallas_kernels.ptx import V, f32, i32


def shape_of_sums(plan: Plan) -> tuple[int, ...]:
    """[B, K, T/G, token warps, R]: each warp that shares a tile writes what its tokens add."""
    s = plan.shape
    return (s.batch, s.kv_heads, s.tiles, plan.config.token_warps, s.rows)


def write_sums(
    plan: Plan,
    operands: Operands,
    tile: V,
    of_tile: list[list[V]],
    origin: list[list[V]],
    first_row: V,
    lane: V,
) -> None:
    """Log-sum-exp of a warp's scores in tile number `tile` of all heads and token warps, from each
    lane's Σ p and the reference of p, both [block][2 columns].

    The eight lanes of a column pair deal its columns of all blocks among themselves while they add
    them up: with four blocks each lane is left with one, after seven exchanges, with more with two.
    Columns are filled up to a power of two; past the warp's own lie rows of another.
    """
    s = plan.shape
    sums = [x for pair in of_tile for x in pair]
    origins = [x for pair in origin for x in pair]
    columns = len(sums)
    padding = (1 << (columns - 1).bit_length()) - columns
    sums, origins = sums + [f32(0.0)] * padding, origins + [f32(0.0)] * padding
    column, idle = i32(0), i32(0)
    for distance in (4, 8, 16):
        upper = (lane & distance) > 0
        if len(sums) == 1:  # these have the same number
            sums = [sums[0] + ptx.shuffle_xor(sums[0], distance)]
            idle = idle | (lane & distance)
            continue
        half = len(sums) // 2
        pairs = [*zip(sums[:half], sums[half:], strict=True)]
        sums = [
            ptx.select(upper, high, low) + ptx.shuffle_xor(ptx.select(upper, low, high), distance)
            for low, high in pairs
        ]
        pairs = [*zip(origins[:half], origins[half:], strict=True)]
        origins = [ptx.select(upper, high, low) for low, high in pairs]
        column = column + ptx.select(upper, i32(half), 0)
    for i, (total, reference) in enumerate(zip(sums, origins, strict=True)):
        number = column + i
        row = first_row + (number >> 1) * 8 + (lane & 3) * 2 + (number & 1)
        mine = ptx.both(ptx.both(idle.equals(0), number < columns), row < s.rows)
        found = (ptx.log2(total) - reference) * math.log(2)
        at = operands["page_sums"] + (tile * s.rows + row).to_i64() * 4
        ptx.when(mine, functools.partial(ptx.store, at, [found]))
