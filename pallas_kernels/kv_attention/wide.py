"""The attention kernel for 9 to 64 query rows a key-value head, with the products of warpgroups.

`mosaic_gpu` multiplies what a warp has converted with 8 or 16 columns, and converts again for the
next ones. Here a warpgroup multiplies 64 tokens (or channels) with all columns in one instruction,
so that each code is converted once:

    scores   C[64 tokens, N]     += codes of keys   [64, 16 channels]  Q'[16 channels, N]
    sums     C[64 channels, N]   += codes of values [64, 16 tokens]    P [16 tokens, N]

The left operands are converted in registers as there; the right ones lie in shared memory: Q', the
queries times a tile's key scales, which a team's warps make together, and P, the probabilities
times the value scales, 64 tokens at a time. The running reference is the same in a warpgroup, which
settles it with the barrier that P needs anyway.

    team (1 or 2 warpgroups) | wait for a tile | Q' | barrier | each warpgroup its 64 tokens:
    warpgroup                | scores | P, overflow? | barrier | sums | ...
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pallas_kernels import dispatch, ptx
from pallas_kernels.kv_attention.mosaic_gpu import (
    HEADROOM,
    LOG2E,
    NOTHING,
    SMALLEST_SCALE,
    Config,
    Plan,
    Shape,
    _Lengths,
    _Operands,
    _Pipeline,
    _range,
    _row_offset,
    _Tile,
    _unit,
)
from pallas_kernels.ptx import V, f32, i32

TOKENS = 64  # that a warpgroup multiplies at once
LARGEST_HALF = 0x7800  # 2¹⁵ as float16
INITIAL = 2.0**-6  # starting values of the scores, times 2⁻¹⁴ (0x0400), are in units of 2⁻²⁰


def unsupported(shape: Shape) -> str | None:
    """Why this kernel cannot do a shape, or None."""
    if shape.planes != 2:
        return "it reads both planes"
    if shape.head_dim not in (64, 128) or shape.group_size % TOKENS or shape.value_groups != 1:
        return "it takes head_dim 64 or 128, and groups of at least as many tokens"
    if not 8 < shape.rows <= 64:
        return "it takes 9 to 64 query rows"
    return None


@dataclasses.dataclass(frozen=True)
class WidePlan(Plan):
    """Bytes a team has in shared memory beside its ring: two of Q', and for each warpgroup two of
    P, and what the warps tell each other.

    Behind the D channels of Q' come 16 rows for the scores' starting values, whose left operand is
    the same for all tokens: value and rest of either half of the channels, then zeros.
    """

    @property
    def blocks_of_rows(self) -> int:
        return -(-self.shape.rows // 8)

    @property
    def team_warps(self) -> int:
        return 4 * self.config.groups

    @property
    def writers(self) -> int:
        return self.config.groups

    @property
    def unit_rows(self) -> int:
        return TOKENS

    @property
    def query_stride(self) -> int:
        return 16 * (self.shape.head_dim + 16)

    @property
    def query_bytes(self) -> int:
        return self.query_stride * self.blocks_of_rows

    @property
    def weight_bytes(self) -> int:
        return 16 * TOKENS * self.blocks_of_rows

    @property
    def note_bytes(self) -> int:
        return 4 * 8 * 8 * self.blocks_of_rows

    @property
    def group_bytes(self) -> int:
        return 2 * self.weight_bytes + self.note_bytes

    @property
    def team_bytes(self) -> int:
        own = 2 * self.query_bytes + self.config.groups * self.group_bytes
        return -(-own // 128) * 128

    @property
    def shared_bytes(self) -> int:
        return self.ring_bytes + self.teams * self.team_bytes

    def fits(self) -> bool:
        """Whether the configuration divides the work."""
        c = self.config
        chunks = self.shape.group_size // TOKENS
        return c.warpgroups % c.groups == 0 and chunks % c.groups == 0


class _State:
    """What a warp accumulates. In lane 4 g + q, for columns 2q and 2q+1 of block n: `origin` the
    warpgroup's running reference (negative, base 2), `total` Σ p and `offset` Σ p m̂ over the tokens
    of this lane, and `sums`[m][n] channels 64 m + 16 warp + g and + 8, in units of 2^−unit."""

    def __init__(self, plan: WidePlan, values: Sequence[V] | None = None):
        self.plan = plan
        blocks, high = plan.blocks_of_rows, plan.shape.head_dim // 64
        if values is None:
            values = [f32(-NOTHING)] * (2 * blocks) + [f32(0.0)] * (4 * blocks * (1 + high))
        rest = iter(values)

        def take(n: int) -> list[V]:
            return [next(rest) for _ in range(n)]

        self.origin = [take(2) for _ in range(blocks)]
        self.total = [take(2) for _ in range(blocks)]
        self.offset = [take(2) for _ in range(blocks)]
        self.sums = [[take(4) for _ in range(blocks)] for _ in range(high)]

    def flat(self) -> list[V]:
        pairs = [*self.origin, *self.total, *self.offset]
        return [v for four in [*pairs, *(c for m in self.sums for c in m)] for v in four]

    def moved(self, origin: list[list[V]]) -> _State:
        """With another reference."""
        new = _State(self.plan, self.flat())
        for n in range(self.plan.blocks_of_rows):
            factor = [ptx.exp2(origin[n][i] - self.origin[n][i]) for i in range(2)]
            new.total[n] = [self.total[n][i] * factor[i] for i in range(2)]
            new.offset[n] = [self.offset[n][i] * factor[i] for i in range(2)]
            for m, blocks in enumerate(self.sums):
                new.sums[m][n] = [blocks[n][i] * factor[i % 2] for i in range(4)]
        new.origin = origin
        return new

    def set(self, values: Sequence[V]) -> None:
        self.__init__(self.plan, values)  # type: ignore[misc]


Numbers = list[list[V]]  # [block][4], as `ptx.mma`'s c


class _Warpgroup:
    """A warp of a warpgroup of a team, and what they have in shared memory."""

    def __init__(self, plan: WidePlan, shared: V, team: V, in_team: V, lane: V):
        self.plan, self.lane = plan, lane
        self.g, self.q = lane >> 2, lane & 3
        self.in_team, self.group, self.warp = in_team, in_team >> 2, in_team & 3
        own = shared + plan.ring_bytes + team * plan.team_bytes
        self.queries_at = own
        self.weights_at = own + 2 * plan.query_bytes + self.group * plan.group_bytes
        self.notes_at = self.weights_at + 2 * plan.weight_bytes
        self.team_barrier = team + 1
        self.barrier = team * plan.config.groups + self.group + (1 + plan.teams)

    def sync_team(self) -> None:
        ptx.fence_async()
        ptx.sync_threads(self.team_barrier, 32 * self.plan.team_warps)

    def sync(self) -> None:
        ptx.sync_threads(self.barrier, 128)

    # Queries ----------------------------------------------------------------------------------

    def pieces(self) -> list[tuple[V, V, V]]:
        """(block of rows, half of the channels, whether there is one): this warp's share of Q'."""
        count, warps = 2 * self.plan.blocks_of_rows, self.plan.team_warps
        out = []
        for j in range(-(-count // warps)):
            item = self.in_team + j * warps
            out.append((item >> 1, item & 1, item < count))
        return out

    def load_queries(self, operands: _Operands, b: V, k: V) -> list[list[V]]:
        """Of each piece, D/16 words of row 8 n + g: channels [D/8 · q, D/8 · (q+1)) of its half."""
        s = self.plan.shape
        out = []
        for n, half, _ in self.pieces():
            row = n * 8 + self.g
            valid = row < s.rows
            offset = _row_offset(s, b, k, ptx.select(valid, row, i32(0))) * (2 * s.head_dim)
            here = (
                operands["q"] + offset + (half * s.head_dim + self.q * (s.head_dim // 4)).to_i64()
            )
            out.append(
                [ptx.select(valid, w, i32(0)) for w in ptx.load_wide(here, s.head_dim // 16)]
            )
        return out

    def query_buffer(self, turn: V) -> V:
        return self.queries_at + turn * self.plan.query_bytes

    def _own_rows(self, n: V, half: V, turn: V) -> V:
        at = self.query_buffer(turn) + n * self.plan.query_stride
        return at + half * 128 + self.lane * 4

    def clear(self) -> None:
        """Zeros behind the channels of Q', once."""
        count = 2 * self.plan.blocks_of_rows
        for i in range(-(-count // self.plan.team_warps)):
            item = self.in_team + i * self.plan.team_warps
            at = self.queries_at + item * self.plan.query_stride + 16 * self.plan.shape.head_dim
            here = at + self.lane * 8

            def put(here: V = here) -> None:
                ptx.store(here, [i32(0)] * 2)

            ptx.when(item < count, put)

    def put_scaled(self, tile: V, codes: _Tile, rows: list[list[V]], turn: V) -> None:
        """Q' of a tile, and the scores' starting values, of either half of the channels."""
        s = self.plan.shape
        *_, scale_at, minimum_at = codes.key_at
        words = s.head_dim // 16
        for (n, half, valid), x in zip(self.pieces(), rows, strict=True):

            def put(n: V = n, half: V = half, x: list[V] = x) -> None:
                here = tile + half * s.head_dim + self.q * (s.head_dim // 4)
                scale, minimum = (ptx.load_wide(here + at, words) for at in (scale_at, minimum_at))
                at = self._own_rows(n, half, turn)
                made = []
                for i in range(0, words, 2):
                    for part in (ptx.low_bf16, ptx.high_bf16):
                        two = [part(x[w]) * part(scale[w]) for w in (i, i + 1)]
                        made.append(ptx.pack_f16(*two))
                        ptx.store(at + 256 * (len(made) - 1), [made[-1]])
                # Minima in the order that they were loaded: rows below 8 of a product have those
                # of words w and w + 2, the others those of w + 1 and w + 3.
                even = odd = [f32(0.0)] * 4
                for w in range(0, words, 4):
                    a = minimum[w : w + 4]
                    even = ptx.mma("bf16", a, [x[w], x[w + 2]], even)
                    odd = ptx.mma("bf16", a, [x[w + 1], x[w + 3]], odd)
                minus_half = i32(0xB800B800)
                for w in range(0, words, 2):
                    even = ptx.mma("f16", [minus_half] * 4, made[w : w + 2], even)
                start = self.query_buffer(turn) + n * self.plan.query_stride + half * 4
                start = start + (16 * s.head_dim) + self.q * 32
                pairs = []
                for i in range(2):
                    total = (even[i] + odd[2 + i]) * INITIAL
                    coarse = ptx.pack_f16(total, f32(0.0))
                    rest = total - ptx.low_f16(coarse)
                    pairs.append(ptx.pack_f16(total, rest))

                def put_first() -> None:
                    ptx.store(start, pairs[:1])
                    ptx.store(start + 16, pairs[1:])

                ptx.when(self.g.equals(0), put_first)

            ptx.when(valid, put)

    def put_plain(self, rows: list[list[V]], turn: V) -> None:
        """The queries as they are."""
        words = self.plan.shape.head_dim // 16
        for (n, half, valid), x in zip(self.pieces(), rows, strict=True):

            def put(n: V = n, half: V = half, x: list[V] = x) -> None:
                # Steps of the low half of the channels, then of the high one.
                at = self._own_rows(n, i32(0), turn) + half * (words // 2 * 256)
                for w in range(words):
                    ptx.store(at + 128 * w, [x[w]])

            ptx.when(valid, put)

    # Products ---------------------------------------------------------------------------------

    def scores(self, kind: str, steps: list[list[V]], turn: V) -> Numbers:
        at = ptx.uniform(self.query_buffer(turn))
        flat = [f32(0.0)] * (4 * self.plan.blocks_of_rows)
        (found,) = ptx.wgmma(
            kind, [(flat, steps, at)], k_stride=128, n_stride=self.plan.query_stride
        )
        return _by_four(found)

    def add_values(
        self, kind: str, state: _State, products: Sequence[tuple[int, list[list[V]], int]]
    ) -> None:
        """sums[m] += steps · weights of buffer i, for each (m, steps, i)."""
        found = ptx.wgmma(
            kind,
            [
                (
                    [x for block in state.sums[m] for x in block],
                    steps,
                    self.weights_at + i * self.plan.weight_bytes,
                )
                for m, steps, i in products
            ],
            k_stride=128,
            n_stride=16 * TOKENS,
        )
        for (m, _, _), x in zip(products, found, strict=True):
            state.sums[m] = _by_four(x)

    def put_weights(self, words: list[list[V]], buffer: int, piece: V, apart: int) -> None:
        """words[block][y] of two columns of a token into P: tokens y of this warp are piece
        `piece` + `apart` · y of 8 along k."""
        at = self.weights_at + buffer * self.plan.weight_bytes + piece * 128
        lane = self.lane & 7
        matrix = self.lane >> 3
        here = at + (matrix & 1) * (128 * apart) + (matrix >> 1) * (16 * TOKENS) + lane * 16
        for n in range(0, len(words), 2):
            flat = [w for block in words[n : n + 2] for w in block]
            ptx.store_matrices_transposed(here + n * 16 * TOKENS, flat)

    # Softmax ----------------------------------------------------------------------------------

    def weigh(
        self,
        state: _State,
        scores: Numbers,
        alpha: float,
        scales: list[V] | None,
        publish: Callable[[Numbers], V],
    ) -> Numbers:
        """Probabilities of scores[block][4]; `publish` writes them, times `scales` of the lane's
        two tokens, as P, and says whether one is too large for it. Then the warpgroup moves its
        reference, rarely, so that the sums are rarely rescaled."""
        blocks = len(scores)

        def compute(origin: list[list[V]]) -> tuple[Numbers, V]:
            p = [
                [ptx.exp2(ptx.fma(c[i], f32(alpha), origin[n][i % 2])) for i in range(4)]
                for n, c in enumerate(scores)
            ]
            large = publish(p)
            ptx.fence_async()
            return p, large

        def flat(p: Numbers) -> list[V]:
            return [x for block in p for x in block]

        p, large = compute(state.origin)
        overflow = ptx.sync_threads_any(self.barrier, 128, large)

        def move() -> Sequence[V]:
            new = state.moved(self._reference(state, scores, alpha, scales))
            again, _ = compute(new.origin)
            self.sync()
            return [*new.flat(), *flat(again)]

        fast = [*state.flat(), *flat(p)]
        out = ptx.choose(overflow, move, lambda: fast, fast)
        state.set(out[: -4 * blocks])
        p = _by_four(out[-4 * blocks :])
        for n in range(blocks):
            for i in range(2):
                state.total[n][i] = state.total[n][i] + (p[n][i] + p[n][2 + i])
        return p

    def _reference(
        self, state: _State, scores: Numbers, alpha: float, scales: list[V] | None
    ) -> list[list[V]]:
        """What the warpgroup's largest weight asks for, or what it was."""
        blocks = len(scores)
        tops = []
        for n in range(blocks):
            for i in range(2):
                top = f32(NOTHING)
                for y in range(2):
                    x = scores[n][2 * y + i] * f32(alpha)
                    if scales is not None:
                        x = x + ptx.log2(ptx.maximum(scales[y], f32(SMALLEST_SCALE)))
                    top = ptx.maximum(top, x)
                for distance in (4, 8, 16):
                    top = ptx.maximum(top, ptx.shuffle_xor(top, distance))
                tops.append(top)
        everyone = self.exchange(tops)
        origin = []
        for x, old in zip(everyone, (v for pair in state.origin for v in pair), strict=True):
            top = x[0]
            for other in x[1:]:
                top = ptx.maximum(top, other)
            candidate = f32(HEADROOM) - top
            origin.append(ptx.asm("min.f32 $0, $1, $2;", ["f32"], [candidate, old])[0])
        return [origin[2 * n : 2 * n + 2] for n in range(blocks)]

    def exchange(self, numbers: list[V]) -> list[list[V]]:
        """Of numbers[2 n + i] of columns 8 n + 2 q + i, those of all four warps."""
        columns = 4 * len(numbers)
        at = self.notes_at + self.q * 8
        mine = at + self.warp * (4 * columns)

        def put() -> None:
            for n in range(0, len(numbers), 2):
                ptx.store(mine + 16 * n, numbers[n : n + 2])

        ptx.when(self.g.equals(0), put)
        self.sync()
        out: list[list[V]] = [[] for _ in numbers]
        for w in range(4):
            for n in range(0, len(numbers), 2):
                two = ptx.load(at + 4 * columns * w + 16 * n, 2, "f32")
                out[n].append(two[0])
                out[n + 1].append(two[1])
        return out


def _by_four(x: Sequence[V]) -> Numbers:
    return [list(x[i : i + 4]) for i in range(0, len(x), 4)]


def _attend_codes(
    me: _Warpgroup, state: _State, codes: _Tile, tile: V, chunk: int, turn: V
) -> None:
    """To the warpgroup's 64 tokens number `chunk` of a tile: warp w to half w mod 2 of 32-token run
    w / 2."""
    s, blocks = me.plan.shape, me.plan.blocks_of_rows
    stride, words = s.head_dim // 2, s.head_dim // 32
    first = me.group * TOKENS + chunk * (TOKENS * me.plan.config.groups)
    # The warps that still read the other buffer have passed a barrier once this one is written.
    buffer = chunk % 2
    run, half = me.warp >> 1, me.warp & 1
    mine = first + run * 32 + half * 16 + me.g * 2
    row = mine * stride + me.q * (4 * words)
    loaded = [
        [ptx.load_wide(tile + at + row + y * stride, words) for y in range(2)]
        for at in codes.key_at[:2]
    ]
    steps: list[list[V]] = []
    for i in range(words):
        steps += codes.fragments([x[i] for x in loaded[0]], [x[i] for x in loaded[1]])
    first_values = ptx.select(me.q < 2, i32(0x04000400), 0)
    steps.append([first_values, first_values, i32(0), i32(0)])
    scores = me.scores("f16", steps, turn)

    *_, scale_at, minimum_at = codes.value_at
    (scale,) = ptx.load(tile + scale_at + mine * 2)
    (minimum,) = ptx.load(tile + minimum_at + mine * 2)
    scales = [ptx.low_bf16(scale), ptx.high_bf16(scale)]
    parts = (ptx.low_bf16, ptx.high_bf16)
    minima = [ptx.fma(x, f32(-codes.half), f(minimum)) for x, f in zip(scales, parts, strict=True)]

    def publish(p: Numbers) -> V:
        packed = [
            [ptx.pack_f16(block[2 * y] * scales[y], block[2 * y + 1] * scales[y]) for y in range(2)]
            for block in p
        ]
        piece = run * 4 + half
        me.put_weights(packed, buffer, piece, 2)
        flat = [w for block in packed for w in block]
        largest = flat[0]
        for w in flat[1:]:
            largest = ptx.asm("max.NaN.f16x2 $0, $1, $2;", ["i32"], [largest, w])[0]
        # Codes of numbers that are not negative grow with them; NaN is the largest.
        high = largest >> 16
        low = largest & 0xFFFF
        return ptx.at_least(high, low) > LARGEST_HALF

    alpha = s.sm_scale * LOG2E / codes.unit
    p = me.weigh(state, scores, alpha, scales, publish)
    for n in range(blocks):
        for j in range(4):
            state.offset[n][j % 2] = ptx.fma(p[n][j], minima[j // 2], state.offset[n][j % 2])

    here = tile + (first // 32) * (16 * s.head_dim) + me.lane * 4 + me.warp * 256
    products = []
    for m in range(s.head_dim // 64):
        steps = []
        for r in range(2):
            at = here + r * (16 * s.head_dim) + 1024 * m
            words_of = [
                [ptx.load(at + plane + 128 * y)[0] for y in range(2)]
                for plane in codes.value_at[:2]
            ]
            steps += codes.fragments(*words_of)
        products.append((m, steps, buffer))
    me.add_values("f16", state, products)


def _attend_exact(
    me: _Warpgroup, state: _State, stage: V, slot: V, used: V, visible: list[list[V]], turn: V
) -> None:
    """To 64 full-precision tokens, of slots from `slot` on; those from `used` on hold anything."""
    s, blocks = me.plan.shape, me.plan.blocks_of_rows
    stride, words = 2 * s.head_dim, s.head_dim // 16
    here = stage + (me.warp * 16 + me.g) * stride + me.q * (s.head_dim // 4)
    steps: list[list[V]] = []
    for half in (0, s.head_dim):
        rows = [ptx.load_wide(here + half + 8 * stride * y, words) for y in range(2)]
        steps += [[rows[y][w + i] for i in range(2) for y in range(2)] for w in range(0, words, 2)]
    scores = me.scores("bf16", steps, turn)
    for n in range(blocks):
        for j in range(4):
            token = slot + me.warp * 16 + me.g + 8 * (j // 2)
            scores[n][j] = ptx.select(token <= visible[n][j % 2], scores[n][j], f32(-math.inf))
    unit = _unit(s)

    def publish(p: Numbers) -> V:
        halves: list[list[list[V]]] = [[], []]
        for block in p:
            coarse, rest = [], []
            for y in range(2):
                two = [block[2 * y + i] * unit for i in range(2)]
                coarse.append(ptx.pack_bf16(*two))
                off = [two[0] - ptx.low_bf16(coarse[-1]), two[1] - ptx.high_bf16(coarse[-1])]
                rest.append(ptx.pack_bf16(*off))
            halves[0].append(coarse)
            halves[1].append(rest)
        for buffer, packed in enumerate(halves):
            me.put_weights(packed, buffer, me.warp * 2, 1)
        largest = p[0][0]
        for x in [x for block in p for x in block][1:]:
            largest = ptx.asm("max.NaN.f32 $0, $1, $2;", ["f32"], [largest, x])[0]
        fits = largest <= 2.0**15
        return ptx.select(fits, i32(0), 1).equals(1)

    me.weigh(state, scores, s.sm_scale * LOG2E, None, publish)
    row = (me.lane & 7) + ((me.lane >> 4) & 1) * 8
    where = stage + TOKENS * stride + row * stride + ((me.lane >> 3) & 1) * 16 + me.warp * 32
    for m in range(s.head_dim // 64):
        steps = []
        for i in range(TOKENS // 16):
            a = ptx.load_matrices_transposed(where + 16 * stride * i + 128 * m)
            masks = []
            for y in range(2):
                token = slot + 16 * i + me.q * 2 + 8 * y
                low = ptx.select(token < used, i32(0x0000FFFF), 0)
                masks.append(low | ptx.select(token + 1 < used, i32(0xFFFF0000), 0))
            steps.append([x & masks[j // 2] for j, x in enumerate(a)])
        for buffer in range(2):
            me.add_values("bf16", state, [(m, steps, buffer)])


def _write(me: _Warpgroup, operands: _Operands, state: _State, slot: V) -> None:
    """As `mosaic_gpu._write_partial`, each warp its channels."""
    s, blocks = me.plan.shape, me.plan.blocks_of_rows

    def whole(pairs: list[list[V]]) -> list[V]:
        """Σ over the warpgroup's tokens, of each column."""
        out = []
        for pair in pairs:
            for x in pair:
                for distance in (4, 8, 16):
                    x = x + ptx.shuffle_xor(x, distance)
                out.append(x)
        found = me.exchange(out)
        me.sync()
        return [x[0] + x[1] + x[2] + x[3] for x in found]

    totals, offsets = whole(state.total), whole(state.offset)
    base = slot.to_i64() * s.rows
    unit = _unit(s)
    for n in range(blocks):
        for i in range(2):
            row = me.q * 2 + (8 * n + i)

            def write(n: int = n, i: int = i, row: V = row) -> None:
                index = base + row.to_i64()
                first = ptx.both(me.warp.equals(0), me.g.equals(0))
                numbers = [f32(0.0) - state.origin[n][i], totals[2 * n + i]]
                ptx.when(first, lambda: ptx.store(operands["statistics"] + index * 8, numbers))
                channel = me.warp * 16 + me.g
                at = operands["output"] + index * (4 * s.head_dim) + (channel * 4).to_i64()
                for m in range(s.head_dim // 64):
                    for y in range(2):
                        x = ptx.fma(state.sums[m][n][2 * y + i], f32(1 / unit), offsets[2 * n + i])
                        ptx.store(at + 256 * m + 32 * y, [x])

            ptx.when(row < s.rows, write)


def body(plan: WidePlan) -> Callable[[Sequence[V], V], None]:
    """The kernel's thread-level code."""
    s, c = plan.shape, plan.config

    def run(addresses: Sequence[V], shared: V) -> None:
        operands = _Operands(plan, addresses)
        lengths = _Lengths(plan, operands["quantized_length"], operands["start"])
        thread = ptx.special("tid.x")
        lane = thread & 31
        warp = ptx.uniform(thread >> 5)
        team, in_team = warp // plan.team_warps, warp % plan.team_warps
        me = _Warpgroup(plan, shared, team, in_team, lane)

        def initialize() -> None:
            for i in range(plan.teams * c.stages):
                ptx.barrier_init(shared + 16 * i, 1)
                ptx.barrier_init(shared + 16 * i + 8, plan.team_warps)
            ptx.fence_barrier_init()

        ptx.when(thread.equals(0), initialize)
        me.clear()
        ptx.sync_threads(i32(0), 128 * c.warpgroups)

        begin, end = _range(plan, lengths.total(), ptx.special("ctaid.x"), team)
        index = ptx.special("ctaid.x") * plan.teams + team

        def work() -> None:
            first = lengths.locate(begin)
            last = lengths.locate(end - 1)
            leader = (in_team * 32 + lane).equals(0)
            pipeline = _Pipeline(plan, operands, lengths, shared=shared, team=team, leader=leader)
            producer = pipeline.start(*first, end, begin)
            for _ in range(c.stages - 1):
                producer = pipeline.produce(producer)

            def head(bk: V, carry: list[V]) -> list[V]:
                left, skip, turn, stage, phase, *producer = carry
                b, k = bk // s.kv_heads, bk % s.kv_heads
                tiles, units, used = lengths.units(b)
                (quantized,) = ptx.load(operands["quantized_length"] + b.to_i64() * 4)
                (start,) = ptx.load(operands["start"] + b.to_i64() * 4)
                stop = ptx.minimum(units, skip + left)
                rows = me.load_queries(operands, b, k)
                count = len(_State(plan).flat())

                def step(carry: list[V], compute: Any) -> list[V]:
                    turn, stage, phase, *rest = carry
                    producer = pipeline.produce(rest[:8])
                    state = _State(plan, rest[8:])
                    ptx.barrier_wait(pipeline.full(stage), phase)
                    compute(state, pipeline.data(stage), turn)
                    ptx.sync_warp()
                    ptx.when(lane.equals(0), lambda: ptx.barrier_arrive(pipeline.empty(stage)))
                    stage, phase = pipeline.next(stage, phase)
                    return [turn ^ 1, stage, phase, *producer, *state.flat()]

                def tile_step(_: V, carry: list[V]) -> list[V]:
                    def compute(state: _State, data: V, turn: V) -> None:
                        codes = _Tile(plan, None, lane)  # type: ignore[arg-type]
                        me.put_scaled(data, codes, rows, turn)
                        me.sync_team()
                        for chunk in range(s.group_size // (TOKENS * c.groups)):
                            _attend_codes(me, state, codes, data, chunk, turn)

                    return step(carry, compute)

                def exact_step(i: V, carry: list[V]) -> list[V]:
                    def compute(state: _State, data: V, turn: V) -> None:
                        me.put_plain(rows, turn)
                        me.sync_team()
                        slot = (i - tiles) * TOKENS
                        reach = start - quantized - int(s.strict)
                        visible = [
                            [reach + (me.q * 2 + (8 * n + i)) % s.tokens for i in range(2)]
                            for n in range(plan.blocks_of_rows)
                        ]

                        def attend() -> Sequence[V]:
                            new = _State(plan, state.flat())
                            _attend_exact(me, new, data, slot, used, visible, turn)
                            return new.flat()

                        if c.groups == 1:
                            state.set(attend())
                        else:
                            old = state.flat()
                            state.set(ptx.choose(me.group.equals(0), attend, lambda: old, old))

                    return step(carry, compute)

                flow = [turn, stage, phase, *producer, *_State(plan).flat()]
                flow = ptx.loop(skip, ptx.minimum(stop, tiles), flow, tile_step)
                flow = ptx.loop(ptx.at_least(skip, tiles), stop, flow, exact_step)
                turn, stage, phase, *rest = flow
                state = _State(plan, rest[8:])
                assert len(state.flat()) == count
                _write(me, operands, state, (index + bk) * plan.writers + me.group)
                return [left - (stop - skip), i32(0), turn, stage, phase, *rest[:8]]

            b0, k0, u0 = first
            b1, k1, _ = last
            zero = i32(0)
            ptx.loop(
                b0 * s.kv_heads + k0,
                b1 * s.kv_heads + k1 + 1,
                [end - begin, u0, zero, zero, zero, *producer],
                head,
            )

        ptx.when(begin < end, work)

    return run


def candidates(shape: Shape) -> Iterator[Config]:
    """Configurations that the kernel can run on the shape, best guess first."""
    if unsupported(shape) is not None:
        return
    for warpgroups, groups in ((4, 2), (2, 1), (2, 2), (3, 1)):
        one = Config(warpgroups, 1, 1, 1, groups=groups, even=True, online=True)
        plan = WidePlan(shape, one, 1)
        room = dispatch.SHARED_BYTES - 4096 - plan.teams * plan.team_bytes
        stages = min(room // (plan.teams * plan.stage_bytes), 8)
        if plan.fits() and stages >= 2:
            yield dataclasses.replace(one, stages=stages)
