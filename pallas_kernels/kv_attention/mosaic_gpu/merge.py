"""The second kernel: partial results of a query row become its output, by log-sum-exp."""

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

MERGE_WARPGROUPS = 4
MERGE_AT_ONCE = 8


def _store_output(where: V, values: list[V], dtype: Any) -> None:
    """Neighbouring numbers of a lane, as float32 or bfloat16."""
    if dtype == jnp.float32:
        words = values
    elif len(values) % 2:
        for i, x in enumerate(values):
            ptx.store_half(where + 2 * i, ptx.pack_bf16(x, f32(0.0)))
        return
    else:
        words = [ptx.pack_bf16(*values[i : i + 2]) for i in range(0, len(values), 2)]
    step = next(n for n in (4, 2, 1) if len(words) % n == 0)
    for j in range(0, len(words), step):
        ptx.store(where + 4 * j, words[j : j + step])


def merge_body(plan: Plan, out_dtype: Any):
    """Partial results of a query row → its output and log-sum-exp. One block a row."""
    s = plan.shape
    warps = 4 * MERGE_WARPGROUPS
    channels = s.head_dim // 32
    numbers = channels + 2

    def body(addresses: Sequence[V], shared: V) -> None:
        quantized, start, partial, statistics, output, log_sum_exp = addresses
        lengths = Lengths(plan, quantized, start)
        thread = ptx.special("tid.x")
        lane = thread & 31
        warp = ptx.uniform(thread >> 5)
        block = ptx.special("ctaid.x")
        row, bk = block % s.rows, block // s.rows
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

        def statistic(slot: V) -> list[V]:
            index = slot.to_i64() * s.rows + row.to_i64()
            return ptx.load(statistics + index * 8, 2, "f32")

        def add(slot: V, carry: list[V]) -> list[V]:
            *sums, old = carry
            loaded, top = [], old
            for i in range(MERGE_AT_ONCE):
                here = slot + warps * i
                valid = here < last
                safe = ptx.select(valid, here, slot)
                index = safe.to_i64() * s.rows + row.to_i64()
                at = partial + index * (4 * s.head_dim) + (lane * (4 * channels)).to_i64()
                loaded.append((valid, statistic(safe), ptx.load_wide(at, channels)))
            for valid, (reference, _), _ in loaded:
                top = ptx.select(valid, ptx.maximum(top, reference), top)
            factor = ptx.exp2(old - top)
            sums = [x * factor for x in sums]
            for valid, (reference, weight), values in loaded:
                factor = ptx.select(valid, ptx.exp2(reference - top), f32(0.0))
                sums[0] = ptx.fma(factor, weight, sums[0])
                for j in range(channels):
                    sums[1 + j] = ptx.fma(factor, values[j].as_float(), sums[1 + j])
            return [*sums, top]

        nothing = [f32(0.0)] * (1 + channels) + [f32(NOTHING)]
        sums = ptx.loop(first + warp, last, nothing, add, step=warps * MERGE_AT_ONCE)
        at = shared + warp * (128 * numbers) + lane * 4
        for j, x in enumerate(sums):
            ptx.store(at + 128 * j, [x])
        ptx.sync_threads(i32(0), 32 * warps)

        def finish() -> None:
            def part(w: int, j: int) -> V:
                return ptx.load(shared + lane * 4 + 128 * (w * numbers + j), 1, "f32")[0]

            highest, *others = tops = [part(w, 1 + channels) for w in range(warps)]
            for x in others:
                highest = ptx.maximum(highest, x)
            factors = [ptx.exp2(x - highest) for x in tops]
            final = []
            for j in range(1 + channels):
                x = f32(0.0)
                for w in range(warps):
                    x = ptx.fma(part(w, j), factors[w], x)
                final.append(x)
            weight, *values = final
            some = weight > 0.0
            inverse = ptx.select(some, f32(1.0) / weight, f32(0.0))
            index = row_offset(s, b, k, row)
            size = jnp.dtype(out_dtype).itemsize
            at = output + index * (size * s.head_dim) + (lane * (size * channels)).to_i64()
            _store_output(at, [x * inverse for x in values], out_dtype)
            found = (highest + ptx.log2(weight)) * math.log(2)
            ptx.when(
                lane.equals(0),
                lambda: ptx.store(
                    log_sum_exp + index * 4, [ptx.select(some, found, f32(-math.inf))]
                ),
            )

        ptx.when(warp.equals(0), finish)

    return body
