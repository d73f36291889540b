"""Who weighs which values: a warp its own tokens', or a part of the channels of all tokens'.

A warp's probabilities are operands of products with values. In `Alone` they stay in its registers,
and it sums up all channels over its own tokens. In `Exchange` the warps of a team that have the
same query rows leave them to each other, and each sums up its part of the channels over the tokens
of all. Both have the same methods: what reads them does not know which it has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.plan import PIECES, Plan
from pallas_kernels.ptx import V


def largest_of(instruction: str, kind: str, values: list[V]) -> V:
    out = values[0]
    for x in values[1:]:
        (out,) = ptx.asm(f"{instruction} $0, $1, $2;", [kind], [out, x])
    return out


class Alone:
    """A warp weighs the values of its own tokens, all channels of them."""

    def __init__(self, plan: Plan, token_warp: V, lane: V):
        self.plan, self.token_warp, self.lane = plan, token_warp, lane

    def meet(self) -> None:
        """Wait until all have read what they left to each other."""

    def any(self, condition: V) -> V:
        """Whether it holds for one of those whose probabilities are weighed together."""
        return ptx.any_lane(condition)

    def leave(self, words: list[V]) -> list[V]:
        """Hand on what `softmax` made, four words a block of 8 rows and group of channels; those
        that stay in registers are returned."""
        return words

    def lowest(self, pairs: list[list[V]]) -> list[list[V]]:
        """The smallest of all."""
        return pairs

    def added(self, pairs: list[list[V]]) -> list[list[V]]:
        """The sums over all."""
        return pairs

    def runs(
        self, data: V, first: V, turn: int, words: list[V]
    ) -> Iterator[tuple[V, int, list[list[list[V]]]]]:
        """What to weigh of a tile in a turn, in runs of 32 tokens, this warp's from `first` on: the
        place of the run's value codes, as an address and bytes from there, and the operands
        [block][group of channels][4]."""
        turned = self._turned(words)
        groups = self.plan.shape.value_groups
        operands = [turned[i : i + groups] for i in range(0, len(turned), groups)]
        yield data + (first // 32) * (16 * self.plan.shape.head_dim) + self.lane * 4, 0, operands

    def origin(self, unit: V, own: V) -> V:
        """Of a unit of full-precision tokens: where `rows` begins, the unit or the own tokens."""
        return own

    def rows(
        self, values: V, first: V, slot: V, words: list[V]
    ) -> Iterator[tuple[V, V, list[list[V]]]]:
        """What to weigh of a unit, 16 full-precision tokens at a time: the first one's values, its
        slot (of the unit `first`, of this warp's tokens `slot`), and the operands [block][4]."""
        yield values, slot, self._turned(words)

    def _turned(self, words: list[V]) -> list[list[V]]:
        """The words as matrix operands, four at a time."""
        turned = [ptx.transpose_8x8(x) for x in words]
        return [turned[i : i + 4] for i in range(0, len(turned), 4)]

    def slot(self, slot: V) -> V:
        """The partial result that this warp writes to, of its team's."""
        return slot + self.token_warp

    def writes_statistics(self, g: V) -> V:
        """Whether the lane, row g of 8, writes what is known of all channels."""
        return g.equals(0)

    def first_channels(self) -> V:
        """The first block of 16 channels that this warp sums up."""
        return ptx.i32(0)


class Exchange(Alone):
    """A warp weighs its part of the channels of the team's tokens.

    The warps of a team that have the same query rows leave their operands in shared memory, 512
    bytes a block of 8 rows, in which each lane finds its own 16. The whole team meets at its
    barrier. Values have one group of channels.
    """

    def __init__(self, plan: Plan, where: V, team: V, token_warp: V, lane: V):
        super().__init__(plan, token_warp, lane)
        self.where = where
        self.barrier, self.threads = team + 1, 32 * plan.team_warps
        self.blocks, self.warps = plan.config.column_blocks, plan.config.token_warps
        self.mine = where + token_warp * (512 * self.blocks)

    def meet(self) -> None:
        ptx.sync_threads(self.barrier, self.threads)

    def any(self, condition: V) -> V:
        return ptx.any_thread(condition, self.barrier, self.threads)

    def leave(self, words: list[V]) -> list[V]:
        for n in range(self.blocks):
            four = [ptx.transpose_8x8(x) for x in words[4 * n : 4 * n + 4]]
            ptx.store(self.mine + 512 * n + self.lane * 16, four)
        return []

    def _left(self, warp: int) -> list[list[V]]:
        """A warp's operands [block][4]."""
        at = self.where
        return [
            ptx.load(at + 512 * (self.blocks * warp + n) + self.lane * 16, 4)
            for n in range(self.blocks)
        ]

    def runs(
        self, data: V, first: V, turn: int, words: list[V]
    ) -> Iterator[tuple[V, int, list[list[list[V]]]]]:
        for warp, (where, offset) in enumerate(self.places(data, turn)):
            yield where, offset, [[four] for four in self._left(warp)]

    def places(self, data: V, turn: int) -> list[tuple[V, int]]:
        """Of a tile in a turn, where the value codes of each warp's run lie."""
        s = self.plan.shape
        turns = s.group_size // (32 * self.warps)
        here = data + self.lane * 4 + self.token_warp * (256 * self.plan.channel_blocks)
        return [(here, 16 * s.head_dim * (turns * warp + turn)) for warp in range(self.warps)]

    def origin(self, unit: V, own: V) -> V:
        return unit

    def rows(
        self, values: V, first: V, slot: V, words: list[V]
    ) -> Iterator[tuple[V, V, list[list[V]]]]:
        here = values + self.token_warp * (32 * self.plan.channel_blocks)
        rows = 16 // PIECES  # of a warp in the first piece
        for warp in range(self.plan.unit_rows // 16):
            at = here + rows * 2 * self.plan.shape.head_dim * warp
            yield at, first + rows * warp, self._left(warp)

    def slot(self, slot: V) -> V:
        return slot

    def writes_statistics(self, g: V) -> V:
        return (self.token_warp + g).equals(0)

    def first_channels(self) -> V:
        return self.token_warp * self.plan.channel_blocks

    def _collect(self, pairs: list[list[V]]) -> list[list[list[V]]]:
        """[warp][pair]: what all warps have for the columns 2q and 2q + 1, by lane 4 g + q."""
        q = self.lane & 3
        self.meet()
        for n, pair in enumerate(pairs):
            at = self.mine + 32 * n + q * 8
            ptx.when(self.lane < 4, functools.partial(ptx.store, at, pair))
        self.meet()
        found = [
            [
                ptx.load(self.where + 512 * self.blocks * w + 32 * n + q * 8, 2, "f32")
                for n in range(len(pairs))
            ]
            for w in range(self.warps)
        ]
        self.meet()
        return found

    def lowest(self, pairs: list[list[V]]) -> list[list[V]]:
        return [
            [largest_of("min.f32", "f32", list(each)) for each in zip(*all_warps, strict=True)]
            for all_warps in zip(*self._collect(pairs), strict=True)
        ]

    def added(self, pairs: list[list[V]]) -> list[list[V]]:
        out = []
        for all_warps in zip(*self._collect(pairs), strict=True):
            first, *others = all_warps
            for pair in others:
                first = [a + b for a, b in zip(first, pair, strict=True)]
            out.append(first)
        return out


class WarpgroupExchange(Exchange):
    """The same where products of a warpgroup find what was left (`ptx.wgmma`)."""

    @property
    def operands_at(self) -> V:
        return self.where

    def leave(self, words: list[V]) -> list[V]:
        for n in range(self.blocks):
            four = words[4 * n : 4 * n + 4]
            ptx.store_operand(self.mine, self.blocks, ptx.i32(n), four, self.lane, transposed=True)
        ptx.fence_proxies()
        return []

    def _left(self, warp: int) -> list[list[V]]:
        return [
            ptx.load_operand(self.where, self.blocks, n, 4 * warp, 4, self.lane)
            for n in range(self.blocks)
        ]
