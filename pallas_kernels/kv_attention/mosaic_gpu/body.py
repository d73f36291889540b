"""The first kernel: teams of warps walk over the units of all sequences and heads."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.exchange import Alone, Exchange, WarpgroupExchange
from pallas_kernels.kv_attention.mosaic_gpu.full_precision import FullPrecision
from pallas_kernels.kv_attention.mosaic_gpu.operands import Operands
from pallas_kernels.kv_attention.mosaic_gpu.pages import write_sums
from pallas_kernels.kv_attention.mosaic_gpu.plan import PIECES, Plan
from pallas_kernels.kv_attention.mosaic_gpu.queries import (
    Queries,
    Rows,
    SharedQueries,
    WarpgroupQueries,
)
from pallas_kernels.kv_attention.mosaic_gpu.ring import Pipeline
from pallas_kernels.kv_attention.mosaic_gpu.softmax import State
from pallas_kernels.kv_attention.mosaic_gpu.tile import Tile
from pallas_kernels.kv_attention.mosaic_gpu.units import Lengths, share
from pallas_kernels.ptx import V, f32, i32

# What is done with a unit: its number, the state, its stages in shared memory, what was prepared
# while it came.
Compute = Callable[[V, State, list[V], list[Rows]], None]


def attention_body(plan: Plan) -> Callable[[Sequence[V], V], None]:
    """The first kernel: partial results of each team and key-value head that it touches."""
    return lambda addresses, shared: _Warp(plan, addresses, shared).run()


class _Warp:
    """A warp of a team, which walks over the units that are dealt to its team, head by head."""

    def __init__(self, plan: Plan, addresses: Sequence[V], shared: V):
        c = plan.config
        self.plan, self.shared = plan, shared
        self.operands = Operands(plan, addresses)
        self.lengths = Lengths(
            plan,
            self.operands["quantized_length"],
            self.operands["start"],
            self.operands.get("count"),
        )
        self.thread = ptx.special("tid.x")
        self.lane = self.thread & 31
        warp = ptx.uniform(self.thread >> 5)
        self.team, self.in_team = warp // plan.team_warps, warp % plan.team_warps
        self.token_warp, self.columns = self.in_team % c.token_warps, self.in_team // c.token_warps
        self.first_row = self.columns * (8 * c.column_blocks)
        self.q = self.lane & 3
        # Blocks of rows that this warp scales for its team.
        self.mine = [self.in_team + n for n in range(0, plan.query_blocks, plan.team_warps)]
        # One block of rows stays in registers; of more, there would be none left.
        self.kept: V | None = None  # the first of its rows
        if c.shared and len(self.mine) == 1:
            self.kept = self.mine[0] * 8
        elif c.column_blocks == 1 and not c.shared:
            self.kept = self.first_row

    def run(self) -> None:
        plan = self.plan
        ptx.when(self.thread.equals(0), self._initialize)
        ptx.sync_threads(i32(0), 128 * plan.config.warpgroups)
        if not plan.ahead:
            ptx.wait_for_launches()
        total = self.lengths.total()
        me = ptx.special("ctaid.x") * plan.teams + self.team
        everyone = plan.blocks * plan.teams
        begin, end = share(total, everyone, me), share(total, everyone, me + 1)
        ptx.when(begin < end, lambda: self._work(begin, end, me))

    def _initialize(self) -> None:
        copies = ptx.copies_of(self.plan.bulk)
        for i in range(self.plan.teams * self.plan.config.stages):
            ptx.barrier_init(self.shared + 16 * i, copies.arrivals(self.plan.team_threads))
            ptx.barrier_init(self.shared + 16 * i + 8, self.plan.team_warps)
        copies.publish_barriers()

    def _work(self, begin: V, end: V, me: V) -> None:
        """The units begin … end − 1, of the team number `me`."""
        plan, c, lane = self.plan, self.plan.config, self.lane
        first, last = self.lengths.locate(begin), self.lengths.locate(end - 1)
        self.pipeline = Pipeline(
            plan,
            self.operands,
            self.lengths,
            thread=self.in_team * 32 + lane,
            shared=self.shared,
            team=self.team,
        )
        own = self.shared + plan.ring_bytes + self.team * (plan.query_bytes + plan.exchange_bytes)
        self.scaled_at, words_at = own, own + plan.query_bytes
        self.together = Alone(plan, self.token_warp, lane)
        if c.exchange:
            words_at = words_at + self.columns * (512 * c.token_warps * c.column_blocks)
            exchange = WarpgroupExchange if plan.by_warpgroups else Exchange
            self.together = exchange(plan, words_at, self.team, self.token_warp, lane)
        (b0, k0, u0), (b1, k1, _) = first, last
        zero, kv_heads = i32(0), plan.shape.kv_heads
        final = b1 * kv_heads + k1
        tiles_first = plan.ahead and plan.shape.planes > 0
        if not tiles_first:  # the rows would have to wait for copies that were ordered before
            ptx.wait_for_launches()
            rows = self.load_rows(b0, k0)
        producer = self.pipeline.start(*first, end, begin)
        for _ in range(c.stages - 1):
            producer = self.pipeline.produce(producer)
        if tiles_first:
            ptx.wait_for_launches()
            rows = self.load_rows(b0, k0)

        def head(bk: V, carry: list[V]) -> list[V]:
            left, skip, *rest = carry
            walk = _Head(self, bk, skip, left, rest[: len(rows)])
            flow, state = walk.attend(rest[len(rows) :])
            ptx.let_next_begin()
            following = ptx.minimum(bk + 1, final)
            loaded = self.load_rows(following // kv_heads, following % kv_heads)
            slot = self.together.slot((me + bk) * plan.writers)
            write_partial(plan, self.operands, state, slot, self.first_row, lane, self.together)
            return [left - (walk.stop - skip), i32(0), *loaded, *flow]

        ptx.loop(
            b0 * kv_heads + k0,
            final + 1,
            [end - begin, u0, *rows, zero, zero, *producer],
            head,
        )

    def load_rows(self, b: V, k: V) -> list[V]:
        """Those of a head that stay in registers."""
        if self.kept is None:
            return []
        return Rows.load(self.plan, self.operands, b, k, self.kept, self.lane, 1)


class _Head:
    """A warp's walk over units of a sequence's key-value head: from `skip` on, at most `left`.

    What is carried from unit to unit: the stage and its phase, the producer, the state.
    """

    def __init__(self, warp: _Warp, bk: V, skip: V, left: V, loaded: list[V]):
        s, c = warp.plan.shape, warp.plan.config
        self.warp, self.plan, self.skip = warp, warp.plan, skip
        self.b, self.k = bk // s.kv_heads, bk % s.kv_heads
        self.tiles, units, self.used = warp.lengths.units(self.b)
        (quantized,) = ptx.load(warp.operands["quantized_length"] + self.b.to_i64() * 4)
        (start,) = ptx.load(warp.operands["start"] + self.b.to_i64() * 4)
        self.stop = ptx.minimum(units, skip + left)
        self.kept: Rows | None = None
        if warp.kept is not None:
            self.kept = Rows(warp.plan, loaded, warp.kept, warp.lane)
        self.visible = []
        for n in range(c.column_blocks):
            row = [warp.first_row + 8 * n + warp.q * 2 + i for i in range(2)]
            reach = start - quantized - int(s.strict)
            self.visible.append([reach + r % s.tokens for r in row])

    def _rows(self) -> Rows:
        """This warp's query rows."""
        c = self.plan.config
        if self.kept is not None and not c.shared:
            return self.kept
        return self._rows_from(self.warp.first_row, c.column_blocks)

    def _scaled_rows(self) -> list[Rows]:
        """Those that this warp scales for its team."""
        if self.kept is not None:
            return [self.kept]
        return [self._rows_from(n * 8, 1) for n in self.warp.mine]

    def _rows_from(self, first_row: V, blocks: int) -> Rows:
        warp = self.warp
        here = (self.plan, warp.operands, self.b, self.k, first_row, warp.lane, blocks)
        return Rows(self.plan, Rows.load(*here), first_row, warp.lane)

    def attend(self, flow: list[V]) -> tuple[list[V], State]:
        """Over all units: what is carried on to the next head, and the state."""
        flow, skip = [*flow, *State(self.plan).flat()], self.skip
        if self.plan.shape.exact_tiles:
            exact = self._exact_units()
            flow = ptx.loop(skip, ptx.minimum(self.stop, exact), flow, self._exact_tile)
            skip = ptx.at_least(skip, exact)
        if self.plan.shape.planes:
            flow = ptx.loop(skip, ptx.minimum(self.stop, self.tiles), flow, self._tile)
        flow = ptx.loop(ptx.at_least(self.skip, self.tiles), self.stop, flow, self._full_precision)
        carried = 2 + self.warp.pipeline.producer
        return flow[:carried], State(self.plan, flow[carried:])

    def _exact_units(self) -> V:
        """How many of the first units are tiles that are read exactly."""
        s, operands = self.plan.shape, self.warp.operands
        if not s.listed:
            return ptx.minimum(self.tiles, s.exact_tiles)
        number = i32(0)
        for i in range(s.exact_tiles):
            tile = operands.listed_tile(s, self.b, self.k, i32(i))
            exact = ptx.both(self.tiles > i, tile < s.exact_tiles)
            number = number + ptx.select(exact, i32(1), 0)
        return number

    def _step(
        self,
        unit: V,
        carry: list[V],
        compute: Compute,
        prepare: Callable[[], list[Rows]] = list,
        stages: int = 1,
    ) -> list[V]:
        """Order a unit ahead, wait for this one, compute, leave its stages; as many are ordered as
        are left."""
        pipeline, lane = self.warp.pipeline, self.warp.lane
        stage, phase, *rest = carry
        producer = pipeline.produce(rest[: pipeline.producer])
        state = State(self.plan, rest[pipeline.producer :])
        prepared = prepare()
        own = []
        for _ in range(stages):
            pipeline.copies.wait(pipeline.full(stage), phase)
            own.append(stage)
            stage, phase = pipeline.next(stage, phase)
        compute(unit, state, [pipeline.data(x) for x in own], prepared)
        pipeline.copies.leave()

        def leave() -> None:
            for x in own:
                ptx.barrier_arrive(pipeline.empty(x))

        ptx.when(lane.equals(0), leave)
        for _ in range(stages - 1):
            producer = pipeline.produce(producer)
        return [stage, phase, *producer, *state.flat()]

    def _exact_tile(self, unit: V, carry: list[V]) -> list[V]:
        return self._tile(unit, carry, stages=2)

    def _tile(self, unit: V, carry: list[V], stages: int = 1) -> list[V]:
        plan, c, warp = self.plan, self.plan.config, self.warp

        def rows() -> list[Rows]:
            return self._scaled_rows() if c.shared else []

        def compute(unit: V, state: State, own: list[V], rows: list[Rows]) -> None:
            data, *lower = own
            tile = Tile(plan, warp.lane, *[x - data for x in lower])
            if plan.shape.page_log_sums:
                state.begin_tile()
            if c.shared:
                queries = self._shared_queries(tile, data, rows)
            else:
                queries = Queries(*tile.queries(data, self._rows()))
            for turn in range(plan.shape.group_size // (32 * c.token_warps)):
                tile.accumulate(state, data, warp.token_warp, turn, queries, warp.together)
            if plan.shape.page_log_sums:
                self._write_page(unit, state)

        return self._step(unit, carry, compute, rows, stages)

    def _write_page(self, tile: V, state: State) -> None:
        """What a tile, all of which are read, adds to each row's sum."""
        warp, s = self.warp, self.plan.shape
        number = (self.b * s.kv_heads + self.k) * s.tiles + tile
        number = number * self.plan.config.token_warps + warp.token_warp
        of_tile = state.end_tile()
        write_sums(
            self.plan, warp.operands, number, of_tile, state.origin, warp.first_row, warp.lane
        )

    def _shared_queries(self, tile: Tile, data: V, rows: list[Rows]) -> Queries:
        """Scale this warp's blocks of rows for the team, and read all from shared memory."""
        plan, warp = self.plan, self.warp
        made = [tile.queries(data, x) for x in rows]
        shared = WarpgroupQueries if plan.by_warpgroups else SharedQueries
        queries = shared(plan, warp.scaled_at, warp.first_row >> 3, warp.lane)
        # All have read those of the last tile; then all have written theirs.
        ptx.sync_threads(warp.team + 1, 32 * plan.team_warps)
        for block, (pairs, bias) in zip(warp.mine, made, strict=True):
            ptx.when(
                block < plan.query_blocks,
                functools.partial(queries.write, block, pairs[0], bias[0]),
            )
        ptx.sync_threads(warp.team + 1, 32 * plan.team_warps)
        queries.read_bias()
        return queries

    def _full_precision(self, i: V, carry: list[V]) -> list[V]:
        plan, s, warp = self.plan, self.plan.shape, self.warp

        def compute(i: V, state: State, own: list[V], _: list[Rows]) -> None:
            (data,) = own
            active = warp.token_warp < plan.unit_rows // 16
            mine = ptx.select(active, warp.token_warp * (16 // PIECES), 0)
            keys = data + mine * (2 * s.head_dim)
            values = warp.together.origin(data, keys) + PIECES * plan.piece_bytes
            first = (i - self.tiles) * plan.unit_rows
            slot = ptx.select(active, first + mine, 1 << 30)
            exact = FullPrecision(plan, self._rows(), warp.lane)
            exact.accumulate(
                state, keys, values, first, slot, self.used, self.visible, warp.together
            )

        return self._step(i, carry, compute)


def write_partial(
    plan: Plan,
    operands: Operands,
    state: State,
    slot: V,
    first_row: V,
    lane: V,
    team: Alone,
) -> None:
    """Σ p v in [slots, R, D] and (reference, Σ p) in [slots, R, 2], before any division.

    Of each 32 channels those of a lane lie together, so that a warp writes whole lines: channel
    8 r + g is number 4 g + r.
    """
    s = plan.shape
    g, q = lane >> 2, lane & 3
    base = slot.to_i64() * s.rows
    blocks = range(plan.config.column_blocks)
    together = 2 - plan.channel_blocks % 2  # blocks of 16 channels in a store

    def sum_lanes(x: V) -> V:
        return ptx.over_lanes(x, operator.add, (4, 8, 16))

    # Of each block: Σ p, and Σ p m̂ of each group of channels.
    sums = [[[sum_lanes(x) for x in v] for v in (state.total[n], *state.offset[n])] for n in blocks]
    added = team.added([pair for block in sums for pair in block])
    each = 1 + s.value_groups
    sums = [added[each * n : each * (n + 1)] for n in blocks]
    for n in blocks:
        for i in range(2):
            row = first_row + 8 * n + q * 2 + i
            total, *offsets = [pair[i] for pair in sums[n]]

            def write(n: int = n, i: int = i, row: V = row, total: V = total, offsets=offsets):
                index = base + row.to_i64()
                ptx.when(
                    team.writes_statistics(g),
                    lambda: ptx.store(
                        operands["statistics"] + index * 8,
                        [f32(0.0) - state.origin[n][i], total],
                    ),
                )
                at = operands["output"] + index * (4 * s.head_dim) + (g * 16).to_i64()
                for m in range(0, plan.channel_blocks, together):
                    numbers = [
                        ptx.fma(four[2 * y + i], f32(1 / s.unit), offsets[16 * m // s.value_width])
                        for four in state.sums[n][m : m + together]
                        for y in range(2)
                    ]
                    block = team.first_channels() + m
                    ptx.store(at + (block // 2 * 128 + block % 2 * 8).to_i64(), numbers)

            ptx.when(row < s.rows, write)
