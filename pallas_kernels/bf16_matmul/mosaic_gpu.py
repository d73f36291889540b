"""Products of a few rows with bfloat16 weights on Hopper and later (Pallas Mosaic GPU).

Weights are read where they lie, as the prompt's products (cuBLAS) read them: [Kin, N], or, an
embedding that is the lm_head too, [N, Kin]. What is read, once: 2 bytes a weight, for all rows and
all weights of a pass.

A block has a *tile*, 64 outputs of a weight, or more, or 64 of gate and 64 of up, or 64 of heads'
first halves and the 64 that they rotate with (`products.append`); and all input channels, or, with
clusters, an even share of them. Its warps share the channels, 32 at a time, a *chunk*. Of a chunk
and 64 outputs the lanes of a warp copy 8 pieces of 16 bytes each into shared memory; no two warps
wait for each other before a tile is multiplied. Lane 4 g + q multiplies the outputs 8g … 8g + 7 and
the channels 8q … 8q + 7:

               [Kin, N]                            [N, Kin]
    piece i    channel 8q + i, its 8 outputs       output 8g + i, its 8 channels
    copied by  lane 8 q + g: 8 neighbouring lanes  lane 4 g + q: 4 neighbouring lanes read 64 bytes,
               read 128 bytes                      L2 fetches 256 at once (`Config.line`)

What neighbouring lanes read counts. Measured on an H200 while lane 4 g + q copied of [Kin, N] what
it multiplies, so that eight of them read four times 32 bytes: 1,536 → 2 × 8,960 took 30 µs, as long
without its products, and 6 without its copies; reads alone, in the same order but 128 bytes at a
time, take 14.5. Since they copy as above it is 14.9. Asking L2 for rows ahead took longer, 50.

Outputs are the rows of m16n8k16 products, activations their 8 columns. Which outputs and channels
stand for which row and k is free as long as both operands agree: product j has in its rows g and
g + 8 the outputs 8g + 2j and 8g + 2j + 1, and a lane's 4 words of activations are its 8 channels.
So words of the second layout are operands as they are, and two of the first make two operands by a
permutation of bytes each. A lane's sums are 8 neighbouring outputs of rows 2q and 2q + 1.

Blocks are as many as the chip runs at once, and take a tile after the other: the first weights of
the next tile are on their way while the last one's sums are added up.

Where tiles are no multiple of the multiprocessors, some have one more: of 224 for gate and up of
Llama-3.1-8B, which take 59 µs in a verification, 92 of 132, and the last half is read at 3.2 TB/s.
Yet it takes as long (−0.1 to +2.0 µs, four configurations) where the 92 are split evenly among all
blocks, which leave their sums to each other in memory. Split so, gate and up of Llama-2-7B take 3
µs less in plain decoding, 0.5% of a layer after 131,072 tokens, and 1 to 2 more in a verification,
and those of Qwen2.5-1.5B 7 to 8 more. Tiles of 56 outputs, 2 each, took 25 µs longer; their rows
are no whole lines of 128 bytes, which was not traced further. To let the next launch begin with a
block's last tile, not behind its products, took a step 1.5% longer (plain decoding and
verification).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, ptx
from pallas_kernels.collectives.meeting import Meeting
from pallas_kernels.products import inputs as staging
from pallas_kernels.products.around import NOTHING, PLAIN, Around, Form, rows_of
from pallas_kernels.products.given import Finish, Given
from pallas_kernels.products.inputs import Inputs, Staged
from pallas_kernels.products.sums import Sums
from pallas_kernels.ptx import V, f32, i32

MAX_ROWS = 16
OUTPUTS, CHANNELS = 64, 32  # of a unit: what a lane's 8 pieces are of, in all lanes
UNIT_BYTES = 2 * OUTPUTS * CHANNELS
LOW_HALVES, HIGH_HALVES = 0x5410, 0x7632  # of two words


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is laid on the chip.

    warpgroups  a block
    stages      chunks that a warp has in shared memory, read or in flight
    units       of 64 outputs each, that a warp has of a weight
    cluster     blocks, 1 to 8, that have the same tile and share the input channels
    resident    blocks a multiprocessor, of those that take a tile after the other
    across      warps that lie side by side in a tile; such rows of warps share the input channels
    line        bytes, 0 or 256, that L2 fetches around a copy
    """

    warpgroups: int
    stages: int
    units: int = 1
    cluster: int = 1
    resident: int = 1
    across: int = 1
    line: int = 0


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is specialized to: rows, input channels, outputs of each weight, whether
    weights are [N, Kin], and what stands around the products."""

    rows: int
    inputs: int
    outputs: tuple[int, ...]
    transposed: bool
    form: Form = PLAIN

    @property
    def column_blocks(self) -> int:
        return -(-self.rows // 8)

    @property
    def chunks(self) -> int:
        return self.inputs // CHANNELS


@dataclasses.dataclass(frozen=True)
class Plan:
    """Counts and bytes that follow from a shape and a configuration."""

    shape: Shape
    config: Config
    multiprocessors: int

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return 4 * self.config.warpgroups

    @property
    def rows_of_warps(self) -> int:
        """That share a block's channels."""
        return self.warps // self.config.across

    @property
    def warp_outputs(self) -> int:
        return OUTPUTS * self.config.units

    @property
    def tile_outputs(self) -> int:
        return self.warp_outputs * self.config.across

    @property
    def tiles(self) -> list[int]:
        """Of each weight; of gate and up together."""
        s = self.shape
        outputs = s.outputs[:1] if s.form.gated else s.outputs
        wide = self.tile_outputs * (2 if s.form.append else 1)
        return [-(-n // wide) for n in outputs]

    @property
    def blocks(self) -> int:
        """With clusters each has one tile."""
        tiles, c = sum(self.tiles), self.config
        if c.cluster > 1:
            return tiles * c.cluster
        return min(tiles, self.multiprocessors * c.resident)

    @property
    def units(self) -> int:
        """Of a warp, with all parts."""
        return self.config.units * self.shape.form.parts

    @property
    def stage_bytes(self) -> int:
        return self.units * UNIT_BYTES

    @property
    def sums(self) -> Sums:
        s, threads = self.shape, 32 * self.warps
        sizes = (s.rows, self.tile_outputs, s.form.parts, self.rows_of_warps, self.config.cluster)
        return Sums(*sizes, threads)

    @property
    def staged(self) -> Staged:
        """The activations: of a share of the channels, of all where they are normed."""
        s = self.shape
        most = s.chunks if s.form.norm else -(-s.chunks // self.config.cluster)
        return Staged(s.rows, s.inputs, most * CHANNELS, s.form.norm, self.warps)

    @property
    def kept(self) -> int:
        """Where the warps leave their sums."""
        return self.warps * self.config.stages * self.stage_bytes

    @property
    def inbox(self) -> int:
        """Where the cluster's sums lie, after the rings and the warps' sums."""
        return self.kept + self.rows_of_warps * self.sums.warp_bytes

    @property
    def inputs(self) -> int:
        """Where the activations lie."""
        return self.inbox + self.sums.inbox_bytes

    @property
    def shared_bytes(self) -> int:
        return self.inputs + self.staged.num_bytes


class _Tile:
    """A tile: of which product, and which of its results (`first` … below `end`)."""

    def __init__(self, plan: Plan, given: Given, tile: V):
        self.plan = plan
        self.product, tile = given.chosen(plan.tiles, tile)
        form, self.outputs = plan.shape.form, self.product.outputs
        self.weights = given.weights if form.gated else [self.product.weight]
        self.first = tile * plan.tile_outputs
        self.end = self.outputs // 2 if form.append else self.outputs

    def units(self, place: V, g: V) -> list[tuple[V, V]]:
        """Of each unit of the warp at a place in its row: its weight, and the first of a lane's 8
        outputs, held inside the weight (nobody reads the results beyond)."""
        wide, append = self.plan.warp_outputs, self.plan.shape.form.append
        first, offsets = self.first + place * wide + g * 8, range(0, wide, OUTPUTS)
        columns = [ptx.minimum(first + x, self.end - 8) for x in offsets]
        if append:
            half = append.channels // 2
            pairs = [x // half * append.channels + x % half for x in columns]
            return [(self.weights[0], x + offset) for offset in (0, half) for x in pairs]
        return [(weight, column) for weight in self.weights for column in columns]


class _Ring:
    """A lane's pieces of chunk after chunk, tile after tile.

    The cursor, carried through the loops: the slot of the next chunk to be read, which the next one
    to be ordered takes over; and the latter's tile and chunk.
    """

    def __init__(self, plan: Plan, tile_of: Callable[[V], _Tile], data: V, place: V, lane: V):
        self.plan, self.tile_of, self.place = plan, tile_of, place
        # Eight neighbouring lanes copy what lies together: 128 bytes, or twice 64.
        split = (lane >> 2, lane & 3) if plan.shape.transposed else (lane & 7, lane >> 3)
        self.data, self.lane, (self.g, self.q) = data, lane, split
        self.step = plan.blocks // plan.config.cluster

    def start(self, tile: V, first: V, end: V) -> list[V]:
        """Order the first chunk of a warp whose chunks of each tile are first, first + rows of
        warps, … below `end`: a group of copies, as each further one. The cursor."""
        self.first, self.end = first, end
        # A warp without chunks orders nothing.
        self.tiles = ptx.select(first < end, i32(sum(self.plan.tiles)), 0)
        return self.order([i32(0), tile, first])

    def order(self, cursor: list[V]) -> list[V]:
        """Order the chunk at the cursor, if there is one, into its slot."""
        slot, tile, chunk = cursor
        target = self._at(slot) + _place(self.g, self.q)
        ptx.when(tile < self.tiles, lambda: self._copy(target, tile, chunk))
        ptx.commit_copies()
        slot, following = slot + 1, chunk + self.plan.rows_of_warps
        done = following >= self.end
        return [
            ptx.select(slot < self.plan.config.stages, slot, i32(0)),
            ptx.select(done, tile + self.step, tile),
            ptx.select(done, self.first, following),
        ]

    def wait(self, cursor: list[V]) -> V:
        """Where this lane's pieces of the chunk to be read are, once all lanes' are there."""
        ptx.wait_copies(self.plan.config.stages - 1)
        ptx.sync_warp()
        return self._at(cursor[0]) + _place(self.lane >> 2, self.lane & 3)

    def _at(self, slot: V) -> V:
        return self.data + slot * self.plan.stage_bytes

    def _copy(self, target: V, tile: V, chunk: V) -> None:
        s = self.plan.shape
        channel = chunk * CHANNELS + self.q * 8
        here = self.tile_of(tile)
        for unit, (weight, output) in enumerate(here.units(self.place, self.g)):
            if s.transposed:
                row, column, step = output, channel, i32(2 * s.inputs).to_i64()
            else:
                row, column, step = channel, output, here.outputs.to_i64() * 2
            source = weight + row.to_i64() * step + (column * 2).to_i64()
            for i in range(8):
                ptx.unit_copy(target + (unit * UNIT_BYTES + 512 * i), source, self.plan.config.line)
                source = source + step


def _place(g: V, q: V) -> V:
    """Where the pieces of 8 outputs and 8 channels lie among the warp's. Eight lanes that copy have
    one q, eight that read two g: both reach all banks."""
    return q * 128 + ((g + q * 2) & 7) * 16


class _Warp:
    """What one warp computes, from its lanes' pieces and the block's activations."""

    def __init__(self, plan: Plan, inputs: Inputs, place: V, lane: V):
        self.plan, self.inputs, self.place = plan, inputs, place
        self.g, self.q = lane >> 2, lane & 3
        self.sums = plan.units * 4 * plan.shape.column_blocks * 4

    def activations(self, chunk: V) -> list[list[V]]:
        """4 words of 2 channels each, for each 8 rows (those beyond the last repeat it)."""
        s = self.plan.shape
        rows = [ptx.minimum(self.g + 8 * n, s.rows - 1) for n in range(s.column_blocks)]
        channel = chunk * CHANNELS + self.q * 8
        return [ptx.load(self.inputs.at(row, channel), 4) for row in rows]

    def add_chunk(self, where: V, x: list[list[V]], sums: list[V]) -> list[V]:
        """sums [units][4 products][column blocks][4] += a chunk's products."""
        out: list[V] = []
        for unit in range(self.plan.units):
            at = where + unit * UNIT_BYTES
            pieces = [ptx.load(at + 512 * i, 4) for i in range(8)]
            for j in range(4):
                steps = [self._operand(pieces, j, step) for step in range(2)]
                for words in x:
                    four = sums[len(out) : len(out) + 4]
                    for step, operand in enumerate(steps):
                        four = ptx.mma("bf16", operand, words[2 * step : 2 * step + 2], four)
                    out += four
        return out

    def _operand(self, pieces: list[list[V]], j: int, step: int) -> list[V]:
        """Outputs 8g + 2j and 8g + 2j + 1 of a lane's channels 4 step … 4 step + 3."""
        if self.plan.shape.transposed:
            return [pieces[2 * j + i % 2][2 * step + i // 2] for i in range(4)]
        pairs = [(pieces[k][j], pieces[k + 1][j]) for k in (4 * step, 4 * step + 2)]
        halves = (LOW_HALVES, HIGH_HALVES)
        return [ptx.permute_bytes(a, b, half) for a, b in pairs for half in halves]

    def keep(self, where: V, sums: list[V]) -> None:
        """Leave sums in shared memory, as `products.sums` takes them."""
        s, layout = self.plan.shape, self.plan.sums
        for n in range(s.column_blocks):
            for i in range(min(2, s.rows - 8 * n)):
                row = self.q * 2 + (8 * n + i)
                column = self.place * self.plan.warp_outputs + self.g * 8
                at = where + row * layout.row_bytes + column * 4
                put = functools.partial(self._put, at, sums, n, i)
                ptx.when(row < s.rows, put)

    def _put(self, at: V, sums: list[V], n: int, i: int) -> None:
        """A row's 8 sums of each unit."""
        p, blocks = self.plan, self.plan.shape.column_blocks
        for unit in range(p.units):
            part, here = divmod(unit, p.config.units)
            offset = 4 * (p.tile_outputs * part + OUTPUTS * here)
            fours = [sums[((unit * 4 + j) * blocks + n) * 4 :][:4] for j in range(4)]
            eight = [x for four in fours for x in (four[i], four[2 + i])]
            for half in range(2):
                ptx.store(at + (offset + 16 * half), eight[4 * half : 4 * half + 4])


def _body(plan: Plan, out_bytes: int, eps: float) -> Callable[[Sequence[V], V], None]:
    s, c, form = plan.shape, plan.config, plan.shape.form

    def body(addresses: Sequence[V], shared: V) -> None:
        given = Given(form, s.outputs, addresses)
        thread = ptx.special("tid.x")
        lane, warp = thread & 31, ptx.uniform(thread >> 5)
        rank, first_tile = ptx.special("ctaid.x") % c.cluster, ptx.special("ctaid.x") // c.cluster
        begin, end = (i * s.chunks // c.cluster for i in (rank, rank + 1))
        place = warp % c.across
        line = warp // c.across
        first = begin + line

        def tile_of(tile: V) -> _Tile:
            return _Tile(plan, given, tile)

        staged_from = i32(0) if form.norm else begin * CHANNELS
        inputs = Inputs(plan.staged, shared + plan.inputs, given.x, staged_from, thread)
        ring_bytes = c.stages * plan.stage_bytes
        ring = _Ring(plan, tile_of, shared + warp * ring_bytes, place, lane)
        work, sums = _Warp(plan, inputs, place, lane), plan.sums
        kept = shared + plan.kept

        # The first weights before all else, the others behind the activations: these would have to
        # wait for all of them.
        cursor = ring.start(first_tile, first, end)

        def order_the_others() -> None:
            nonlocal cursor
            for _ in range(c.stages - 1):
                cursor = ring.order(cursor)

        mine = sums.mine(thread, rank)
        finish = Finish(sums, given, mine, out_bytes)
        inputs.bring(given.norm, eps, order_the_others)
        turns = ptx.ceil_div(ptx.at_least(end - first, 0), plan.rows_of_warps)

        def step(turn: V, carry: list[V]) -> list[V]:
            cursor = carry[work.sums :]
            words = work.activations(first + turn * plan.rows_of_warps)
            found = work.add_chunk(ring.wait(cursor), words, carry[: work.sums])
            ptx.sync_warp()  # the slot has been read: it is for the next chunk
            return [*found, *ring.order(cursor)]

        def one_tile(tile: V, cursor: list[V]) -> list[V]:
            here = tile_of(tile)
            out = finish.of(here.product, here.first, here.end)
            added = out.ahead(mine)
            meeting = None if given.peers is None else Meeting(given.peers, form.devices)
            carry = ptx.loop(i32(0), turns, [f32(0.0)] * work.sums + cursor, step)
            work.keep(kept + line * sums.warp_bytes, carry[: work.sums])
            ptx.sync_threads(i32(1), 32 * plan.warps)
            ptx.when(tile + ring.step >= sum(plan.tiles), ptx.let_next_begin)

            inbox = shared + plan.inbox
            out.finish(kept, sums.warp_bytes, inbox, thread, rank, added, meeting)
            ptx.sync_threads(i32(1), 32 * plan.warps)  # before others' sums come
            return carry[work.sums :]

        ptx.loop(first_tile, i32(sum(plan.tiles)), cursor, one_tile, step=ring.step)

    return body


def shape_of(
    x: Any, weights: Sequence[Any], around: Around = NOTHING, transposed: bool = False
) -> Shape:
    """The shape that a call specializes the kernel to."""
    outputs = tuple(w.shape[0 if transposed else 1] for w in weights)
    return Shape(rows_of(x), x.shape[-1], outputs, transposed, around.form)


def unsupported(
    x: Any, weights: Sequence[Any], around: Around, transposed: bool = False
) -> str | None:
    """Why the kernel cannot do a call, or None."""
    shape = shape_of(x, weights, around, transposed)
    reason = around.append.unsupported(8) if around.append else None
    if reason:
        return reason
    if any(array.dtype != jnp.bfloat16 for array in (x, *weights)):
        return "activations and weights have to be bfloat16"
    if not 1 <= shape.rows <= MAX_ROWS:
        return f"there are {shape.rows} rows; it takes up to {MAX_ROWS}"
    if shape.inputs % CHANNELS:
        return f"there are {shape.inputs} input channels; it takes multiples of {CHANNELS}"
    if any(n % 8 for n in shape.outputs):
        return f"the weights have {shape.outputs} outputs; it takes multiples of 8"
    device = dispatch.target()
    split = 8 if device.generation.clusters and not shape.form.norm else 1
    plan = Plan(shape, Config(1, 1, cluster=split), device.multiprocessors)
    return staging.unsupported(plan.staged, device.usable_bytes * 3 // 8)


def bf16_matmuls(
    x: jax.Array,
    weights: Sequence[jax.Array],
    around: Around = NOTHING,
    *,
    config: Config,
    multiprocessors: int,
    transposed: bool = False,
    out_dtype: Any = jnp.float32,
) -> list[jax.Array]:
    """See `pallas_kernels.bf16_matmul.api.bf16_matmuls`."""
    shape = shape_of(x, weights, around, transposed)
    plan = Plan(shape, config, multiprocessors)
    form = shape.form
    dtype = form.result_dtype(out_dtype)
    rows = x.reshape(shape.rows, shape.inputs)
    operands, ahead = around.operands(rows, weights, shape.outputs)
    found = ptx.kernel(
        _body(plan, dtype.itemsize, around.eps),
        form.results(shape.rows, shape.outputs, dtype),
        name="bf16_matmul",
        blocks=plan.blocks,
        warpgroups=config.warpgroups,
        shared_bytes=plan.shared_bytes,
        cluster=config.cluster,
        updated=form.updated,
        ahead=ahead,
    )(*operands)
    return form.shaped(found, x.shape[:-1])
