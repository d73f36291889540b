"""A team's ring of stages in shared memory, filled ahead of what reads it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.operands import Operands
from pallas_kernels.kv_attention.mosaic_gpu.plan import PIECES, Plan
from pallas_kernels.kv_attention.mosaic_gpu.units import Lengths
from pallas_kernels.ptx import V, i32


class Pipeline:
    """A team's ring of stages in shared memory.

    The team keeps `stages − 1` units ahead: before it reads unit i, those of it that order copies
    (`ptx.copies`: a thread of each warp, or all) wait until all warps have left the stage of unit
    i − 1 and order unit i + stages − 1 into it. A tile that is read exactly takes two stages, one
    after the other: as the others, and lower planes.
    """

    def __init__(
        self,
        plan: Plan,
        operands: Operands,
        lengths: Lengths,
        *,
        shared: V,
        team: V,
        thread: V,
    ):
        self.plan, self.operands, self.lengths = plan, operands, lengths
        self.copies = ptx.copies_of(plan.bulk)(plan.team_threads, thread)
        stages = plan.config.stages
        # Values that say what to order next: eight; whether an exact tile's second stage is due;
        # the buffer's first slot, if the tiles are counted; and a list's next tile, which is loaded
        # a unit ahead.
        s = plan.shape
        self.producer = 8 + bool(s.exact_tiles) + s.counted + s.listed
        self.barriers = shared + team * (16 * stages)
        parts = zip(plan.section_starts, operands.tile_parts, plan.sections, strict=True)
        self.tile_parts = self.copies.dealt([*parts])
        size = plan.code_bytes
        lower = [(i * size, x, size) for i, x in enumerate(operands.lower_parts)]
        self.lower_parts = self.copies.dealt(lower)
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
        s, zero = self.plan.shape, i32(0)
        tiles, units, _ = self.lengths.units(b)
        state = [b, k, unit, tiles, units, end - first, zero, zero]
        state += [zero] if s.exact_tiles else []
        state += [self.lengths.first_slot(b)] if s.counted else []
        state += [self.operands.listed_tile(s, b, k, unit)] if s.listed else []
        return state

    def produce(self, state: list[V]) -> list[V]:
        """Order the next unit, or the second stage of one, if one is left."""
        b, k, unit, tiles, units, left, stage, phase, *more = state
        s = self.plan.shape
        second = more.pop(0) if s.exact_tiles else None
        slot = more.pop(0) if s.counted else tiles * s.group_size
        tile = more.pop(0) if s.listed else unit

        def issue() -> None:
            self.copies.wait(self.empty(stage), phase ^ 1)
            target, barrier = self.data(stage), self.full(stage)
            if s.planes:
                ptx.choose(
                    unit < tiles,
                    lambda: self._copy_tile(target, barrier, b, k, tile, second),
                    lambda: self._copy_rows(target, barrier, b, k, slot, unit - tiles),
                    [],
                )
            else:
                self._copy_rows(target, barrier, b, k, slot, unit)
            self.copies.arrive(barrier)

        self.copies.order(left > 0, issue)

        done = i32(1)
        if second is not None:
            exact = ptx.both(unit < ptx.minimum(tiles, s.exact_tiles), tile < s.exact_tiles)
            second = ptx.select(ptx.both(exact, second.equals(0)), i32(1), 0)
            done = i32(1) - second
        following = unit + done

        def next_head() -> Sequence[V]:
            wrap = (k + 1).equals(s.kv_heads)
            new_b = ptx.minimum(ptx.select(wrap, b + 1, b), s.batch - 1)
            new_tiles, new_units, _ = self.lengths.units(new_b)
            new_slot = [self.lengths.first_slot(new_b)] if s.counted else []
            return [new_b, ptx.select(wrap, i32(0), k + 1), i32(0), new_tiles, new_units, *new_slot]

        here = [b, k, following, tiles, units] + ([slot] if s.counted else [])
        b, k, unit, tiles, units, *more = ptx.choose(
            following.equals(units), next_head, lambda: here, here
        )
        if s.listed:
            more = [*more, self.operands.listed_tile(s, b, k, unit)]
        if second is not None:
            more = [second, *more]
        stage, phase = self.next(stage, phase)
        return [b, k, unit, tiles, units, left - done, stage, phase, *more]

    def _copy_tile(
        self, target: V, barrier: V, b: V, k: V, tile: V, second: V | None = None
    ) -> list[V]:
        s, plan = self.plan.shape, self.plan
        index = ((b * s.kv_heads + k) * s.tiles + tile).to_i64()

        def copy(parts: Sequence[ptx.Piece], num_bytes: int) -> list[V]:
            self.copies.expect(barrier, i32(num_bytes))
            for place, source, size in parts:
                to = target + place
                if isinstance(size, int):
                    self.copies.copy(to, source + index * size, size, barrier, most=size)
                else:
                    at = source + index * size.to_i64()
                    one = functools.partial(self.copies.copy, to, at, size, barrier, most=0)
                    ptx.when(size > 0, one)
            return []

        whole = functools.partial(copy, self.tile_parts, sum(plan.sections))
        if second is None:
            return whole()
        lower = functools.partial(copy, self.lower_parts, 2 * plan.code_bytes)
        return ptx.choose(second.equals(1), lower, whole, [])

    def _copy_rows(self, target: V, barrier: V, b: V, k: V, slot: V, unit: V) -> list[V]:
        s, plan = self.plan.shape, self.plan
        if plan.ahead:
            ptx.wait_for_launches()
        rows, stride = plan.unit_rows, 2 * s.head_dim
        # The buffer is a ring: position p in slot p mod R. A unit does not wrap around, since its
        # rows divide R, or there are no tiles and R is beyond every position.
        first = (slot + unit * rows) % s.buffer_length
        left = i32(s.buffer_length) - first
        self.copies.expect(barrier, ptx.minimum(left, rows) * (2 * stride))
        head = (b * s.kv_heads + k).to_i64() * (s.buffer_length * stride)
        source = head + first.to_i64() * stride
        keys, values = (self.operands[x] + source for x in ("key_buffer", "value_buffer"))

        def copy(number: V) -> None:
            row = number % PIECES * plan.piece_rows
            at = ptx.select(number < PIECES, keys, values) + (row * stride).to_i64()
            self._copy_piece(target + number * plan.piece_bytes, at, left - row, barrier)

        self.copies.each(2 * PIECES, copy)
        return []

    def _copy_piece(self, target: V, source: V, left: V, barrier: V) -> None:
        """A piece of rows, or the `left` ones that there are of it."""
        s, rows = self.plan.shape, self.plan.piece_rows
        most = rows * 2 * s.head_dim
        if s.buffer_length % self.plan.unit_rows == 0:
            self.copies.copy(target, source, most, barrier, most=most)
            return
        size = ptx.minimum(left, rows) * (2 * s.head_dim)
        copy = functools.partial(self.copies.copy, target, source, size, barrier, most=most)
        ptx.when(left > 0, copy)
