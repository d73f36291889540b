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
import functools
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
    cluster     0: as above. Else blocks of a cluster, 1 to 8, among which the input channels are
                dealt, and then among those of a block's warps that are on the same outputs (all
                its warps but for `beside`, 1, 2 or 4); all of them add up in shared memory
    whole       with a cluster: groups are dealt, not parts of groups
    line        bytes that L2 fetches around each 16: 0, 128 or 256
    """

    warpgroups: int
    stages: int
    splits: int
    beside: int = 4
    cluster: int = 0
    whole: bool = False
    line: int = 0


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
    def units(self) -> int:
        """Pieces that the input channels are dealt in, in a cluster."""
        return self.shape.groups * (1 if self.config.whole else self.shape.parts)

    @property
    def quads(self) -> int:
        """Fours of results of a cluster."""
        return self.shape.rows * self.outputs // 4

    @property
    def share(self) -> int:
        """Fours of results that a block of a cluster adds up and writes."""
        return -(-self.quads // self.config.cluster)

    @property
    def row_bytes(self) -> int:
        """A row of a warp's sums, padded against bank conflicts."""
        return 4 * OUTPUTS + 16

    @property
    def sharing(self) -> int:
        """Warps that share the groups of an item's outputs."""
        warps = WARPS * (self.config.warpgroups if self.config.cluster else 1)
        return warps // self.config.beside

    @property
    def sum_bytes(self) -> int:
        """A warp's sums, where they are added to others'."""
        if self.config.cluster:
            return self.shape.rows * self.row_bytes
        return 8 * self.shape.column_blocks * OUTPUTS * 4 if self.sharing > 1 else 0

    @property
    def blocks(self) -> int:
        if self.config.cluster:
            return sum(self.output_blocks) * self.config.cluster
        return -(-self.items // self.config.warpgroups)

    @property
    def item_bytes(self) -> int:
        """Shared memory of a warpgroup: its warps' rings, and their sums in the end."""
        return WARPS * max(self.config.stages * self.shape.stage_bytes, self.sum_bytes)

    @property
    def inbox_bytes(self) -> int:
        """Where the blocks of a cluster leave what another one adds up."""
        return 16 * self.config.cluster * self.share if self.config.cluster > 1 else 0

    @property
    def shared_bytes(self) -> int:
        return self.config.warpgroups * self.item_bytes + self.inbox_bytes


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

    def order(
        self, stage: V, group: V, part: V | int, *, numbers: bool = True, valid: V | None = None
    ) -> None:
        """Start the loads of a part of a group: rows of 128 bytes, 16-byte chunks swizzled.

        Lanes q own runs of rows of the group; a part has a piece of each run. `numbers`: with the
        group's scales and minima. Zeros where not `valid`.
        """
        s = self.plan.shape
        line = {"line": self.plan.config.line} if self.plan.config.line else {}
        run, piece = s.group_size // 8, s.stage_rows // 4

        def inside(column: V) -> tuple[V, V]:
            """The column, or one that can be read, and how much of 16 bytes to read there."""
            ok = column < self.n
            size = ptx.select(ok, i32(16), 0)
            return ptx.select(ok, column, i32(0)), (
                size if valid is None else ptx.select(valid, size, i32(0))
            )

        chunk, eighth = self.lane & 7, self.lane >> 3
        here, size = inside(self.first + chunk * 16)
        base = self.packed + (group * (s.group_size // 2) + part * piece).to_i64() * self.n.to_i64()
        offset = eighth * self.n + here
        for i in range(s.stage_rows // 4):
            owner, within = divmod(4 * i, piece)  # the same owner for the four rows
            target = stage + (eighth + 4 * i) * 128 + (chunk ^ (owner * 2)) * 16
            at = offset + self.n * (owner * run + within)
            ptx.copy_async(target, base + at.to_i64(), size, **line)
        if not numbers:
            return
        # Lanes 0–15: scales; 16–31: minima.
        here, size = inside(self.first + (self.lane & 15) * 8)
        of = ptx.select(self.lane < 16, self.scale, self.minimum)
        source = of + (group.to_i64() * self.n.to_i64() + here.to_i64()) * 2
        ptx.copy_async(stage + s.stage_rows * 128 + self.lane * 16, source, size)

    def activations(self, group: V, part: V | int = 0, parts: int = 1) -> list[V]:
        """The rows' inputs of `parts` parts of a group, words of two.

        [column blocks][halves of the group][steps of 16 channels]
        """
        s = self.plan.shape
        words = s.group_size // 16 // s.parts
        out: list[V] = []
        for n in range(s.column_blocks):
            # Rows beyond the last repeat it; nobody reads their results.
            row = ptx.minimum(self.g + 8 * n, s.rows - 1)
            channel = group * s.group_size + self.q * (s.group_size // 8) + part * (2 * words)
            at = self.x + (row * self.row_bytes + channel * 2).to_i64()
            out += ptx.load_wide(at, words * parts)
            out += ptx.load_wide(at + s.group_size, words * parts)
        return out

    def empty(self) -> list[V]:
        """Sums before any product: [8 tiles and Σ x][column blocks][4]."""
        return [f32(0.0)] * (9 * self.plan.shape.column_blocks * 4)

    def multiply(self, stage: V, inputs: list[V], sums: list[V]) -> list[V]:
        """sums += a part of a group: products with 128 + code, and with ones."""
        s = self.plan.shape
        blocks, steps = s.column_blocks, s.group_size // 16 // s.parts
        out = [sums[4 * i :][:4] for i in range(9 * blocks)]
        ones, magic = i32(ONES), i32(MAGIC)
        here = stage + self.q * (s.stage_rows // 4 * 128) + (self.g ^ (self.q * 2)) * 16
        for i in range(steps):
            b = [[inputs[(2 * n + half) * steps + i] for half in (0, 1)] for n in range(blocks)]
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


def _chosen(plan: Plan, weights: list[list[V]], results: list[V], block: V) -> list[V]:
    """Of the weight that a block of outputs is of: codes, scales, minima, result, outputs, block.

    The last: its first block of outputs.
    """
    s = plan.shape
    chosen = [*weights[0][:2], weights[0][-1], results[0], i32(s.outputs[0]), i32(0)]
    before = 0
    for i in range(1, len(s.outputs)):
        before += plan.output_blocks[i - 1]
        other = [*weights[i][:2], weights[i][-1], results[i], i32(s.outputs[i]), i32(before)]
        mine = block >= before
        chosen = [ptx.select(mine, a, b) for a, b in zip(other, chosen, strict=True)]
    return chosen


def _cluster_body(plan: Plan):
    """The kernel whose blocks add up what they have of the same outputs."""
    s, c = plan.shape, plan.config
    parts = s.parts if c.whole else 1  # of a unit
    threads = 32 * WARPS * c.warpgroups

    def body(addresses: Sequence[V], shared: V) -> None:
        x, *rest = addresses
        each = 2 if s.symmetric else 3
        weights = [rest[i * each : (i + 1) * each] for i in range(len(s.outputs))]
        results = rest[len(s.outputs) * each :]
        thread = ptx.special("tid.x")
        warp = ptx.uniform(thread >> 5)
        rank, block = ptx.special("ctaid.x") % c.cluster, ptx.special("ctaid.x") // c.cluster
        packed, scale, minimum, result, n, before = _chosen(plan, weights, results, block)
        outputs = (block - before) * plan.outputs
        first = outputs + warp % c.beside * OUTPUTS
        width = i32(2 * s.groups * s.group_size)
        work = _Warp(plan, x, width, packed, scale, minimum, n, first)

        begin, end = rank * plan.units // c.cluster, (rank + 1) * plan.units // c.cluster
        begin = begin + warp // c.beside
        turns = ptx.ceil_div(ptx.at_least(end - begin, 0), plan.sharing)
        warp_bytes = plan.item_bytes // WARPS
        ring = shared + warp * warp_bytes

        def place(turn: V, part: int) -> tuple[V, V, V | int]:
            """A part of this warp's: its unit, its group, and where it is in the group."""
            unit = begin + turn * plan.sharing
            if parts == s.parts:
                return unit, unit, part
            return unit, unit // s.parts, unit % s.parts

        def order(turn: V, ahead: int) -> None:
            """Part `ahead` of the parts from a turn on."""
            turn, part = turn + ahead // parts, ahead % parts
            unit, group, where = place(turn, part)
            slot = (turn * parts + part) % c.stages
            numbers = part == parts - 1
            stage = ring + slot * s.stage_bytes
            ptx.when(unit < end, lambda: work.order(stage, group, where, numbers=numbers))
            ptx.copy_async_commit()

        def inputs_of(turn: V, ahead: int) -> list[V]:
            turn, part = turn + ahead // parts, ahead % parts
            _, group, where = place(turn, part)
            return work.activations(ptx.minimum(group, s.groups - 1), where)

        def step(turn: V, carry: list[V]) -> list[V]:
            sums, inputs = carry[:count], carry[count:]
            products = work.empty()
            for part in range(parts):
                order(turn, part + c.stages - 1)
                following = inputs_of(turn, part + 1)
                ptx.copy_async_wait(c.stages - 1)
                ptx.sync_warp()
                stage = ring + ((turn * parts + part) % c.stages) * s.stage_bytes
                products = work.multiply(stage, inputs, products)
                if part == parts - 1:
                    sums = work.add(stage, products, sums)
                ptx.sync_warp()
                inputs = following
            return [*sums, *inputs]

        count = 8 * s.column_blocks * 4
        order(i32(0), 0)
        inputs = inputs_of(i32(0), 0)  # not behind all of the weight
        for ahead in range(1, c.stages - 1):
            order(i32(0), ahead)
        sums = ptx.loop(i32(0), turns, [*[f32(0.0)] * count, *inputs], step)[:count]

        # Its ring is empty: a warp leaves its sums there, rows of 128.
        for b in range(s.column_blocks):
            for i in range(2):
                row = work.q * 2 + (8 * b + i)
                at = ring + row * plan.row_bytes + work.g * 64

                def keep(at: V = at, b: int = b, i: int = i) -> None:
                    for t in range(0, 8, 2):
                        ptx.store(at + 8 * t, _four(sums, s.column_blocks, t, b, i))

                ptx.when(row < s.rows, keep)
        ptx.sync_threads(i32(1), threads)

        def quad(index: V) -> tuple[V, V, V]:
            """Where four results are: block of 128 outputs, row, output in the block."""
            row = index // (OUTPUTS // 4)
            return row // s.rows, row % s.rows, index % (OUTPUTS // 4) * 4

        def write(index: V, four: list[V]) -> None:
            column, row, output = quad(index)
            output = outputs + column * OUTPUTS + output
            at = result + (row.to_i64() * n.to_i64() + output.to_i64()) * 4
            ptx.when(output < n, lambda: ptx.store(at, four))

        inbox = shared + c.warpgroups * plan.item_bytes

        def add_warps(index: V) -> None:
            column, row, output = quad(index)
            at = shared + column * warp_bytes + row * plan.row_bytes + output * 4
            four = _added(at, c.beside * warp_bytes, plan.sharing)
            if c.cluster == 1:
                write(index, four)
                return
            to, slot = index // plan.share, index % plan.share
            slot = inbox + (rank * plan.share + slot) * 16
            ptx.store_peer(ptx.peer_address(slot, to), four)

        for i in range(0, plan.quads, threads):
            index = thread + i
            ptx.when(index < plan.quads, functools.partial(add_warps, index))
        if c.cluster == 1:
            return
        ptx.sync_cluster()
        for i in range(0, plan.share, threads):
            slot = thread + i
            index = rank * plan.share + slot

            def finish(slot: V = slot, index: V = index) -> None:
                write(index, _added(inbox + slot * 16, 16 * plan.share, c.cluster))

            ptx.when(ptx.both(slot < plan.share, index < plan.quads), finish)

    return body


def _added(at: V, step: int, count: int) -> list[V]:
    """Fours of floats in shared memory, `step` bytes apart, added in order."""
    fours = [ptx.load(at + i * step, 4, "f32") for i in range(count)]
    out = fours[0]
    for four in fours[1:]:
        out = [a + b for a, b in zip(out, four, strict=True)]
    return out


def _four(sums: list[V], blocks: int, t: int, b: int, i: int) -> list[V]:
    """Sums of four neighbouring outputs, from those of tile t on, in row 2q + i of column block b.

    Lane 4 g + q has rows 2q and 2q + 1 of each 8, and outputs 16 g … 16 g + 15.
    """
    two = [sums[((t + u) * blocks + b) * 4 :][:4] for u in range(2)]
    return [two[0][i], two[0][2 + i], two[1][i], two[1][2 + i]]


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

        packed, scale, minimum, result, n, first_block = _chosen(plan, weights, results, part)
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
            last = ahead % s.parts == s.parts - 1
            stage = ring + slot * s.stage_bytes
            work.order(stage, group, ahead % s.parts, numbers=last, valid=valid)
            ptx.copy_async_commit()

        for i in range(c.stages - 1):
            order(0, i)

        def inputs_of(i: V) -> list[V]:
            group = ptx.minimum(begin + i * plan.sharing, s.groups - 1)
            return work.activations(group, parts=s.parts)

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
                words = len(inputs) // (2 * s.column_blocks * s.parts)
                mine = [
                    inputs[(j * s.parts + part) * words + k]
                    for j in range(2 * s.column_blocks)
                    for k in range(words)
                ]
                products = work.multiply(stage, mine, products)
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

        for b in range(s.column_blocks):
            for i in range(2):
                row = work.q * 2 + (8 * b + i)
                index = (split * s.rows + row).to_i64() * n.to_i64()
                column = first + work.g * 16
                at = result + (index + column.to_i64()) * 4

                def write(at: V = at, b: int = b, i: int = i) -> None:
                    for t in range(0, 8, 2):
                        ptx.store(at + 8 * t, _four(sums, s.column_blocks, t, b, i))

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
    splits = () if config.cluster else (config.splits,)
    parts = ptx.kernel(
        _cluster_body(plan) if config.cluster else _body(plan),
        [jax.ShapeDtypeStruct((*splits, shape.rows, n), jnp.float32) for n in shape.outputs],
        name="int4_matmul",
        blocks=plan.blocks,
        warpgroups=config.warpgroups,
        shared_bytes=plan.shared_bytes,
        cluster=max(1, config.cluster),
    )(*operands)
    if config.cluster:
        shapes = [(*x.shape[:-1], n) for n in shape.outputs]
        return [y.reshape(to) for y, to in zip(parts, shapes, strict=True)]
    return [y.sum(0).reshape(*x.shape[:-1], n) for y, n in zip(parts, shape.outputs, strict=True)]
