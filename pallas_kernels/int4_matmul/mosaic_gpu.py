"""Products of a few rows with packed 4-bit weights from Ampere on (Pallas Mosaic GPU).

What is read, once: codes (half a byte a weight), scales and minima (4 bytes for a group of 128),
for all rows and all weights of a pass (gate and up, or q, k and v, are one launch). Weights are
*tiled* (`layout.TiledWeight`): strips of 16 outputs and a group of inputs, 1,088 bytes for a group
of 128. A block has a few neighbouring strips, all of whose bytes of a group are one piece of
memory, and all groups of input channels, or, with clusters, an even share of them:

    groups    | 0      | 1      | 2      | ...       the blocks of a cluster, then a block's warps,
    warp 0    | strips |        |        | ...       share the groups
    warp 1    |        | strips |        | ...
    sums      each warp's in its own registers; then over the block's warps in shared memory; then
              over the cluster's blocks in each other's shared memory

What stands around the products (`products.around`) is in the same launch: of gate and up a block
has the same strips, of heads those of both halves, two pieces of each group; what is added to the
results is asked for before the first product. Activations are brought into shared memory at once,
and normed there, unless they are many (`MOST_STAGED`): a warp's groups are then read from memory, a
turn ahead.

Where launches begin early (`ptx.launch`), the first pieces are ordered while the launch before this
one ends. What is left is a chain of waits, for the activations and for each other; that is why they
are staged: in turns, 8,960 → 1,536 waited for L2 five times.

A piece is one bulk copy into a ring that a warp has for itself: its first lane orders the first
pieces before anything else, and a further one when the warp is done with one. No two warps wait
for each other before all groups are multiplied.

Outputs are the rows of m16n8k16 products, activations their 8 columns. A word of a strip is one
lane's part of one product: four bits at the end of a bf16 are code · 2⁻¹³³, exactly, a subnormal,
and four bits further up 16 times that, so that one shift and four `and` convert 8 codes. Every
other output is 16 times too large, which its scale makes good. Activations are taken 2⁶⁴ times, so
that products are normal numbers of float32: below 2⁶⁴ they may have any size. The group's scale
multiplies the group's sums, in float32; minima go with Σ x, which is a product with ones.

Floor: the bytes over the read ceiling. Reached on an H200 that reads 4,601 GB/s, µs and per cent
(the last row: while choosing its configuration):

    inputs → outputs              floor    one row       8 rows
    4,096 → 2 × 11,008            10.4     13.7  76%     14.1  74%
    4,096 → 2 × 14,336            13.6     17.1  79%     17.9  76%
    11,008 → 4,096                 5.2      7.7  67%      8.5  61%
    14,336 → 4,096                 6.8      9.3  73%     10.2  67%
    4,096 → 3 × 4,096              5.8      8.4  69%      9.3  62%
    4,096 → 4,096                  1.9      4.5  43%      5.0  39%
    4,096 → 128,256               61.8     67.7  89%     70.0  86%

What bounds it, on 11,008 → 4,096: bringing the weights into shared memory takes 7.2 µs by itself,
0.7 of them an empty kernel. Products added 0.9 when 8 codes took 7 instructions, for all warps get
their last pieces at about the same time; with 5 it is 0.3 less. Activations of 8 rows add 0.7: each
of 128 blocks reads all of them, 22 MB together, from L2 (from L1 they would add 0.1). Two things
count there: lanes that read whole sectors (`layout.TiledWeight`), worth 0.8, and blocks that begin
at different groups, worth 0.5 to 0.8, since one place of L2 would else serve everyone at a time.

Tried without gain, in launches that do not begin early: activations one turn earlier (+0.5 to 1),
by the copy engine (+0.6) or by asynchronous copies (+0.4) into shared memory; more stages (+1:
activations wait behind weights); twice the strips, with clusters of two that share the groups, so
that half of the activations are read (+0.6: leaving sums to each other takes longer); clusters of
four (+7: it seems that they do not all fit on the chip at once); more sums, for shorter chains of
products (±0).

Tried without gain, in the draft step of Llama-3.1-8B where launches begin early: twice the warps,
side by side with a half of the strips each (gate and up ±0.1 µs of 16.5, o, down and q, k, v 0.1 to
3 longer); each launch, while it ends, asking L2 for the first 8 MB of what the next one reads (+2%;
20 MB: +8%). The step's launches by a clock read in each block (`%globaltimer`), in µs after the end
of the one before, medians over blocks:

                  begins    waited    inputs staged    multiplied (last block)    written
    q, k, v       −8.4      0.0       0.8              3.6 (4.6)                  4.9
    attention     −1.3      1.5                        9.2 (10.5)                 10.9
    merge         0.0       0.8                        1.5 (2.6)                  2.8
    o             −1.5      0.5       1.3              4.6 (6.1)                  6.3
    gate, up      −5.6      0.5       2.3              13.8 (16.2)                16.5
    down          −3.3      0.5       1.3              7.7 (8.1)                  8.4

Tried without gain: all products between two attentions (o, gate and up, down, the next q, k and v)
in one launch of a block a multiprocessor, whose warps order weights across them while the blocks
wait for each other. Three such waits take 2.5 µs together, no longer than launches do; but with
Qwen2.5-1.5B's 26 MB the launch takes 17.4 µs in the best of 11 configurations, and the four that
are made of them here 14.8, with 0.4 in between. With neither products nor sums 8.6 are left.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, ptx
from pallas_kernels.collectives.meeting import Meeting
from pallas_kernels.layout import STRIP, PackedWeight, QuantizedWeight, TiledWeight
from pallas_kernels.products import inputs as staging
from pallas_kernels.products.around import NOTHING, PLAIN, Around, Form, rows_of
from pallas_kernels.products.given import Finish, Given
from pallas_kernels.products.inputs import Inputs, Staged
from pallas_kernels.products.sums import Product, Sums
from pallas_kernels.ptx import V, f32, i32

MAX_ROWS = 16
NEIGHBOURS = 8  # blocks that begin at the same group
MOST_STAGED = 40 << 10  # bytes of activations that are not normed
LARGE, SMALL = 0x5F805F80, 0x1F801F80  # two bf16 2⁶⁴, and 2⁻⁶⁴
UNIT = 2.0**69  # what a product is short of: 2⁶⁴ x times a code in the lowest bits, code · 2⁻¹³³


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is laid on the chip.

    warpgroups  a block; its warps share the groups of input channels
    stages      groups that a warp has in shared memory, read or in flight
    strips      a block's, of 16 outputs each; of gate and up each as many, or of a head's halves
    cluster     blocks, 1 to 8, that have the same strips and share the groups
    """

    warpgroups: int
    stages: int
    strips: int
    cluster: int = 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is specialized to: rows, groups of input channels, outputs a weight, what
    stands around the products; and with a norm the input channels."""

    rows: int
    groups: int
    group_size: int
    outputs: tuple[int, ...]
    symmetric: bool
    form: Form = PLAIN
    inputs: int = 0

    @property
    def column_blocks(self) -> int:
        return -(-self.rows // 8)

    @property
    def strip_bytes(self) -> int:
        return 8 * self.group_size + (32 if self.symmetric else 64)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Counts and bytes that follow from a shape and a configuration.

    bulk  whether the device copies in bulk (`ptx.copies`)
    """

    shape: Shape
    config: Config
    bulk: bool = True

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return 4 * self.config.warpgroups

    @property
    def output_blocks(self) -> list[int]:
        """Of each weight, of gate and up together: blocks, or clusters, that its strips take; those
        of a head by itself where q, k and v are finished."""
        s, append = self.shape, self.shape.form.append
        if append:
            return [n // append.channels * self.blocks_of_head for n in s.outputs]
        outputs = s.outputs[:1] if s.form.gated else s.outputs
        return [-(-n // (STRIP * self.config.strips)) for n in outputs]

    @property
    def half_strips(self) -> int:
        """Of half a head."""
        assert self.shape.form.append
        return self.shape.form.append.channels // (2 * STRIP)

    @property
    def blocks_of_head(self) -> int:
        return -(-self.half_strips // self.config.strips)

    @property
    def blocks(self) -> int:
        return sum(self.output_blocks) * self.config.cluster

    @property
    def strips(self) -> int:
        """That a block multiplies with."""
        return self.config.strips * self.shape.form.parts

    @property
    def stage_bytes(self) -> int:
        """A group's strips."""
        return self.strips * self.shape.strip_bytes

    @property
    def sums(self) -> Sums:
        s, c = self.shape, self.config
        sizes = (s.rows, STRIP * c.strips, s.form.parts, self.warps, c.cluster)
        return Sums(*sizes, 32 * self.warps)

    @property
    def warp_bytes(self) -> int:
        """A warp's ring, and its sums in the end."""
        return max(self.config.stages * self.stage_bytes, self.sums.warp_bytes)

    @property
    def barrier_bytes(self) -> int:
        return -(-8 * self.warps * self.config.stages // 128) * 128

    @property
    def staged(self) -> Staged | None:
        """The activations in shared memory: all of them where they are normed, else those of the
        cluster's share of the groups. None: they take too much of it."""
        s = self.shape
        groups = s.groups if s.form.norm else -(-s.groups // self.config.cluster)
        given = s.inputs if s.form.norm else s.groups * s.group_size
        staged = Staged(s.rows, given, groups * s.group_size, s.form.norm, self.warps)
        return staged if s.form.norm or staged.num_bytes <= MOST_STAGED else None

    @property
    def inbox(self) -> int:
        """Where the cluster's sums lie, after the barriers and the rings."""
        return self.barrier_bytes + self.warps * self.warp_bytes

    @property
    def inputs(self) -> int:
        """Where activations lie."""
        return self.inbox + self.sums.inbox_bytes

    @property
    def shared_bytes(self) -> int:
        return self.inputs + (self.staged.num_bytes if self.staged else 0)


class _Ring:
    """A warp's pieces: strips of the groups first, first + step, … in shared memory, in turn."""

    def __init__(self, plan: Plan, shared: V, warp: V, lane: V, turns: V):
        self.plan, self.turns = plan, turns
        self.stages = plan.config.stages
        self.copies = ptx.copies_of(plan.bulk)(32, lane)
        self.barriers = shared + warp * (8 * self.stages)
        self.data = shared + plan.barrier_bytes + warp * plan.warp_bytes

    def start(
        self, sources: Sequence[V], group_bytes: V, num_bytes: V, group: Callable[[V], V]
    ) -> None:
        """Order the first pieces: `num_bytes` from each source, of the group of a turn, which lies
        so many times `group_bytes` after it."""
        self.sources, self.group_bytes, self.num_bytes = sources, group_bytes, num_bytes
        self.group = group

        def prepare() -> None:
            for i in range(self.stages):
                ptx.barrier_init(self.barriers + 8 * i, self.copies.arrivals(32))
            self.copies.publish_barriers()

        def order() -> None:
            for i in range(self.stages):
                ptx.when(i32(i) < self.turns, functools.partial(self._copy, i32(i)))

        self.copies.start(prepare, order)

    def _copy(self, turn: V) -> None:
        slot = turn % self.stages
        barrier = self.barriers + slot * 8
        self.copies.expect(barrier, self.num_bytes * len(self.sources))
        target = self.data + slot * self.plan.stage_bytes
        offset = self.group(turn).to_i64() * self.group_bytes
        most = self.plan.stage_bytes // len(self.sources)
        for i, source in enumerate(self.sources):
            self.copies.copy(target + i * most, source + offset, self.num_bytes, barrier, most=most)
        self.copies.arrive(barrier)

    def wait(self, turn: V) -> V:
        """Where the piece of a turn is, once it is there."""
        slot = turn % self.stages
        self.copies.wait(self.barriers + slot * 8, (turn // self.stages) & 1)
        return self.data + slot * self.plan.stage_bytes

    def leave(self, turn: V) -> None:
        """The piece of a turn has been read: its place is for the next one."""
        self.copies.leave()
        following = turn + self.stages
        self.copies.order(following < self.turns, functools.partial(self._copy, following))


class _Warp:
    """What one warp computes. Lane 4 g + q has outputs 2g and 2g + 1 of each strip, rows 2q and
    2q + 1 of each 8 in sums, and a quarter of a group's channels."""

    def __init__(self, plan: Plan, x: V | Inputs, lane: V):
        """x: the activations' address, or where they have been normed."""
        self.plan, self.x = plan, x
        self.lane, self.g, self.q = lane, lane >> 2, lane & 3
        self.steps = plan.shape.group_size // 16

    def activations(self, group: V) -> list[V]:
        """Of a group: a word of two channels for [column blocks][steps][halves of a step]."""
        s = self.plan.shape
        out: list[V] = []
        for n in range(s.column_blocks):
            # Rows beyond the last repeat it; nobody reads their results.
            row = ptx.minimum(self.g + 8 * n, s.rows - 1)
            channel = group * s.group_size + self.q * 8
            for i in range(0, s.group_size, 32):
                out += ptx.load(self._at(row, channel + i), 4)
        return out

    def _at(self, row: V, channel: V) -> V:
        if isinstance(self.x, Inputs):
            return self.x.at(row, channel)
        s = self.plan.shape
        return self.x + ((row * (s.groups * s.group_size) + channel) * 2).to_i64()

    def add_group(self, words: Iterable[list[V]], x: list[V], sums: list[V]) -> list[V]:
        """sums [strips][column blocks][4] += a group's products; words: `strip`'s of each."""
        blocks = self.plan.shape.column_blocks
        x = [ptx.multiply_bf16(word, i32(LARGE)) for word in x]
        inputs = [x[2 * i : 2 * i + 2] for i in range(blocks * self.steps)]  # [blocks][steps]
        zeros = [f32(0.0)] * 4
        totals = [zeros] * blocks  # Σ x
        for n in range(blocks):
            for i in range(self.steps):
                totals[n] = ptx.mma("bf16", [i32(SMALL)] * 4, inputs[n * self.steps + i], totals[n])
        out: list[V] = []
        for t, strip in enumerate(words):
            products = [zeros] * blocks
            for i, word in enumerate(strip[: self.steps]):
                a = [w & mask for w in (word, word >> 8) for mask in (0x000F000F, 0x00F000F0)]
                for n in range(blocks):
                    products[n] = ptx.mma("bf16", a, inputs[n * self.steps + i], products[n])
            scale, offset = _factors(strip[self.steps :])
            for n in range(blocks):
                for j in range(4):
                    y = sums[(t * blocks + n) * 4 + j]
                    y = ptx.fma(scale[j // 2], products[n][j], y)
                    out.append(ptx.fma(offset[j // 2], totals[n][j % 2], y))
        return out

    def strip(self, where: V) -> list[V]:
        """This lane's words of a strip: codes of each step, scales, minima."""
        s, each = self.plan.shape, min(4, self.steps)
        lane, g = self.lane * (4 * each), self.g * (4 if s.symmetric else 8)
        out: list[V] = []
        for chunk in range(self.steps // each):
            out += ptx.load(where + lane + chunk * (128 * each), each)
        return out + ptx.load(where + g + 8 * s.group_size, 1 if s.symmetric else 2)

    def keep(self, where: V, sums: list[V]) -> None:
        """Leave sums in shared memory, as `products.sums` takes them."""
        p, blocks = self.plan, self.plan.shape.column_blocks
        for b in range(blocks):
            for i in range(min(2, p.shape.rows - 8 * b)):
                row = self.q * 2 + (8 * b + i)
                at = where + row * p.sums.row_bytes + self.g * 8

                def put(at: V = at, b: int = b, i: int = i) -> None:
                    for t in range(p.strips):
                        four = sums[(t * blocks + b) * 4 :][:4]
                        ptx.store(at + 4 * STRIP * t, [four[i], four[2 + i]])

                ptx.when(row < p.shape.rows, put)


def _factors(numbers: list[V]) -> tuple[list[V], list[V]]:
    """What a group's products and its Σ x are multiplied with, of two outputs.

    numbers: a word of scales and, unless the weight is symmetric, one of minima.
    """
    scale, *rest = [[ptx.low_bf16(word), ptx.high_bf16(word)] for word in numbers]
    minimum = rest[0] if rest else [x * -8.0 for x in scale]
    return [scale[0] * UNIT, scale[1] * (UNIT / 16)], minimum


@dataclasses.dataclass(frozen=True)
class _Strips:
    """A block's: of which product; the first one among the results, how many there are; and where
    they lie, of gate and up, or of the halves of a head, each."""

    product: Product
    first: V
    count: V
    sources: list[V]


def _strips(plan: Plan, given: Given, block: V) -> _Strips:
    s, strips = plan.shape, plan.config.strips
    product, block = given.chosen(plan.output_blocks, block)
    if s.form.append:
        half, head = plan.half_strips, block // plan.blocks_of_head
        before = block % plan.blocks_of_head * strips
        first, left = head * half + before, i32(half) - before
        starts = [(product.weight, head * (2 * half) + before + x) for x in (0, half)]
    else:
        first = block * strips
        left = product.outputs // STRIP - first
        starts = [(x, first) for x in (given.weights if s.form.gated else [product.weight])]
    sources = [weight + at.to_i64() * s.strip_bytes for weight, at in starts]
    return _Strips(product, first, ptx.minimum(left, strips), sources)


def _body(plan: Plan, out_bytes: int, eps: float) -> Callable[[Sequence[V], V], None]:
    s, c, form = plan.shape, plan.config, plan.shape.form

    def body(addresses: Sequence[V], shared: V) -> None:
        ptx.let_next_begin()  # where its blocks fit beside these, they order their weights
        given = Given(form, s.outputs, addresses)
        thread = ptx.special("tid.x")
        lane, warp = thread & 31, ptx.uniform(thread >> 5)
        rank, block = ptx.special("ctaid.x") % c.cluster, ptx.special("ctaid.x") // c.cluster
        strips = _strips(plan, given, block)

        begin, end = (i * s.groups // c.cluster for i in (rank, rank + 1))
        count = end - begin
        turns = ptx.ceil_div(ptx.at_least(count - warp, 0), plan.warps)
        # Blocks that are no neighbours begin at different groups: their activations would else be
        # asked for by all at once.
        first_group = block // NEIGHBOURS * count // -(-sum(plan.output_blocks) // NEIGHBOURS)

        def group(turn: V) -> V:
            at = first_group + warp + turn * plan.warps
            at = ptx.select(at < count, at, at - count)
            return begin + ptx.minimum(at, count - 1)

        inputs: V | Inputs = given.x
        if plan.staged is not None:
            staged_from = i32(0) if form.norm else begin * s.group_size
            inputs = Inputs(plan.staged, shared + plan.inputs, given.x, staged_from, thread)
        work, ring = _Warp(plan, inputs, lane), _Ring(plan, shared, warp, lane, turns)
        product, sums = strips.product, plan.sums
        ring.start(
            strips.sources,
            (product.outputs // STRIP * s.strip_bytes).to_i64(),
            strips.count * s.strip_bytes,
            group,
        )
        mine = sums.mine(thread, rank)
        finish = Finish(sums, given, mine, out_bytes)
        if isinstance(inputs, Inputs):
            inputs.bring(given.norm, eps)
        else:
            ptx.wait_for_launches()
        out = finish.of(product, strips.first * STRIP, (strips.first + strips.count) * STRIP)
        added = out.ahead(mine)
        meeting = None if given.peers is None else Meeting(given.peers, form.devices)

        def inputs_of(turn: V) -> list[V]:
            return work.activations(group(turn))

        def step(turn: V, carry: list[V]) -> list[V]:
            following = inputs_of(turn + 1)
            piece = ring.wait(turn)
            words = (work.strip(piece + t * s.strip_bytes) for t in range(plan.strips))
            found = work.add_group(words, carry[size:], carry[:size])
            ring.leave(turn)
            return [*found, *following]

        size = plan.strips * s.column_blocks * 4
        start = [*[f32(0.0)] * size, *inputs_of(i32(0))]
        work.keep(ring.data, ptx.loop(i32(0), turns, start, step)[:size])  # the ring is empty
        ptx.sync_threads(i32(1), 32 * plan.warps)

        kept, inbox = shared + plan.barrier_bytes, shared + plan.inbox
        out.finish(kept, plan.warp_bytes, inbox, thread, rank, added, meeting)

    return body


def unsupported(x: Any, weights: Sequence[PackedWeight], around: Around = NOTHING) -> str | None:
    """Why the kernel cannot do a call, or None."""
    if x.dtype != jnp.bfloat16:
        return "activations have to be bfloat16"
    if not 1 <= rows_of(x) <= MAX_ROWS:
        return f"there are {rows_of(x)} rows; it takes up to {MAX_ROWS}"
    for weight in weights:
        if not isinstance(weight, TiledWeight):
            return _not_tiled(weight)
    reason = around.append.unsupported(STRIP) if around.append else None
    if around.norm is None or reason:
        return reason
    plan = Plan(shape_of(x, weights, around), Config(1, 1, 1))
    assert plan.staged is not None
    return staging.unsupported(plan.staged, dispatch.target().usable_bytes * 5 // 8)


def _not_tiled(weight: QuantizedWeight) -> str:
    """Why a weight is not tiled."""
    if weight.group_size not in (32, 64, 128):
        return f"the weight's group is {weight.group_size}; it takes 32, 64 and 128"
    if weight.outputs % STRIP:
        return f"a weight has {weight.outputs} outputs; it takes multiples of {STRIP}"
    return "the weight is not tiled (pallas_kernels.layout.tile)"


def shape_of(x: Any, weights: Sequence[PackedWeight], around: Around = NOTHING) -> Shape:
    """The shape that a call specializes the kernel to."""
    first, form = weights[0], around.form
    outputs = tuple(w.outputs for w in weights)
    sizes = (rows_of(x), first.groups, first.group_size, outputs)
    return Shape(*sizes, first.symmetric, form, x.shape[-1] if form.norm else 0)


def int4_matmuls(
    x: jax.Array,
    weights: Sequence[TiledWeight],
    around: Around = NOTHING,
    *,
    config: Config,
    out_dtype: Any = jnp.float32,
    bulk: bool = True,
) -> list[jax.Array]:
    """See `pallas_kernels.int4_matmul.api.int4_matmuls`; bf16 activations, weights alike."""
    shape = shape_of(x, weights, around)
    plan, form = Plan(shape, config, bulk), shape.form
    rows = x.reshape(shape.rows, x.shape[-1])
    missing = shape.groups * shape.group_size - x.shape[-1]
    if missing and not form.norm:
        rows = jnp.pad(rows, ((0, 0), (0, missing)))
    dtype = form.result_dtype(out_dtype)
    operands, ahead = around.operands(rows, [w.strips for w in weights], shape.outputs)
    found = ptx.kernel(
        _body(plan, dtype.itemsize, around.eps),
        form.results(shape.rows, shape.outputs, dtype),
        name="int4_matmul",
        blocks=plan.blocks,
        warpgroups=config.warpgroups,
        shared_bytes=plan.shared_bytes,
        cluster=config.cluster,
        updated=form.updated,
        ahead=ahead,
    )(*operands)
    return form.shaped(found, x.shape[:-1])
