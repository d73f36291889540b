"""Attention over the hierarchical cache on Hopper and later, as a Pallas Mosaic GPU kernel.

What is read, once for all query heads and tokens that share it: a tile of G = 128 tokens of one
key-value head with D = 128 is 17 KB in the draft view and 33 KB in the target view,

    keys    upper [G, D/2]  (lower [G, D/2])  scale, minimum [D]        8 KB (8 KB) 256 B 256 B
    values  upper [D, G/2]  (lower [D, G/2])  scale, minimum [V, G]     8 KB (8 KB) 256 B 256 B

each part one piece of memory, which the copy engine brings into shared memory as it is. A tile
takes a stage of a ring that a *team* of warps owns; 32 full-precision tokens (K and V, 16 KB) take
a stage likewise, so the buffer is a few more units of the same stream. All units of all sequences
and heads, as many as the lengths on the device say, are dealt evenly to the teams of 132 persistent
blocks; a team that crosses from one head to the next writes one partial result for each:

    units   | b0 k0: tile tile tile rows | b0 k1: tile tile ... | b1 k0: ...
    teams   |<----- 0 ----->|<----- 1 ----->|<----- 2 ----->|
    team    leader   order unit i+1 | wait for unit i | compute | leave the stage
            others                  | wait for unit i | compute | leave the stage

Tokens or channels are the rows of m16n8k16 products, queries their 8 columns: codes are converted
in registers, from words that already lie in the order the instruction wants, with 5 instructions
for 8 codes (`_Tile`). Key scales are folded into the queries, once a tile; key minima give the
scores' bias; value scales go into the probabilities; value minima are summed on the side. The
running maximum moves only when a probability would leave float16, so that sums are rarely rescaled.
A second kernel merges the partial results by log-sum-exp, and rounds to bfloat16 if asked to.

Up to 8 query rows a head: memory bounds it, and what a launch costs at any size. On an H200 that
reads 4,587 GB/s, merge included, per cent of the time that the bytes alone would take:

    kv heads   view    query tokens   length                    ms        reached
    32         int4    1              131,072                   0.140     89%
    32         int4    1              32,768                    0.042     75%
    8          int4    1 (× 4 heads)  131,072                   0.042     73%
    32         int4    1              16 of 1,024 to 32,768     0.303     85%
    32         int8    5              131,072                   0.258     94%
    32         int8    8              131,072                   0.258     94%
    8          int8    4 (× 4 heads)  131,072                   0.079     76%
    8          int8    5 (× 4 heads)  131,072                   0.097     62%
    8          int8    8 (× 4 heads)  131,072                   0.104     58%
    32         full    1              131,072                   0.505     93%

At 32,768 tokens 11 µs come on top of the bytes, 3 of them the merge. From there to 131,072 each
further byte comes at 95% of the ceiling. (The rows of 4 and 5 tokens with 8 heads are of a tuning
run.)

With 8 key-value heads and 8 query tokens × 4 heads a converted value meets 32 columns, and latency
is the bound: two warps a scheduler, that issue an instruction in 2.5 cycles together. Where each
warp takes 16 of the columns for half of the tokens, two warps convert the same codes, and the sums
of all channels fill the registers: 52%. With `Config.exchange` a warp computes the probabilities of
a quarter of the tokens for all columns, leaves them in shared memory, and sums up a quarter of the
channels over all tokens: each code is converted once, and sums take 32 registers instead of 64.
Tried without gain: loops instead of unrolled tokens (48%), twice the tokens between two checks of
the reference (52%), one barrier less a tile (53%), 12 and 16 warps of one column block (44, 36%).

Errors, ‖found − exact‖ / ‖exact‖ before rounding: up to 1.5e-3 on random caches; 1.0e-3 in the
worst layer of SmolLM2 after 4,000 tokens (benchmarks/kernel_error.py). Queries times scales are
float16, which weighs most where an attention sink has a score of 70. Products with what their
rounding leaves would be exact, and take 1 to 13% more time; codes counted from their middle halve
the error (`_Tile.queries`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import devices, ptx
from pallas_kernels.kv_attention.read import Read
from pallas_kernels.layout import LayerCache
from pallas_kernels.ptx import V, f32, i32

LOG2E = math.log2(math.e)
# Running reference of the scores, in base 2, before any token: low, but finite.
NOTHING = -1e30
# A probability times its value scale is a float16: the reference moves when one passes LARGEST,
# and moves to 2⁸ above the largest, so that small ones keep their bits.
LARGEST = 2.0**15
HEADROOM = 8.0
SMALLEST_SCALE = 2.0**-40


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is laid on the chip.

    warpgroups     of 128 threads a block; one block a multiprocessor
    token_warps    warps that share a tile, each with its part of the tokens
    column_blocks  of 8 query rows that a warp multiplies with what it has converted
    stages         tiles a team of warps has in shared memory, read or in flight
    shared         the scaled queries of a tile lie in shared memory: each warp of the team makes a
                   part for all, and none holds them in registers
    exchange       so do the probabilities: a warp computes those of its part of the tokens, and
                   multiplies all of them with its part of the values' channels
    """

    warpgroups: int
    token_warps: int
    column_blocks: int
    stages: int
    shared: bool = False
    exchange: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is specialized to. R = rows: query tokens × query heads of a group."""

    batch: int
    kv_heads: int
    group: int
    tokens: int
    head_dim: int
    group_size: int
    tiles: int
    buffer_length: int
    view: str
    strict: bool
    sm_scale: float

    @property
    def rows(self) -> int:
        return self.group * self.tokens

    @property
    def value_width(self) -> int:
        return min(self.group_size, self.head_dim)

    @property
    def value_groups(self) -> int:
        return -(-self.head_dim // self.value_width)

    @property
    def planes(self) -> int:
        return {"full": 0, "int4": 1, "int8": 2}[self.view]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Byte offsets and counts that follow from a shape and a configuration."""

    shape: Shape
    config: Config
    blocks: int

    @property
    def column_groups(self) -> int:
        """Warps that share a tile, each with other query rows (some may have none)."""
        needed = -(-self.shape.rows // (8 * self.config.column_blocks))
        warps = 4 * self.config.warpgroups // self.config.token_warps
        return next((n for n in range(needed, warps + 1) if warps % n == 0), needed)

    @property
    def team_warps(self) -> int:
        return self.config.token_warps * self.column_groups

    @property
    def teams(self) -> int:
        """Teams a block."""
        return 4 * self.config.warpgroups // self.team_warps

    @property
    def row_warps(self) -> int:
        """Warps of a team that read full-precision tokens, 16 each, from a stage of tile size."""
        share = 16 * 2 * 2 * self.shape.head_dim
        fitting = max(1, min(self.config.token_warps, sum(self.sections) // share))
        return 1 << (fitting.bit_length() - 1)

    @property
    def unit_rows(self) -> int:
        """Full-precision tokens that take the place of a tile in the pipeline."""
        return 16 * (self.row_warps if self.shape.planes else self.config.token_warps)

    @property
    def code_bytes(self) -> int:
        return self.shape.group_size * self.shape.head_dim // 2

    @property
    def sections(self) -> list[int]:
        """Bytes of a tile's parts: keys upper, lower, scale, minimum, then those of the values."""
        s = self.shape
        codes = [self.code_bytes] * s.planes
        key_numbers = [2 * s.head_dim] * 2
        value_numbers = [2 * s.value_groups * s.group_size] * 2
        return [*codes, *key_numbers, *codes, *value_numbers] if s.planes else []

    @property
    def stage_bytes(self) -> int:
        full_precision = 2 * self.unit_rows * 2 * self.shape.head_dim
        return -(-max(sum(self.sections), full_precision) // 128) * 128

    @property
    def barrier_bytes(self) -> int:
        return -(-2 * 8 * self.teams * self.config.stages // 128) * 128

    @property
    def ring_bytes(self) -> int:
        return self.barrier_bytes + self.teams * self.config.stages * self.stage_bytes

    @property
    def query_blocks(self) -> int:
        """Blocks of 8 query rows that a team works on."""
        return self.column_groups * self.config.column_blocks

    @property
    def query_bytes(self) -> int:
        """A team's scaled queries in shared memory, and a float32 number a row."""
        block = 8 * (2 * self.shape.head_dim + 4)
        return -(-self.query_blocks * block // 128) * 128 if self.config.shared else 0

    @property
    def exchange_bytes(self) -> int:
        """A team's probabilities in shared memory: 512 bytes a warp and block."""
        blocks = self.team_warps * self.config.column_blocks
        return 512 * blocks if self.config.exchange else 0

    @property
    def channel_blocks(self) -> int:
        """Of 16 channels of the values, that a warp sums up."""
        parts = self.config.token_warps if self.config.exchange else 1
        return self.shape.head_dim // (16 * parts)

    @property
    def shared_bytes(self) -> int:
        return self.ring_bytes + self.teams * (self.query_bytes + self.exchange_bytes)

    @property
    def writers(self) -> int:
        """Partial results of a team and head: each for other tokens."""
        return 1 if self.config.exchange else self.config.token_warps

    @property
    def partials(self) -> int:
        """Partial results: one a writer of a team and key-value head that the team touches."""
        slots = self.blocks * self.teams + self.shape.batch * self.shape.kv_heads
        return slots * self.writers


def _units(plan: Plan, quantized: V, start: V) -> tuple[V, V, V]:
    """(tiles, units, buffer tokens) of a sequence: its tiles, then its full-precision units."""
    s = plan.shape
    tiles = quantized // s.group_size if s.planes else i32(0)
    used = ptx.minimum(start - quantized + s.tokens, s.buffer_length)
    used = ptx.at_least(used, 0)
    rows = ptx.at_least(ptx.ceil_div(used, plan.unit_rows), 1)
    return tiles, tiles + rows, used


def _share(total: V, parts: int, index: V) -> V:
    """First unit of part `index` when `total` units are dealt evenly."""
    return index * (total // parts) + ptx.minimum(index, total % parts)


def _part_of(total: V, parts: int, unit: V) -> V:
    """The part that holds `unit`: the inverse of `_share`."""
    per, extra = total // parts, total % parts
    larger = extra * (per + 1)
    late = extra + (unit - larger) // ptx.at_least(per, 1)
    return ptx.select(unit < larger, unit // (per + 1), late)


class _Lengths:
    """The sequences' lengths in global memory."""

    def __init__(self, plan: Plan, quantized: V, start: V):
        self.plan, self.quantized, self.start = plan, quantized, start

    def units(self, b: V) -> tuple[V, V, V]:
        offset = b.to_i64() * 4
        (quantized,) = ptx.load(self.quantized + offset)
        (start,) = ptx.load(self.start + offset)
        return _units(self.plan, quantized, start)

    def total(self) -> V:
        """Units of all sequences and key-value heads."""
        s = self.plan.shape
        if s.batch == 1:
            return self.units(i32(0))[1] * s.kv_heads
        (out,) = ptx.loop(
            i32(0),
            i32(s.batch),
            [i32(0)],
            lambda b, carry: [carry[0] + self.units(b)[1] * s.kv_heads],
        )
        return out

    def locate(self, unit: V) -> tuple[V, V, V]:
        """(b, k, unit within the key-value head) of a unit in the order b, k, unit."""
        s = self.plan.shape

        def find(b: V, carry: list[V]) -> Sequence[V]:
            before, found, first, units = carry
            mine = self.units(b)[1]
            inside = before <= unit
            return [
                before + mine * s.kv_heads,
                ptx.select(inside, b, found),
                ptx.select(inside, before, first),
                ptx.select(inside, mine, units),
            ]

        zero = i32(0)
        if s.batch == 1:
            found, first, units = zero, zero, self.units(zero)[1]
        else:
            _, found, first, units = ptx.loop(zero, i32(s.batch), [zero, zero, zero, i32(1)], find)
        rest = unit - first
        return found, rest // units, rest % units


class _Operands:
    """Addresses of the kernel's operands and results, in the order they are passed."""

    def __init__(self, plan: Plan, addresses: Sequence[V]):
        names = ["quantized_length", "start", "q", "key_buffer", "value_buffer"]
        for part in ("keys", "values") if plan.shape.planes else ():
            names += [f"{part}.upper", f"{part}.lower"][: plan.shape.planes]
            names += [f"{part}.scale", f"{part}.minimum"]
        names += ["output", "statistics"]
        self.by_name = dict(zip(names, addresses, strict=True))
        self.tile_parts = [self.by_name[n] for n in names if "." in n]

    def __getitem__(self, name: str) -> V:
        return self.by_name[name]


def _row_offset(shape: Shape, b: V, k: V, row: V) -> V:
    """Index of row (head of the group, token) of key-value head k in [B, S, H], as i64."""
    head = k * shape.group + row // shape.tokens
    token = b * shape.tokens + row % shape.tokens
    return (token * (shape.kv_heads * shape.group) + head).to_i64()


class _Pipeline:
    """A team's ring of stages in shared memory, filled by the copy engine.

    The team's first lane keeps `stages − 1` units ahead: before the team reads unit i, it waits
    until all warps have left the stage of unit i − 1 and orders unit i + stages − 1 into it.
    """

    def __init__(
        self,
        plan: Plan,
        operands: _Operands,
        lengths: _Lengths,
        *,
        shared: V,
        team: V,
        leader: V,
    ):
        self.plan, self.operands, self.lengths, self.leader = plan, operands, lengths, leader
        stages = plan.config.stages
        self.barriers = shared + team * (16 * stages)
        self.ring = shared + plan.barrier_bytes + team * (stages * plan.stage_bytes)

    def full(self, stage: V) -> V:
        return self.barriers + stage * 16

    def empty(self, stage: V) -> V:
        return self.barriers + stage * 16 + 8

    def data(self, stage: V) -> V:
        return self.ring + stage * self.plan.stage_bytes

    def next(self, stage: V, phase: V) -> tuple[V, V]:
        last = stage.equals(self.plan.config.stages - 1)
        return ptx.select(last, i32(0), stage + 1), ptx.select(last, phase ^ 1, phase)

    def start(self, b: V, k: V, unit: V, end: V, first: V) -> list[V]:
        """State of the producer: next unit's place, units left, and the stage that it goes to."""
        tiles, units, _ = self.lengths.units(b)
        return [b, k, unit, tiles, units, end - first, i32(0), i32(0)]

    def produce(self, state: list[V]) -> list[V]:
        """Order the next unit, if one is left."""
        b, k, unit, tiles, units, left, stage, phase = state
        s = self.plan.shape

        def issue() -> None:
            ptx.barrier_wait(self.empty(stage), phase ^ 1)
            target, barrier = self.data(stage), self.full(stage)
            if s.planes:
                ptx.choose(
                    unit < tiles,
                    lambda: self._copy_tile(target, barrier, b, k, unit),
                    lambda: self._copy_rows(target, barrier, b, k, tiles, unit - tiles),
                    [],
                )
            else:
                self._copy_rows(target, barrier, b, k, tiles, unit)

        ptx.when(ptx.both(self.leader, left > 0), issue)

        following = unit + 1

        def next_head() -> Sequence[V]:
            wrap = (k + 1).equals(s.kv_heads)
            new_b = ptx.minimum(ptx.select(wrap, b + 1, b), s.batch - 1)
            new_tiles, new_units, _ = self.lengths.units(new_b)
            return [new_b, ptx.select(wrap, i32(0), k + 1), i32(0), new_tiles, new_units]

        b, k, unit, tiles, units = ptx.choose(
            following.equals(units),
            next_head,
            lambda: [b, k, following, tiles, units],
            [b, k, unit, tiles, units],
        )
        stage, phase = self.next(stage, phase)
        return [b, k, unit, tiles, units, left - 1, stage, phase]

    def _copy_tile(self, target: V, barrier: V, b: V, k: V, tile: V) -> list[V]:
        s, sections = self.plan.shape, self.plan.sections
        ptx.barrier_expect(barrier, i32(sum(sections)))
        index = ((b * s.kv_heads + k) * s.tiles + tile).to_i64()
        offset = 0
        for source, size in zip(self.operands.tile_parts, sections, strict=True):
            ptx.bulk_copy(target + offset, source + index * size, i32(size), barrier)
            offset += size
        return []

    def _copy_rows(self, target: V, barrier: V, b: V, k: V, tiles: V, unit: V) -> list[V]:
        s, rows = self.plan.shape, self.plan.unit_rows
        # The buffer is a ring: position p in slot p mod R. A unit does not wrap around, since its
        # rows divide R, or there are no tiles and R is beyond every position.
        first = (tiles * s.group_size + unit * rows) % s.buffer_length
        size = ptx.minimum(i32(s.buffer_length) - first, rows) * (2 * s.head_dim)
        ptx.barrier_expect(barrier, size * 2)
        head = (b * s.kv_heads + k).to_i64() * (s.buffer_length * 2 * s.head_dim)
        source = head + first.to_i64() * (2 * s.head_dim)
        values = target + rows * 2 * s.head_dim
        ptx.bulk_copy(target, self.operands["key_buffer"] + source, size, barrier)
        ptx.bulk_copy(values, self.operands["value_buffer"] + source, size, barrier)
        return []


class _Rows:
    """A warp's query rows of one key-value head, as matrix operands.

    Lane 4 g + q holds, of row g of each block of 8, channels [D/8 · q, D/8 · (q+1)) of either half
    of the head: `low` and `high`, words of two bf16.
    """

    def __init__(
        self, plan: Plan, operands: _Operands, b: V, k: V, first_row: V, lane: V, blocks: int
    ):
        s = plan.shape
        g, q = lane >> 2, lane & 3
        self.low: list[list[V]] = []
        self.high: list[list[V]] = []
        words = s.head_dim // 16
        for n in range(blocks):
            row = first_row + 8 * n + g
            valid = row < s.rows
            safe = ptx.select(valid, row, i32(0))
            offset = _row_offset(s, b, k, safe) * (2 * s.head_dim)
            here = operands["q"] + offset + (q * (s.head_dim // 4)).to_i64()
            for half, out in ((0, self.low), (s.head_dim, self.high)):
                loaded = ptx.load_wide(here + half, words)
                out.append([ptx.select(valid, w, i32(0)) for w in loaded])


class _State:
    """What a warp accumulates for its rows (columns of the products).

    In lane 4 g + q, for columns 2q and 2q+1 of block n: `origin` the running reference of the
    scores (negative, base 2), `total` Σ p and `offset` Σ p m̂ over the tokens of this lane, and
    `sums`[n][m] the product's registers: channels 16 m + g and + 8, in units of 2^−unit.
    """

    def __init__(self, plan: Plan, values: Sequence[V] | None = None):
        s, blocks = plan.shape, plan.config.column_blocks
        self.blocks, self.groups, self.channels = blocks, s.value_groups, plan.channel_blocks
        count = blocks * (2 + 2 + 2 * self.groups + 4 * self.channels)
        if values is None:
            origin = [f32(-NOTHING)] * (2 * blocks)
            values = origin + [f32(0.0)] * (count - 2 * blocks)
        rest = iter(values)

        def take(n: int) -> list[V]:
            return [next(rest) for _ in range(n)]

        self.origin = [take(2) for _ in range(blocks)]
        self.total = [take(2) for _ in range(blocks)]
        self.offset = [[take(2) for _ in range(self.groups)] for _ in range(blocks)]
        self.sums = [[take(4) for _ in range(self.channels)] for _ in range(blocks)]

    def flat(self) -> list[V]:
        out: list[V] = []
        for pairs in (self.origin, self.total):
            out += [v for pair in pairs for v in pair]
        for groups in (self.offset, self.sums):
            out += [v for block in groups for pair in block for v in pair]
        return out

    def rescale(self, origin: list[list[V]]) -> None:
        """Move to a new reference."""
        for n in range(self.blocks):
            factor = [ptx.exp2(origin[n][i] - self.origin[n][i]) for i in range(2)]
            self.origin[n] = origin[n]
            self.total[n] = [self.total[n][i] * factor[i] for i in range(2)]
            self.offset[n] = [[v[i] * factor[i] for i in range(2)] for v in self.offset[n]]
            self.sums[n] = [[c[i] * factor[i % 2] for i in range(4)] for c in self.sums[n]]


def _softmax(
    plan: Plan,
    state: _State,
    scores: list[list[list[V]]],
    alpha: float,
    bias: list[list[V]],
    scales: list[list[V]],
    use: Callable[[_State, list[list[list[V]]]], tuple[list[V], V]],
    team: _Exchange | None = None,
) -> list[V]:
    """Probabilities p = 2^(α scores[block][half][4] + bias[block][column] + origin), and what `use`
    makes of them: words, and the largest number of this lane that is to stay below LARGEST.

    The reference of the running softmax moves only where that number would leave float16's range:
    rarely, so that the sums are rarely rescaled. A product with `scales`[group][half · 2 + y] then
    fits. `use` updates the state that it is given. With a `team` its warps move together, and the
    words are left to them all.
    """
    blocks, halves = len(scores), len(scores[0])

    def attend(to: _State) -> tuple[list[V], V]:
        p = []
        for n in range(blocks):
            added = [a + b for a, b in zip(to.origin[n], bias[n], strict=True)]
            p.append(
                [
                    [ptx.exp2(ptx.fma(c[i], f32(alpha), added[i % 2])) for i in range(4)]
                    for c in scores[n]
                ]
            )
        for n in range(blocks):
            for x in p[n]:
                for i in range(4):
                    to.total[n][i % 2] = to.total[n][i % 2] + x[i]
        return use(to, p)

    kept = _State(plan, state.flat())
    words, largest = attend(kept)
    fits = largest <= LARGEST
    overflow = ptx.select(fits, i32(0), 1).equals(1)
    if team is None:
        overflow = ptx.any_lane(overflow)
    else:
        team.publish(words)
        overflow = team.any(overflow)

    def move() -> Sequence[V]:
        moved = _State(plan, state.flat())
        origin: list[list[V]] = []
        for n in range(blocks):
            pair = []
            for i in range(2):
                top = f32(NOTHING)
                for h in range(halves):
                    for y in range(2):
                        x = ptx.fma(scores[n][h][2 * y + i], f32(alpha), bias[n][i])
                        if scales:
                            scale = scales[0][2 * h + y]
                            for other in scales[1:]:
                                scale = ptx.maximum(scale, other[2 * h + y])
                            x = x + ptx.log2(ptx.maximum(scale, f32(SMALLEST_SCALE)))
                        top = ptx.maximum(top, x)
                for distance in (4, 8, 16):
                    top = ptx.maximum(top, ptx.shuffle_xor(top, distance))
                # The origin is stored negated.
                candidate = f32(HEADROOM) - top
                pair.append(
                    ptx.asm("min.f32 $0, $1, $2;", ["f32"], [candidate, state.origin[n][i]])[0]
                )
            origin.append(pair)
        moved.rescale(origin if team is None else team.lowest(origin))
        again, _ = attend(moved)
        if team is None:
            return [*moved.flat(), *again]
        team.publish(again)
        team.sync()
        return moved.flat()

    fast = kept.flat() if team else [*kept.flat(), *words]
    out = ptx.choose(overflow, move, lambda: fast, fast)
    count = len(state.flat())
    state.__init__(plan, out[:count])  # type: ignore[misc]
    return out[count:]


def _largest(instruction: str, kind: str, values: list[V]) -> V:
    out = values[0]
    for x in values[1:]:
        (out,) = ptx.asm(f"{instruction} $0, $1, $2;", [kind], [out, x])
    return out


def _unit(shape: Shape) -> float:
    """What 1 is in the sums: a step of the upper plane in the bits of a float16 subnormal."""
    return {0: 1.0, 1: 2.0**-24, 2: 2.0**-20}[shape.planes]


class _Queries:
    """Scaled queries of a warp as matrix operands, and the scores' bias, in registers."""

    def __init__(self, operands: list[list[list[V]]], bias: list[list[V]]):
        self.operands, self.bias = operands, bias

    def pairs(self, block: int, word: int) -> list[list[V]]:
        """Operands of the two steps that a word of codes is for."""
        return self.operands[block][2 * word : 2 * word + 2]


class _SharedQueries(_Queries):
    """The same in a team's shared memory: of a block of 8 rows, 512 bytes a word of codes, in which
    each lane finds its own 16; after all blocks a float32 bias a row."""

    def __init__(self, plan: Plan, where: V, first_block: V, lane: V):
        self.plan, self.lane = plan, lane
        self.block_bytes = 16 * plan.shape.head_dim
        self.where, self.first_block = where, first_block
        self.bias_at = where + plan.query_blocks * self.block_bytes + (lane & 3) * 8

    def write(self, block: V, operands: list[list[V]], bias: list[V]) -> None:
        for i in range(len(operands) // 2):
            at = self.where + block * self.block_bytes + self.lane * 16 + 512 * i
            ptx.store(at, [*operands[2 * i], *operands[2 * i + 1]])
        ptx.when(self.lane < 4, lambda: ptx.store(self.bias_at + block * 32, bias))

    def read_bias(self) -> None:
        blocks = range(self.plan.config.column_blocks)
        self.bias = [ptx.load(self.bias_at + (self.first_block + n) * 32, 2, "f32") for n in blocks]

    def pairs(self, block: int, word: int) -> list[list[V]]:
        at = self.where + (self.first_block + block) * self.block_bytes
        words = ptx.load(at + self.lane * 16 + 512 * word, 4)
        return [words[:2], words[2:]]


class _Exchange:
    """What the warps of a team that have the same query rows leave to each other in shared memory:
    a warp's operands of the products with values, 512 bytes a block of 8 rows, in which each lane
    finds its own 16. The whole team meets at its barrier."""

    def __init__(self, plan: Plan, where: V, team: V, token_warp: V, lane: V):
        self.where, self.lane = where, lane
        self.barrier, self.threads = team + 1, 32 * plan.team_warps
        self.blocks, self.warps = plan.config.column_blocks, plan.config.token_warps
        self.mine = where + token_warp * (512 * self.blocks)

    def sync(self) -> None:
        ptx.sync_threads(self.barrier, self.threads)

    def any(self, condition: V) -> V:
        """Whether it holds in any thread of the team; all meet."""
        return ptx.any_thread(condition, self.barrier, self.threads)

    def publish(self, words: list[V]) -> None:
        """Four words a block, as `_softmax` made them."""
        for n in range(self.blocks):
            four = [ptx.transpose_8x8(x) for x in words[4 * n : 4 * n + 4]]
            ptx.store(self.mine + 512 * n + self.lane * 16, four)

    def read(self, warp: int, block: int) -> list[V]:
        return ptx.load(self.where + 512 * (self.blocks * warp + block) + self.lane * 16, 4)

    def collect(self, pairs: list[list[V]]) -> list[list[list[V]]]:
        """[warp][pair]: what all warps have for the columns 2q and 2q + 1, by lane 4 g + q."""
        q = self.lane & 3
        self.sync()
        for n, pair in enumerate(pairs):
            at = self.mine + 32 * n + q * 8
            ptx.when(self.lane < 4, functools.partial(ptx.store, at, pair))
        self.sync()
        found = [
            [
                ptx.load(self.where + 512 * self.blocks * w + 32 * n + q * 8, 2, "f32")
                for n in range(len(pairs))
            ]
            for w in range(self.warps)
        ]
        self.sync()
        return found

    def lowest(self, pairs: list[list[V]]) -> list[list[V]]:
        """The smallest of all warps'."""
        return [
            [_largest("min.f32", "f32", list(each)) for each in zip(*all_warps, strict=True)]
            for all_warps in zip(*self.collect(pairs), strict=True)
        ]

    def added(self, pairs: list[list[V]]) -> list[list[V]]:
        """The sums over all warps."""
        out = []
        for all_warps in zip(*self.collect(pairs), strict=True):
            first, *others = all_warps
            for pair in others:
                first = [a + b for a, b in zip(first, pair, strict=True)]
            out.append(first)
        return out


class _Tile:
    """Computation of a warp on its tokens of a tile of codes in shared memory.

    Codes enter the products as float16 subnormals: the bits of code c, in bits 0–3 or 4–7 of a
    half word, read as float16, are c·2⁻²⁴ or 16 c·2⁻²⁴, exactly, and matrix instructions take them
    at full speed. Products with the second kind carry a factor 1/16 on the other side; with both
    planes a byte 16 u + l + 8 takes their place, and none is needed.
    """

    def __init__(self, plan: Plan, lane: V):
        self.plan, self.lane = plan, lane
        self.g, self.q = lane >> 2, lane & 3
        s = plan.shape
        # Of 16 tokens, a lane's rows g and g + 8 are 2 g and 2 g + 1 in the draft view, and in the
        # target view `order` and order + 2: there neighbours g read neighbouring rows of keys, from
        # all banks, and the value codes are sorted as cheaply.
        self.order = (self.g >> 1) * 4 + (self.g & 1)
        self.both = s.planes == 2
        # What the codes are short of in the draft and target views, in steps.
        self.unit = _unit(s)
        self.half = 0.5 if self.both else 1 / 32
        self.high_factor = 1.0 if self.both else 1 / 16
        self.words = s.head_dim // 32
        sections = plan.sections
        starts = [sum(sections[:i]) for i in range(len(sections))]
        parts = len(sections) // 2
        self.key_at, self.value_at = starts[:parts], starts[parts:]

    def queries(self, tile: V, rows: _Rows) -> tuple[list[list[list[V]]], list[list[V]]]:
        """Key scales folded into the queries: (operands[block][step], bias[block][column]).

        The bias is what the scores are short of, for key minima and the codes' offset. It also
        moves the codes' origin to their middle, where float16's rounding of the scaled queries
        weighs least: Σ x₁₆ (u − 8) + 8 Σ x, x the scaled queries and x₁₆ the rounded ones.
        """
        s = self.plan.shape
        here = tile + self.q * (s.head_dim // 4)
        *_, scale_at, minimum_at = self.key_at
        scale, minimum = (
            [ptx.load_wide(here + at + half, 2 * self.words) for half in (0, s.head_dim)]
            for at in (scale_at, minimum_at)
        )
        operands, bias = [], []
        for low, high in zip(rows.low, rows.high, strict=True):
            steps = []
            for i in range(self.words):
                halves = (ptx.low_bf16, ptx.high_bf16)
                for step in range(2):
                    # Channels in the order of `fragments`: neighbours, or every other one.
                    parts = (
                        [(part, 2 * i + step) for part in halves]
                        if self.both
                        else [(halves[step], 2 * i), (halves[step], 2 * i + 1)]
                    )
                    pair = []
                    for x, numbers, factor in (
                        (low, scale[0], 1.0),
                        (high, scale[1], self.high_factor),
                    ):
                        two = []
                        for part, w in parts:
                            value = part(x[w])
                            if factor != 1.0:
                                value = value * factor
                            two.append(value * part(numbers[w]))
                        pair.append(ptx.pack_f16(*two))
                    steps.append(pair)
            # Sums of their own, since each product waits for the last one of its sum.
            sums = [[f32(0.0)] * 4 for _ in range(6)]
            exact = ((low, minimum[0]), (high, minimum[1]), (low, scale[0]), (high, scale[1]))
            for j, (x, numbers) in enumerate(exact):
                for w in range(0, 2 * self.words, 2):
                    a = [numbers[w], numbers[w], numbers[w + 1], numbers[w + 1]]
                    sums[j] = ptx.mma("bf16", a, [x[w], x[w + 1]], sums[j])
            first = i32(0xC800C800)  # −8 twice
            second = first if self.both else i32(0xD800D800)  # −8 · 16
            for i, pair in enumerate(steps):
                j = 4 + i % 2
                sums[j] = ptx.mma("f16", [first, first, second, second], pair, sums[j])
            operands.append(steps)
            factor = s.sm_scale * LOG2E
            bias.append(
                [
                    ptx.fma(
                        sums[2][i] + sums[3][i],
                        f32(8 - self.half),
                        sums[0][i] + sums[1][i] + (sums[4][i] + sums[5][i]),
                    )
                    * factor
                    for i in (0, 1)
                ]
            )
        return operands, bias

    def numbers(self, where: V) -> V:
        """A word of this lane's two of the 16 numbers at `where`."""
        if not self.both:
            return ptx.load(where + self.g * 4)[0]
        low, high = ptx.load(where + (self.g >> 1) * 8, 2)
        odd = (self.g & 1).equals(1)
        return ptx.select(
            odd, ptx.permute_bytes(low, high, 0x7632), ptx.permute_bytes(low, high, 0x5410)
        )

    def fragments(self, upper: list[V], lower: list[V] | None = None) -> list[list[V]]:
        """Matrix operands of two steps from one word of each of rows g and g + 8."""
        if lower is None:
            steps = []
            for shift in (0, 8):
                x = [w >> shift if shift else w for w in upper]
                steps.append([w & 0x000F000F for w in x] + [w & 0x00F000F0 for w in x])
            return steps
        low = [ptx.merge_bits(u << 4, w, 0xF0F0F0F0) for u, w in zip(upper, lower, strict=True)]
        high = [ptx.merge_bits(u, w >> 4, 0xF0F0F0F0) for u, w in zip(upper, lower, strict=True)]
        both = [*low, *high]
        zero = i32(0)
        return [
            [ptx.permute_bytes(w, zero, 0x4140) for w in both],
            [ptx.permute_bytes(w, zero, 0x4342) for w in both],
        ]

    def scores(self, tile: V, first: V, operands: _Queries) -> list[list[list[V]]]:
        """Of 32 tokens from `first` on: [block][half of the tokens][4], in units."""
        s = self.plan.shape
        blocks = self.plan.config.column_blocks
        stride = s.head_dim // 2
        out = [[[f32(0.0)] * 4 for _ in range(2)] for _ in range(blocks)]
        loaded = []
        for half in range(2):
            token = first + 16 * half + (self.order if self.both else self.g * 2)
            row = token * stride + self.q * (4 * self.words)
            far = (2 if self.both else 1) * stride
            loaded.append(
                [
                    [ptx.load_wide(tile + at + row + y * far, self.words) for y in range(2)]
                    for at in self.key_at[: s.planes]
                ]
            )
        for i in range(self.words):
            steps = [
                self.fragments(*[[x[i] for x in plane] for plane in planes]) for planes in loaded
            ]
            for n in range(blocks):
                for step, b in enumerate(operands.pairs(n, i)):
                    for half in range(2):
                        out[n][half] = ptx.mma("f16", steps[half][step], b, out[n][half])
        return out

    def accumulate(
        self,
        state: _State,
        tile: V,
        mine: V,
        turn: int,
        operands: _Queries,
        team: _Exchange | None = None,
    ) -> None:
        """Attend to 32 tokens, number `turn` of the part of warp `mine`; with a `team`, this warp
        sums up its part of the channels over the tokens of all."""
        s = self.plan.shape
        blocks = self.plan.config.column_blocks
        turns = s.group_size // (32 * self.plan.config.token_warps)
        first = (mine * turns + turn) * 32
        scores = self.scores(tile, first, operands)
        *_, scale_at, minimum_at = self.value_at
        scales: list[list[V]] = []
        minima: list[list[V]] = []
        for v in range(s.value_groups):
            at = tile + first * 2 + v * 2 * s.group_size
            group_scale, group_minimum = [], []
            for half in range(2):
                scale = self.numbers(at + scale_at + 32 * half)
                minimum = self.numbers(at + minimum_at + 32 * half)
                for part in (ptx.low_bf16, ptx.high_bf16):
                    exact = part(scale)
                    group_minimum.append(ptx.fma(exact, f32(-self.half), part(minimum)))
                    factor = self.high_factor if half else 1.0
                    group_scale.append(exact * factor if factor != 1.0 else exact)
            scales.append(group_scale)
            minima.append(group_minimum)
        alpha = s.sm_scale * LOG2E / self.unit

        def use(to: _State, p: list[list[list[V]]]) -> tuple[list[V], V]:
            for n in range(blocks):
                for v in range(s.value_groups):
                    for h in range(2):
                        for j in range(4):
                            to.offset[n][v][j % 2] = ptx.fma(
                                p[n][h][j], minima[v][2 * h + j // 2], to.offset[n][v][j % 2]
                            )
            words = [
                ptx.pack_f16(*[half[2 * y + i] * group[2 * h + y] for i in range(2)])
                for block in p
                for group in scales
                for y in range(2)
                for h, half in enumerate(block)
            ]
            both = _largest("max.NaN.f16x2", "i32", words)
            return words, _largest("max.NaN.f32", "f32", ptx.unpack_f16(both))

        if team is not None and turn:
            team.sync()  # all have read what they left in the last turn
        found = _softmax(self.plan, state, scores, alpha, operands.bias, scales, use, team)
        if team is not None:
            here = tile + self.lane * 4 + mine * (256 * self.plan.channel_blocks)
            for warp in range(team.warps):
                operand = [team.read(warp, n) for n in range(blocks)]
                for m in range(self.plan.channel_blocks):
                    at = here + (16 * s.head_dim * (turns * warp + turn) + 256 * m)
                    for step, a in enumerate(self.value_fragments(at)):
                        for n in range(blocks):
                            b = operand[n][2 * step : 2 * step + 2]
                            state.sums[n][m] = ptx.mma("f16", a, b, state.sums[n][m])
            return
        words = iter(found)
        weights = [
            [[[ptx.transpose_8x8(next(words)) for _ in range(2)] for _ in range(2)] for _ in scales]
            for _ in range(blocks)
        ]
        run = tile + (first // 32) * (16 * s.head_dim) + self.lane * 4
        for m in range(s.head_dim // 16):
            for step, a in enumerate(self.value_fragments(run + 256 * m)):
                for n in range(blocks):
                    b = weights[n][16 * m // s.value_width][step]
                    state.sums[n][m] = ptx.mma("f16", a, b, state.sums[n][m])

    def value_fragments(self, where: V) -> list[list[V]]:
        """Matrix operands of two steps: 32 tokens and the 16 channels at `where`."""
        loaded = [
            [ptx.load(where + at + 128 * y)[0] for y in range(2)]
            for at in self.value_at[: self.plan.shape.planes]
        ]
        return self.fragments(*loaded)


class _FullPrecision:
    """Computation of a warp on 16 full-precision tokens in shared memory."""

    def __init__(self, plan: Plan, rows: _Rows, lane: V):
        self.plan, self.rows, self.lane, self.unit = plan, rows, lane, _unit(plan.shape)
        self.g, self.q = lane >> 2, lane & 3

    def accumulate(
        self,
        state: _State,
        keys: V,
        values: V,
        slot: V,
        used: V,
        visible: list[list[V]],
        team: _Exchange | None = None,
        mine: V | None = None,
        first: V | None = None,
    ) -> None:
        """Attend to the tokens of slots slot … slot + 15; `keys`, `values` their rows.

        Column i of block n sees slots up to visible[n][i]; slots from `used` on hold anything. With
        a `team`, `values` are those of the unit's `first` slot on, and this warp, number `mine` of
        it, sums up its part of the channels over the tokens of all.
        """
        s = self.plan.shape
        blocks = self.plan.config.column_blocks
        stride = 2 * s.head_dim
        words = s.head_dim // 16
        here = keys + self.g * stride + self.q * (s.head_dim // 4)
        scores = [[f32(0.0)] * 4 for _ in range(blocks)]
        for half, x in ((0, self.rows.low), (s.head_dim, self.rows.high)):
            token_rows = [ptx.load_wide(here + half + 8 * stride * y, words) for y in range(2)]
            for w in range(0, words, 2):
                a = [token_rows[y][w + i] for i in range(2) for y in range(2)]
                for n in range(blocks):
                    scores[n] = ptx.mma("bf16", a, [x[n][w], x[n][w + 1]], scores[n])
        for n in range(blocks):
            for j in range(4):
                token = slot + self.g + 8 * (j // 2)
                scores[n][j] = ptx.select(token <= visible[n][j % 2], scores[n][j], f32(-math.inf))

        def use(_: _State, p: list[list[list[V]]]) -> tuple[list[V], V]:
            flat = [x for block in p for x in block[0]]
            return self.split(flat), _largest("max.NaN.f32", "f32", flat)

        one_half, none = [[x] for x in scores], [[f32(0.0)] * 2] * blocks
        alpha = s.sm_scale * LOG2E
        if team is not None:
            team.sync()  # all have read what the last unit's warps left
        found = _softmax(self.plan, state, one_half, alpha, none, [], use, team)
        if team is None:
            self.weigh(
                state,
                values,
                slot,
                used,
                [[ptx.transpose_8x8(x) for x in found[4 * n : 4 * n + 4]] for n in range(blocks)],
            )
            return
        assert mine is not None
        assert first is not None
        here = values + mine * (32 * self.plan.channel_blocks)
        for warp in range(self.plan.unit_rows // 16):
            operands = [team.read(warp, n) for n in range(blocks)]
            at = here + 16 * stride * warp
            self.weigh(state, at, first + 16 * warp, used, operands)

    def split(self, p: list[V]) -> list[V]:
        """Four probabilities of each block → two words of their bf16, two of what that is short
        of."""
        words = []
        for n in range(0, len(p), 4):
            coarse, rest = [], []
            for y in range(2):
                two = [p[n + 2 * y + i] * self.unit for i in range(2)]
                near = ptx.pack_bf16(*two)
                coarse.append(near)
                far = [two[0] - ptx.low_bf16(near), two[1] - ptx.high_bf16(near)]
                rest.append(ptx.pack_bf16(*far))
            words += [*coarse, *rest]
        return words

    def weigh(self, state: _State, values: V, slot: V, used: V, operands: list[list[V]]) -> None:
        """Add the products of 16 tokens' probabilities, four words a block, with their values."""
        stride = 2 * self.plan.shape.head_dim
        masks = []
        for y in range(2):
            token = slot + self.q * 2 + 8 * y
            low = ptx.select(token < used, i32(0x0000FFFF), 0)
            high = ptx.select(token + 1 < used, i32(0xFFFF0000), 0)
            masks.append(low | high)
        # Row of this lane in the four 8×8 matrices that a load takes: tokens 0–7 and 8–15 of two
        # neighbouring runs of 8 channels.
        row = (self.lane & 7) + ((self.lane >> 4) & 1) * 8
        where = values + row * stride + ((self.lane >> 3) & 1) * 16
        for m in range(self.plan.channel_blocks):
            a = ptx.load_matrices_transposed(where + 32 * m)
            a = [x & masks[i // 2] for i, x in enumerate(a)]
            for n, four in enumerate(operands):
                for b in (four[:2], four[2:]):
                    state.sums[n][m] = ptx.mma("bf16", a, b, state.sums[n][m])


def _attention_body(plan: Plan):
    s, c = plan.shape, plan.config

    def body(addresses: Sequence[V], shared: V) -> None:
        operands = _Operands(plan, addresses)
        lengths = _Lengths(plan, operands["quantized_length"], operands["start"])
        thread = ptx.special("tid.x")
        lane = thread & 31
        warp = ptx.uniform(thread >> 5)
        team, in_team = warp // plan.team_warps, warp % plan.team_warps
        token_warp, columns = in_team % c.token_warps, in_team // c.token_warps
        first_row = columns * (8 * c.column_blocks)
        q = lane & 3

        def initialize() -> None:
            for i in range(plan.teams * c.stages):
                ptx.barrier_init(shared + 16 * i, 1)
                ptx.barrier_init(shared + 16 * i + 8, plan.team_warps)
            ptx.fence_barrier_init()

        ptx.when(thread.equals(0), initialize)
        ptx.sync_threads(i32(0), 128 * c.warpgroups)

        total = lengths.total()
        me = ptx.special("ctaid.x") * plan.teams + team
        everyone = plan.blocks * plan.teams
        begin, end = _share(total, everyone, me), _share(total, everyone, me + 1)

        def work() -> None:
            first = lengths.locate(begin)
            last = lengths.locate(end - 1)
            leader = (in_team * 32 + lane).equals(0)
            pipeline = _Pipeline(plan, operands, lengths, shared=shared, team=team, leader=leader)
            own = shared + plan.ring_bytes + team * (plan.query_bytes + plan.exchange_bytes)
            scaled_at, words_at = own, own + plan.query_bytes
            exchange = None
            if c.exchange:
                words_at = words_at + columns * (512 * c.token_warps * c.column_blocks)
                exchange = _Exchange(plan, words_at, team, token_warp, lane)
            producer = pipeline.start(*first, end, begin)
            for _ in range(c.stages - 1):
                producer = pipeline.produce(producer)

            def head(bk: V, carry: list[V]) -> list[V]:
                left, skip, stage, phase, *producer = carry
                b, k = bk // s.kv_heads, bk % s.kv_heads
                tiles, units, used = lengths.units(b)
                (quantized,) = ptx.load(operands["quantized_length"] + b.to_i64() * 4)
                (start,) = ptx.load(operands["start"] + b.to_i64() * 4)
                stop = ptx.minimum(units, skip + left)

                def load_rows(first_row: V = first_row, blocks: int = c.column_blocks) -> _Rows:
                    return _Rows(plan, operands, b, k, first_row, lane, blocks)

                # One block of rows stays in registers; of more, there would be none left.
                kept = load_rows() if c.column_blocks == 1 and not c.shared else None
                visible = []
                for n in range(c.column_blocks):
                    row = [first_row + 8 * n + q * 2 + i for i in range(2)]
                    reach = start - quantized - int(s.strict)
                    visible.append([reach + r % s.tokens for r in row])
                unit = _unit(s)
                count = len(_State(plan).flat())

                def step(
                    carry: list[V], compute: Any, prepare: Callable[[], Any] = lambda: None
                ) -> list[V]:
                    stage, phase, *rest = carry
                    producer = pipeline.produce(rest[:8])
                    state = _State(plan, rest[8:])
                    prepared = prepare()
                    ptx.barrier_wait(pipeline.full(stage), phase)
                    compute(state, pipeline.data(stage), prepared)
                    ptx.sync_warp()
                    ptx.when(lane.equals(0), lambda: ptx.barrier_arrive(pipeline.empty(stage)))
                    stage, phase = pipeline.next(stage, phase)
                    return [stage, phase, *producer, *state.flat()]

                def tile_step(_: V, carry: list[V]) -> list[V]:
                    # Blocks of rows that this warp scales: its own, or its part of the team's.
                    mine = [in_team + n for n in range(0, plan.query_blocks, plan.team_warps)]

                    def rows() -> list[_Rows]:
                        return [load_rows(n * 8, 1) for n in mine] if c.shared else []

                    def compute(state: _State, data: V, rows: list[_Rows]) -> None:
                        tile = _Tile(plan, lane)
                        queries: _Queries
                        if c.shared:
                            made = [tile.queries(data, x) for x in rows]
                            queries = scaled = _SharedQueries(plan, scaled_at, first_row >> 3, lane)
                            # All have read those of the last tile; then all have written theirs.
                            ptx.sync_threads(team + 1, 32 * plan.team_warps)
                            for block, (pairs, bias) in zip(mine, made, strict=True):
                                ptx.when(
                                    block < plan.query_blocks,
                                    functools.partial(scaled.write, block, pairs[0], bias[0]),
                                )
                            ptx.sync_threads(team + 1, 32 * plan.team_warps)
                            scaled.read_bias()
                        else:
                            queries = _Queries(*tile.queries(data, kept or load_rows()))
                        for turn in range(s.group_size // (32 * c.token_warps)):
                            tile.accumulate(state, data, token_warp, turn, queries, exchange)

                    return step(carry, compute, rows)

                def exact_step(i: V, carry: list[V]) -> list[V]:
                    def compute(state: _State, data: V, _: Any) -> None:
                        active = token_warp < plan.unit_rows // 16
                        mine = ptx.select(active, token_warp * 16, 0)
                        keys = data + mine * (2 * s.head_dim)
                        whole = data if exchange else keys
                        values = whole + plan.unit_rows * 2 * s.head_dim
                        unit_slot = (i - tiles) * plan.unit_rows
                        slot = ptx.select(active, unit_slot + mine, 1 << 30)
                        exact = _FullPrecision(plan, kept or load_rows(), lane)
                        exact.accumulate(
                            *(state, keys, values, slot, used, visible),
                            *(exchange, token_warp, unit_slot),
                        )

                    return step(carry, compute)

                flow = [stage, phase, *producer, *_State(plan).flat()]
                if s.planes:
                    flow = ptx.loop(skip, ptx.minimum(stop, tiles), flow, tile_step)
                flow = ptx.loop(ptx.at_least(skip, tiles), stop, flow, exact_step)
                stage, phase, *rest = flow
                state = _State(plan, rest[8:])
                assert len(state.flat()) == count
                slot = (me + bk) * plan.writers
                if exchange is None:
                    slot = slot + token_warp
                _write_partial(
                    *(plan, operands, state, slot, first_row, lane, unit),
                    *(exchange, token_warp),
                )
                return [left - (stop - skip), i32(0), stage, phase, *rest[:8]]

            b0, k0, u0 = first
            b1, k1, _ = last
            zero = i32(0)
            ptx.loop(
                b0 * s.kv_heads + k0,
                b1 * s.kv_heads + k1 + 1,
                [end - begin, u0, zero, zero, *producer],
                head,
            )

        ptx.when(begin < end, work)

    return body


def _write_partial(
    plan: Plan,
    operands: _Operands,
    state: _State,
    slot: V,
    first_row: V,
    lane: V,
    unit: float,
    team: _Exchange | None,
    part: V,
) -> None:
    """Σ p v in [slots, R, D] and (reference, Σ p) in [slots, R, 2], before any division."""
    s = plan.shape
    g, q = lane >> 2, lane & 3
    base = slot.to_i64() * s.rows
    blocks = range(plan.config.column_blocks)

    def sum_lanes(x: V) -> V:
        for distance in (4, 8, 16):
            x = x + ptx.shuffle_xor(x, distance)
        return x

    # Of each block: Σ p, and Σ p m̂ of each group of channels.
    sums = [[[sum_lanes(x) for x in v] for v in (state.total[n], *state.offset[n])] for n in blocks]
    if team is not None:
        added = team.added([pair for block in sums for pair in block])
        each = 1 + s.value_groups
        sums = [added[each * n : each * (n + 1)] for n in blocks]
    for n in blocks:
        for i in range(2):
            row = first_row + 8 * n + q * 2 + i
            total, *offsets = [pair[i] for pair in sums[n]]

            def write(n: int = n, i: int = i, row: V = row, total: V = total, offsets=offsets):
                index = base + row.to_i64()
                first_warp = g.equals(0) if team is None else (part + g).equals(0)
                ptx.when(
                    first_warp,
                    lambda: ptx.store(
                        operands["statistics"] + index * 8,
                        [f32(0.0) - state.origin[n][i], total],
                    ),
                )
                at = operands["output"] + index * (4 * s.head_dim) + (g * 4).to_i64()
                if team is not None:
                    at = at + (part * (64 * plan.channel_blocks)).to_i64()
                for m in range(plan.channel_blocks):
                    for y in range(2):
                        offset = offsets[(16 * m) // s.value_width]
                        x = ptx.fma(state.sums[n][m][2 * y + i], f32(1 / unit), offset)
                        ptx.store(at + 64 * m + 32 * y, [x])

            ptx.when(row < s.rows, write)


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


def _merge_body(plan: Plan, out_dtype: Any):
    """Partial results of a query row → its output and log-sum-exp. One block a row."""
    s = plan.shape
    warps = 4 * MERGE_WARPGROUPS
    channels = s.head_dim // 32
    numbers = channels + 2

    def body(addresses: Sequence[V], shared: V) -> None:
        quantized, start, partial, statistics, output, log_sum_exp = addresses
        lengths = _Lengths(plan, quantized, start)
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
        first = (_part_of(total, teams, first_unit) + bk) * plan.writers
        last = (_part_of(total, teams, first_unit + units - 1) + bk + 1) * plan.writers

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
            index = _row_offset(s, b, k, row)
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


def shape_of(
    q: jax.Array, cache: LayerCache, *, read: Read, sm_scale: float, strict: bool
) -> Shape:
    """The shape that a call specializes the kernel to."""
    b, tokens, h, d = q.shape
    kv_heads, buffer_length = cache.key_buffer.shape[1:3]
    tiles, group_size = (0, 128) if cache.keys is None else cache.keys.upper.shape[2:4]
    return Shape(
        batch=b,
        kv_heads=kv_heads,
        group=h // kv_heads,
        tokens=tokens,
        head_dim=d,
        group_size=group_size,
        tiles=tiles,
        buffer_length=buffer_length,
        view="full" if cache.keys is None else read.view,
        strict=strict,
        sm_scale=float(sm_scale),
    )


def unsupported(shape: Shape, dtypes: Sequence[Any]) -> str | None:
    """Why the kernel cannot do a call, or None."""
    if any(d != jnp.bfloat16 for d in dtypes):
        return "queries and buffer have to be bfloat16"
    if shape.head_dim % 32 or shape.head_dim > 256:
        return f"head_dim is {shape.head_dim}; it takes multiples of 32 up to 256"
    if shape.planes and (shape.group_size % 32 or shape.buffer_length % 64):
        return f"group_size is {shape.group_size}; it takes multiples of 32"
    if shape.rows > 256:
        return f"a key-value head has {shape.rows} query rows; it takes up to 256"
    return None


def kv_attention(
    q: jax.Array,
    cache: LayerCache,
    quantized_length: jax.Array,
    start: jax.Array,
    *,
    read: Read,
    sm_scale: float,
    strict: bool,
    config: Config,
    out_dtype: Any = jnp.float32,
    blocks: int = devices.DEFAULT.multiprocessors,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.kv_attention.api.kv_attention`; bf16 queries and buffer."""
    shape = shape_of(q, cache, read=read, sm_scale=sm_scale, strict=strict)
    plan = Plan(shape, config, blocks)
    operands = [quantized_length, start, q, cache.key_buffer, cache.value_buffer]
    for part in (cache.keys, cache.values):
        if part is not None:
            operands += [part.upper, part.lower][: shape.planes]
            operands += [part.scale, part.minimum]
    partial, statistics = ptx.kernel(
        _attention_body(plan),
        [
            jax.ShapeDtypeStruct((plan.partials, shape.rows, shape.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((plan.partials, shape.rows, 2), jnp.float32),
        ],
        name=f"kv_attention_{shape.view}",
        blocks=blocks,
        warpgroups=config.warpgroups,
        shared_bytes=plan.shared_bytes,
    )(*operands)
    merge = ptx.kernel(
        _merge_body(plan, out_dtype),
        [
            jax.ShapeDtypeStruct(q.shape, out_dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ],
        name="kv_attention_merge",
        blocks=shape.batch * shape.kv_heads * shape.rows,
        warpgroups=MERGE_WARPGROUPS,
        shared_bytes=4 * MERGE_WARPGROUPS * 128 * (2 + shape.head_dim // 32),
    )
    return merge(quantized_length, start, partial, statistics)
