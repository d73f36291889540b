"""A team's ring of stages in shared memory, filled ahead of what reads it."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.operands import Operands
from pallas_kernels.kv_attention.mosaic_gpu.plan import Plan
from pallas_kernels.kv_attention.mosaic_gpu.units import Lengths
from pallas_kernels.ptx import V, i32


class Pipeline:
    """A team's ring of stages in shared memory.

    The team keeps `stages − 1` units ahead: before it reads unit i, those of it that order copies
    (`ptx.copies`: its first thread, or all) wait until all warps have left the stage of unit i − 1
    and order unit i + stages − 1 into it.
    """

    PRODUCER = 8  # values that say what to order next

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
            self.copies.wait(self.empty(stage), phase ^ 1)
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
            self.copies.arrive(barrier)

        ptx.when(self.copies.orders(left > 0), issue)

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
        self.copies.expect(barrier, i32(sum(sections)))
        index = ((b * s.kv_heads + k) * s.tiles + tile).to_i64()
        offset = 0
        for source, size in zip(self.operands.tile_parts, sections, strict=True):
            to, at = target + offset, source + index * size
            self.copies.copy(to, at, size, barrier, most=size)
            offset += size
        return []

    def _copy_rows(self, target: V, barrier: V, b: V, k: V, tiles: V, unit: V) -> list[V]:
        s, rows = self.plan.shape, self.plan.unit_rows
        # The buffer is a ring: position p in slot p mod R. A unit does not wrap around, since its
        # rows divide R, or there are no tiles and R is beyond every position.
        first = (tiles * s.group_size + unit * rows) % s.buffer_length
        size = ptx.minimum(i32(s.buffer_length) - first, rows) * (2 * s.head_dim)
        self.copies.expect(barrier, size * 2)
        head = (b * s.kv_heads + k).to_i64() * (s.buffer_length * 2 * s.head_dim)
        source = head + first.to_i64() * (2 * s.head_dim)
        most = rows * 2 * s.head_dim
        parts = ((target, "key_buffer"), (target + most, "value_buffer"))
        for to, name in parts:
            self.copies.copy(to, self.operands[name] + source, size, barrier, most=most)
        return []
