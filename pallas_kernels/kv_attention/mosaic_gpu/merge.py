"""The second kernel: partial results of a query row become its output, by log-sum-exp.

A head has up to 800 partial results where it is one of two, more than one multiprocessor reads in
the time of a launch. A block takes 32 channels of a row, and a warp four partial results at a time:

    lane 8 i + j    partial result 4 w + i, 4 (w + warps) + i …    channels j, 8 + j, 16 + j, 24 + j

To merge in the first launch, by the blocks that finish last, was tried: of a draft with two heads
at 30,000 tokens, RoPE, attention and merge took 11.0 µs in one launch and 11.2 in three on an H200,
of a verification of five tokens 17.4 with the merge inside and 16.9 in three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.operands import row_offset
from pallas_kernels.kv_attention.mosaic_gpu.plan import Plan
from pallas_kernels.kv_attention.mosaic_gpu.softmax import NOTHING
from pallas_kernels.kv_attention.mosaic_gpu.units import Lengths, part_of
from pallas_kernels.ptx import V, f32, i32

CHANNELS = 32  # of a block
SIDE_BY_SIDE = 4  # partial results that a warp reads at a time
AT_ONCE = 8  # reads in flight, 12 at most where all are read in one turn then
MOST_AT_ONCE = 12
MOST_WARPGROUPS = 4
WARP_BYTES = 4 * (CHANNELS + 4)  # of a warp's sums in shared memory, Σ p and the reference after


def merge_blocks(plan: Plan) -> int:
    """A block for each row and each 32 of its channels."""
    s = plan.shape
    return s.batch * s.kv_heads * s.rows * (s.head_dim // CHANNELS)


def merge_warpgroups(plan: Plan) -> int:
    """As many as read all partial results of a head in one turn, if four do."""
    return min(MOST_WARPGROUPS, -(-_of_a_head(plan) // (4 * SIDE_BY_SIDE * AT_ONCE)))


def _of_a_head(plan: Plan) -> int:
    """Partial results, at most."""
    heads = plan.shape.batch * plan.shape.kv_heads
    return (plan.blocks * plan.teams // heads + 2) * plan.writers


def _at_once(plan: Plan) -> int:
    """Reads that a lane has in flight."""
    turn = -(-_of_a_head(plan) // (4 * merge_warpgroups(plan) * SIDE_BY_SIDE))
    return max(turn, 1) if turn <= MOST_AT_ONCE else AT_ONCE


def merge_body(plan: Plan, out_dtype: Any):
    """Partial results of a query row → 32 channels of its output, and its log-sum-exp."""
    s = plan.shape
    warps, at_once = 4 * merge_warpgroups(plan), _at_once(plan)
    slices = s.head_dim // CHANNELS

    def body(addresses: Sequence[V], shared: V) -> None:
        ptx.let_next_begin()
        *lengths_at, partial, statistics, output, log_sum_exp = addresses
        quantized, start, count = [*lengths_at, None][:3]
        assert quantized is not None
        assert start is not None
        lengths = Lengths(plan, quantized, start, count)
        thread, block = ptx.special("tid.x"), ptx.special("ctaid.x")
        lane, warp = thread & 31, ptx.uniform(thread >> 5)
        beside, quad = lane >> 3, (lane & 7) * 4
        channel, rest = block % slices * CHANNELS, block // slices
        row, bk = rest % s.rows, rest // s.rows
        b, k = bk // s.kv_heads, bk % s.kv_heads

        total = lengths.total()
        before = i32(0)
        if s.batch > 1:
            (before,) = ptx.loop(
                i32(0),
                b,
                [before],
                lambda i, carry: [carry[0] + lengths.units(i)[1] * s.kv_heads],
            )
        units = lengths.units(b)[1]
        first_unit = before + k * units
        teams = plan.blocks * plan.teams
        first = (part_of(total, teams, first_unit) + bk) * plan.writers
        last = (part_of(total, teams, first_unit + units - 1) + bk + 1) * plan.writers
        ptx.wait_for_launches()

        def add(slot: V, carry: list[V]) -> list[V]:
            *sums, old = carry
            loaded, top = [], old
            for i in range(at_once):
                here = slot + beside + SIDE_BY_SIDE * warps * i
                valid = here < last
                index = ptx.select(valid, here, slot).to_i64() * s.rows + row.to_i64()
                at = partial + index * (4 * s.head_dim) + ((channel + quad) * 4).to_i64()
                statistic = ptx.load(statistics + index * 8, 2, "f32")
                loaded.append((valid, statistic, ptx.load(at, 4, "f32")))
            for valid, (reference, _), _ in loaded:
                top = ptx.select(valid, ptx.maximum(top, reference), top)
            factor = ptx.exp2(old - top)
            sums = [x * factor for x in sums]
            for valid, (reference, weight), values in loaded:
                factor = ptx.select(valid, ptx.exp2(reference - top), f32(0.0))
                for j, x in enumerate((*values, weight)):
                    sums[j] = ptx.fma(factor, x, sums[j])
            return [*sums, top]

        nothing = [f32(0.0)] * 5 + [f32(NOTHING)]
        *sums, top = ptx.loop(
            first + warp * SIDE_BY_SIDE,
            last,
            nothing,
            add,
            step=SIDE_BY_SIDE * warps * at_once,
        )
        for distance in (8, 16):
            highest = ptx.maximum(top, ptx.shuffle_xor(top, distance))
            factor = ptx.exp2(top - highest)
            sums = [x * factor for x in sums]
            sums = [x + ptx.shuffle_xor(x, distance) for x in sums]
            top = highest
        *values, weight = sums
        mine = shared + warp * WARP_BYTES
        ptx.when(lane < 8, lambda: ptx.store(mine + quad * 4, values))
        ptx.when(lane.equals(0), lambda: ptx.store(mine + 4 * CHANNELS, [weight, top]))
        ptx.sync_threads(i32(0), 32 * warps)

        def finish() -> None:
            parts = [shared + w * WARP_BYTES for w in range(warps)]
            ends = [ptx.load(part + 4 * CHANNELS, 2, "f32") for part in parts]
            highest = ends[0][1]
            for _, top in ends[1:]:
                highest = ptx.maximum(highest, top)
            value, weight = f32(0.0), f32(0.0)
            for part, (added, top) in zip(parts, ends, strict=True):
                factor = ptx.exp2(top - highest)
                (here,) = ptx.load(part + lane * 4, 1, "f32")
                value, weight = ptx.fma(here, factor, value), ptx.fma(added, factor, weight)
            some = weight > 0.0
            inverse = ptx.select(some, f32(1.0) / weight, f32(0.0))
            index = row_offset(s, b, k, row)
            size = jnp.dtype(out_dtype).itemsize
            own = channel + (lane & 3) * 8 + (lane >> 2)  # as `write_partial` orders them
            at = output + index * (size * s.head_dim) + (own * size).to_i64()
            if size == 4:
                ptx.store(at, [value * inverse])
            else:
                ptx.store_half(at, ptx.pack_bf16(value * inverse, f32(0.0)))
            found = (highest + ptx.log2(weight)) * math.log(2)
            ptx.when(
                ptx.both(lane.equals(0), channel.equals(0)),
                lambda: ptx.store(
                    log_sum_exp + index * 4, [ptx.select(some, found, f32(-math.inf))]
                ),
            )

        ptx.when(warp.equals(0), finish)

    return body
