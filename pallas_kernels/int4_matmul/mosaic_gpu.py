"""Products of a few rows with packed 4-bit weights on Hopper and later (Pallas Mosaic GPU).

What is read, once: codes (half a byte a weight), scales and minima (4 bytes for a group of 128),
for all rows and all weights of a pass (gate and up, or q, k and v, are one launch). A warp works on
128 outputs, a group of input channels at a time, in its own ring of stages in shared memory:

    stage   32 rows of 128 bytes (row: 2 input channels, low and high nibble), 16-byte chunks
            swizzled so that the lanes' reads meet no bank twice;  scales, minima [128] bf16

Outputs are the rows of m16n8k16 products, activations their 8 columns. Codes lie along the outputs:
two rows' words are shuffled into pairs of inputs, and a code in the low bits of bf16 128.0 is
128 + code, exactly: 8 instructions for 8 codes. The group's scale multiplies the group's sums, in
float32; minima and the 128 go with Σ x, which is a product with ones.

Floor: the bytes over the read ceiling, 10.9 µs for Llama-2-7B's gate and up (48 MB) and 14.2 µs for
Llama-3-8B's. Reached on an H200 with one row: 17.3 and 20.8 µs, partial sums added, 63% and 68% of
4,390 GB/s. What bounds it is not arithmetic (the busiest unit, integer logic, is at 38%) nor the
products (5%): launch and first loads cost about 3 µs at any size, and more loads in flight make it
slower (4 stages for 3: 19 µs for 18), which points at the rows of one block being kilobytes apart
in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import ptx
from pallas_kernels.layout import QuantizedWeight
from pallas_kernels.ptx import V, f32, i32

MAX_ROWS = 16
OUTPUTS = 128  # of a warp: one row of a stage is 128 bytes
WARPS = 4  # of a warpgroup
ONES = 0x3F803F80  # two bf16 1.0
MAGIC = 0x43004300  # two bf16 128.0: with a code in the low bits, 128 + code


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is laid on the chip.

    warpgroups  a block, each on its own: they share a block only because a block of 4 leaves 128
                registers a thread, and so 16 warps fit
    stages      parts of groups that a warp has in shared memory, read or in flight
    splits      parts that the input channels are dealt into; XLA adds their results
    beside      warps of a warpgroup on neighbouring outputs, 4 or 1: 4 read longer rows of the
                weight; 1 deals the groups to the 4 warps, which add up in shared memory
    """

    warpgroups: int
    stages: int
    splits: int
    beside: int = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is specialized to: rows, groups of input channels, outputs a weight."""

    rows: int
    groups: int
    group_size: int
    outputs: tuple[int, ...]
    symmetric: bool

    @property
    def column_blocks(self) -> int:
        return -(-self.rows // 8)

    @property
    def parts(self) -> int:
        """Stages that a group takes."""
        return max(1, self.group_size // 64)

    @property
    def stage_rows(self) -> int:
        """Rows of 128 bytes of a stage; a row is two input channels."""
        return self.group_size // 2 // self.parts

    @property
    def stage_bytes(self) -> int:
        """A part of a group's codes for 128 outputs, their scales and their minima."""
        return self.stage_rows * OUTPUTS + 4 * OUTPUTS


@dataclasses.dataclass(frozen=True)
class Plan:
    shape: Shape
    config: Config

    @property
    def outputs(self) -> int:
        """Outputs of a warpgroup."""
        return OUTPUTS * self.config.beside

    @property
    def output_blocks(self) -> list[int]:
        """Pieces of so many outputs of each weight."""
        return [-(-n // self.outputs) for n in self.shape.outputs]

    @property
    def items(self) -> int:
        """Pieces of work of a warpgroup: its outputs of one split."""
        return sum(self.output_blocks) * self.config.splits

    @property
    def sharing(self) -> int:
        """Warps that share the groups of an item's outputs."""
        return WARPS // self.config.beside

    @property
    def sum_bytes(self) -> int:
        """A warp's sums, where they are added to others'."""
        return 8 * self.shape.column_blocks * OUTPUTS * 4 if self.sharing > 1 else 0

    @property
    def blocks(self) -> int:
        return -(-self.items // self.config.warpgroups)

    @property
    def item_bytes(self) -> int:
        """Shared memory of a warpgroup: its warps' rings, and their sums in the end."""
        return WARPS * max(self.config.stages * self.shape.stage_bytes, self.sum_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.config.warpgroups * self.item_bytes


class _Warp:
    """One warp's groups: their loads, and the products with them.

    Codes lie along the outputs, products sum along the inputs: two words of neighbouring inputs are
    shuffled into one with both inputs of two outputs, 16 bits apart. A code in the low bits of
    bf16 128.0 is 128 + code; what the 128 adds is taken off with the group's minimum, for which
    the sum over the group's inputs comes from a product with ones.
    """

    def __init__(self, plan: Plan, x: V, width: V, packed: V, scale: V, minimum: V, n: V, first: V):
        self.plan, self.x = plan, x
        self.packed, self.scale, self.minimum, self.n, self.first = packed, scale, minimum, n, first
        self.lane = ptx.special("tid.x") & 31
        self.g, self.q = self.lane >> 2, self.lane & 3
        self.row_bytes = width

    def order(self, stage: V, group: V, part: int, valid: V) -> None:
        """Start the loads of a part of a group: rows of 128 bytes, 16-byte chunks swizzled.

        Lanes q own runs of rows of the group; a part has a piece of each run.
        """
        s = self.plan.shape
        run, piece = s.group_size // 8, s.stage_rows // 4
        chunk, eighth = self.lane & 7, self.lane >> 3
        column = self.first + chunk * 16
        here = ptx.select(column < self.n, column, i32(0))
        size = ptx.select(valid, ptx.select(column < self.n, i32(16), 0), i32(0))
        base = self.packed + (group * (s.group_size // 2)).to_i64() * self.n.to_i64()
        offset = eighth * self.n + here
        for i in range(s.stage_rows // 4):
            owner, within = divmod(4 * i, piece)  # the same owner for the four rows
            row = owner * run + part * piece + within
            target = stage + (eighth + 4 * i) * 128 + (chunk ^ (owner * 2)) * 16
            ptx.copy_async(target, base + (offset + self.n * row).to_i64(), size)
        if part < s.parts - 1:
            return
        # Lanes 0–15: scales; 16–31: minima.
        chunk = self.lane & 15
        column = self.first + chunk * 8
        inside = column < self.n
        here = ptx.select(inside, column, i32(0))
        size = ptx.select(valid, ptx.select(inside, i32(16), 0), i32(0))
        numbers = ptx.select(self.lane < 16, self.scale, self.minimum)
        source = numbers + (group.to_i64() * self.n.to_i64() + here.to_i64()) * 2
        ptx.copy_async(stage + s.stage_rows * 128 + self.lane * 16, source, size)

    def activations(self, group: V) -> list[V]:
        """The rows' inputs of a group: [column blocks][halves of the group][words of two]."""
        s = self.plan.shape
        out: list[V] = []
        for n in range(s.column_blocks):
            # Rows beyond the last repeat it; nobody reads their results.
            row = ptx.minimum(self.g + 8 * n, s.rows - 1)
            channel = group * s.group_size + self.q * (s.group_size // 8)
            at = self.x + (row * self.row_bytes + channel * 2).to_i64()
            out += ptx.load_wide(at, s.group_size // 16)
            out += ptx.load_wide(at + s.group_size, s.group_size // 16)
        return out

    def empty(self) -> list[V]:
        """Sums before any product: [8 tiles and Σ x][column blocks][4]."""
        return [f32(0.0)] * (9 * self.plan.shape.column_blocks * 4)

    def multiply(self, stage: V, inputs: list[V], part: int, sums: list[V]) -> list[V]:
        """sums += a part of a group: products with 128 + code, and with ones."""
        s = self.plan.shape
        blocks, steps = s.column_blocks, s.group_size // 16
        out = [sums[4 * i :][:4] for i in range(9 * blocks)]
        ones, magic = i32(ONES), i32(MAGIC)
        here = stage + self.q * (s.stage_rows // 4 * 128) + (self.g ^ (self.q * 2)) * 16
        for i in range(steps // s.parts):
            step = part * (steps // s.parts) + i
            b = [
                [inputs[2 * n * steps + half * steps + step] for half in (0, 1)]
                for n in range(blocks)
            ]
            even = ptx.load(here + 256 * i, 4)
            odd = ptx.load(here + 256 * i + 128, 4)
            for n in range(blocks):
                out[8 * blocks + n] = ptx.mma("bf16", [ones] * 4, b[n], out[8 * blocks + n])
            for j in range(4):
                for half, selector in enumerate((0x5410, 0x7632)):
                    word = ptx.permute_bytes(even[j], odd[j], selector)
                    shifted = [word, word >> 8, word >> 4, word >> 12]
                    a = [ptx.and_or(w, 0x000F000F, magic) for w in shifted]
                    for n in range(blocks):
                        tile = (2 * j + half) * blocks + n
                        out[tile] = ptx.mma("bf16", a, b[n], out[tile])
        return [x for four in out for x in four]

    def add(self, stage: V, products: list[V], sums: list[V]) -> list[V]:
        """sums [8 tiles][column blocks][4] += scale · products + what belongs to Σ x."""
        s = self.plan.shape
        blocks = s.column_blocks
        numbers = stage + s.stage_rows * 128 + self.g * 32
        scales = ptx.load_wide(numbers, 8)
        minima = None if s.symmetric else ptx.load_wide(numbers + 256, 8)
        result = []
        for t in range(8):
            scale = [ptx.low_bf16(scales[t]), ptx.high_bf16(scales[t])]
            if minima is None:
                offset = [x * -136.0 for x in scale]
            else:
                both = [ptx.low_bf16(minima[t]), ptx.high_bf16(minima[t])]
                offset = [ptx.fma(x, f32(-128.0), m) for x, m in zip(scale, both, strict=True)]
            for n in range(blocks):
                for j in range(4):
                    y = sums[(t * blocks + n) * 4 + j]
                    y = ptx.fma(scale[j // 2], products[(t * blocks + n) * 4 + j], y)
                    total = products[(8 * blocks + n) * 4 + j % 2]
                    result.append(ptx.fma(offset[j // 2], total, y))
        return result


def _add_warps(plan: Plan, shared: V, warpgroup: V, warp: V, work: _Warp, sums: list[V]) -> list[V]:
    """The sums of a warpgroup's warps, added in order; for its first warp."""
    ptx.sync_threads(warpgroup + 1, 32 * WARPS)  # all have left their rings
    here = shared + work.lane * 16
    for i in range(0, len(sums), 4):
        ptx.store(here + warp * plan.sum_bytes + 128 * i, sums[i : i + 4])
    ptx.sync_threads(warpgroup + 1, 32 * WARPS)
    out = []
    for i in range(0, len(sums), 4):
        four = ptx.load(here + 128 * i, 4, "f32")
        for other in range(1, WARPS):
            more = ptx.load(here + other * plan.sum_bytes + 128 * i, 4, "f32")
            four = [a + b for a, b in zip(four, more, strict=True)]
        out += four
    return out


def _body(plan: Plan):
    s, c = plan.shape, plan.config

    def body(addresses: Sequence[V], shared: V) -> None:
        count = len(s.outputs)
        x, *rest = addresses
        each = 2 if s.symmetric else 3
        weights = [rest[i * each : (i + 1) * each] for i in range(count)]
        results = rest[count * each :]
        warpgroup = ptx.uniform(ptx.special("tid.x") >> 7)
        thread = ptx.special("tid.x") & 127
        warp = ptx.uniform(thread >> 5)
        item = ptx.special("ctaid.x") * c.warpgroups + warpgroup
        shared = shared + warpgroup * plan.item_bytes
        parts = sum(plan.output_blocks)
        part, split = item % parts, item // parts

        # The weight that this block works on.
        chosen = [*weights[0][:2], weights[0][-1], results[0], i32(s.outputs[0]), i32(0)]
        before = 0
        for i in range(1, count):
            before += plan.output_blocks[i - 1]
            other = [*weights[i][:2], weights[i][-1], results[i], i32(s.outputs[i]), i32(before)]
            mine = part >= before
            chosen = [ptx.select(mine, a, b) for a, b in zip(other, chosen, strict=True)]
        packed, scale, minimum, result, n, first_block = chosen
        first = (part - first_block) * plan.outputs + warp % c.beside * OUTPUTS
        width = i32(2 * s.groups * s.group_size)
        work = _Warp(plan, x, width, packed, scale, minimum, n, first)

        per, extra = divmod(s.groups, c.splits)
        begin = split * per + ptx.minimum(split, extra)
        end = begin + per + ptx.select(split < extra, i32(1), 0)
        end = ptx.select(item < plan.items, end, begin)
        ring = shared + warp * (c.stages * s.stage_bytes)
        begin = begin + warp // c.beside
        deepest = -(-s.groups // (c.splits * plan.sharing))

        def order(i: V | int, ahead: int) -> None:
            """Part `ahead` of the parts from step i on."""
            turn = i + ahead // s.parts
            turn = i32(turn) if isinstance(turn, int) else turn
            group = begin + turn * plan.sharing
            slot = (turn * s.parts + ahead % s.parts) % c.stages
            valid = group < end
            group = ptx.select(valid, group, i32(0))
            work.order(ring + slot * s.stage_bytes, group, ahead % s.parts, valid)
            ptx.copy_async_commit()

        for i in range(c.stages - 1):
            order(0, i)

        def inputs_of(i: V) -> list[V]:
            return work.activations(ptx.minimum(begin + i * plan.sharing, s.groups - 1))

        count = 8 * s.column_blocks * 4

        def step(i: V, carry: list[V]) -> list[V]:
            sums, inputs = carry, inputs_of(i)
            products = work.empty()
            for part in range(s.parts):
                order(i, part + c.stages - 1)
                ptx.copy_async_wait(c.stages - 1)
                ptx.sync_warp()
                stage = ring + ((i * s.parts + part) % c.stages) * s.stage_bytes
                # Past the end, zeros are read, and scaled by zeros.
                products = work.multiply(stage, inputs, part, products)
                if part == s.parts - 1:
                    sums = work.add(stage, products, sums)
                ptx.sync_warp()
            return sums

        zeros = [f32(0.0)] * count
        sums = ptx.loop(i32(0), i32(deepest), zeros, step)
        ptx.copy_async_wait(0)
        done = item < plan.items
        if plan.sharing > 1:
            sums = _add_warps(plan, shared, warpgroup, warp, work, sums)
            done = ptx.both(done, warp.equals(0))

        # Lane 4 g + q has rows 2q and 2q + 1 of each 8, and outputs 16 g … 16 g + 15.
        for b in range(s.column_blocks):
            for i in range(2):
                row = work.q * 2 + (8 * b + i)
                index = (split * s.rows + row).to_i64() * n.to_i64()
                column = first + work.g * 16
                at = result + (index + column.to_i64()) * 4

                def write(at: V = at, b: int = b, i: int = i) -> None:
                    for t in range(0, 8, 2):
                        two = [sums[((t + u) * s.column_blocks + b) * 4 :][:4] for u in range(2)]
                        four = [two[0][i], two[0][2 + i], two[1][i], two[1][2 + i]]
                        ptx.store(at + 8 * t, four)

                inside = ptx.both(row < s.rows, column < n)
                ptx.when(ptx.both(inside, done), write)

    return body


def unsupported(x: Any, weights: Sequence[QuantizedWeight]) -> str | None:
    """Why the kernel cannot do a call, or None."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    if x.dtype != jnp.bfloat16:
        return "activations have to be bfloat16"
    if not 1 <= rows <= MAX_ROWS:
        return f"there are {rows} rows; it takes up to {MAX_ROWS}"
    first = weights[0]
    if first.group_size not in (32, 64, 128):
        return f"the weight's group is {first.group_size}; it takes 32, 64 and 128"
    for w in weights:
        if (w.packed.shape[0], w.group_size) != (first.packed.shape[0], first.group_size):
            return "the weights' groups differ"
        if (w.minimum is None) != (first.minimum is None):
            return "some weights are symmetric and some are not"
        if w.scale.shape[-1] % 16:
            return f"a weight has {w.scale.shape[-1]} outputs; it takes multiples of 16"
    return None


def shape_of(x: Any, weights: Sequence[QuantizedWeight]) -> Shape:
    """The shape that a call specializes the kernel to."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    groups = weights[0].packed.shape[0]
    outputs = tuple(w.scale.shape[-1] for w in weights)
    return Shape(
        rows=rows,
        groups=groups,
        group_size=weights[0].group_size,
        outputs=outputs,
        symmetric=weights[0].minimum is None,
    )


def int4_matmuls(
    x: jax.Array, weights: Sequence[QuantizedWeight], *, config: Config
) -> list[jax.Array]:
    """See `pallas_kernels.int4_matmul.api.int4_matmuls`; bf16 activations."""
    shape = shape_of(x, weights)
    plan = Plan(shape, config)
    rows = x.reshape(shape.rows, x.shape[-1])
    missing = shape.groups * shape.group_size - x.shape[-1]
    if missing:
        rows = jnp.pad(rows, ((0, 0), (0, missing)))
    operands = [rows]
    for w in weights:
        operands += [w.packed, w.scale] + ([] if w.minimum is None else [w.minimum])
    parts = ptx.kernel(
        _body(plan),
        [jax.ShapeDtypeStruct((config.splits, shape.rows, n), jnp.float32) for n in shape.outputs],
        name="int4_matmul",
        blocks=plan.blocks,
        warpgroups=config.warpgroups,
        shared_bytes=plan.shared_bytes,
    )(*operands)
    return [y.sum(0).reshape(*x.shape[:-1], n) for y, n in zip(parts, shape.outputs, strict=True)]
