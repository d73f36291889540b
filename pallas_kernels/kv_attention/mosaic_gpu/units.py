"""The units of work, tiles and full-precision tokens, and how they are dealt to the teams."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.plan import Plan
from pallas_kernels.ptx import V, i32


def count_units(plan: Plan, tiles: V, quantized: V, start: V) -> tuple[V, V, V]:
    """(tiles, units, buffer tokens) of a sequence: the tiles that are read of it, then its
    full-precision units."""
    s = plan.shape
    used = ptx.minimum(start - quantized + s.tokens, s.buffer_length)
    used = ptx.at_least(used, 0)
    rows = ptx.at_least(ptx.ceil_div(used, plan.unit_rows), 1)
    return tiles, tiles + rows, used


def share(total: V, parts: int, index: V) -> V:
    """First unit of part `index` when `total` units are dealt evenly."""
    return index * (total // parts) + ptx.minimum(index, total % parts)


def part_of(total: V, parts: int, unit: V) -> V:
    """The part that holds `unit`: the inverse of `share`."""
    per, extra = total // parts, total % parts
    larger = extra * (per + 1)
    late = extra + (unit - larger) // ptx.at_least(per, 1)
    return ptx.select(unit < larger, unit // (per + 1), late)


class Lengths:
    """The sequences' lengths in global memory; `count`, the tiles that are listed, where a list
    says what is read."""

    def __init__(self, plan: Plan, quantized: V, start: V, count: V | None):
        self.plan, self.quantized, self.start, self.count = plan, quantized, start, count

    def units(self, b: V) -> tuple[V, V, V]:
        s, offset = self.plan.shape, b.to_i64() * 4
        (quantized,) = ptx.load(self.quantized + offset)
        (start,) = ptx.load(self.start + offset)
        tiles = quantized // s.group_size if s.planes else i32(0)
        if self.count is not None:
            (tiles,) = ptx.load(self.count + offset)
        return count_units(self.plan, tiles, quantized, start)

    def first_slot(self, b: V) -> V:
        """The slot of the buffer that holds the first token that is not read from the planes."""
        (quantized,) = ptx.load(self.quantized + b.to_i64() * 4)
        return quantized % self.plan.shape.buffer_length

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
