"""The running softmax: what a warp accumulates, and how its reference moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.exchange import Alone
from pallas_kernels.kv_attention.mosaic_gpu.plan import Plan
from pallas_kernels.ptx import V, f32, i32

LOG2E = math.log2(math.e)
# Running reference of the scores, in base 2, before any token: low, but finite.
NOTHING = -1e30
# A probability times its value scale is a float16: the reference moves when one passes LARGEST,
# and moves to 2⁸ above the largest, so that small ones keep their bits.
LARGEST = 2.0**15
HEADROOM = 8.0
SMALLEST_SCALE = 2.0**-40


class State:
    """What a warp accumulates for its rows (columns of the products).

    In lane 4 g + q, for columns 2q and 2q+1 of block n: `origin` the running reference of the
    scores (negative, base 2), `total` Σ p and `offset` Σ p m̂ over the tokens of this lane, and
    `sums`[n][m] the product's registers: channels 16 m + g and + 8, in units of 2^−unit. Where each
    tile's Σ p is asked for, `total` is that within a tile, and `earlier` that of the tiles before.
    """

    def __init__(self, plan: Plan, values: Sequence[V] | None = None):
        s, blocks = plan.shape, plan.config.column_blocks
        self.blocks, self.groups, self.channels = blocks, s.value_groups, plan.channel_blocks
        split = plan.shape.page_log_sums
        count = blocks * (2 + 2 + 2 * split + 2 * self.groups + 4 * self.channels)
        if values is None:
            origin = [f32(-NOTHING)] * (2 * blocks)
            values = origin + [f32(0.0)] * (count - 2 * blocks)
        rest = iter(values)

        def take(n: int) -> list[V]:
            return [next(rest) for _ in range(n)]

        self.origin = [take(2) for _ in range(blocks)]
        self.total = [take(2) for _ in range(blocks)]
        self.earlier = [take(2) for _ in range(blocks)] if split else []
        self.offset = [[take(2) for _ in range(self.groups)] for _ in range(blocks)]
        self.sums = [[take(4) for _ in range(self.channels)] for _ in range(blocks)]

    def flat(self) -> list[V]:
        out: list[V] = []
        for pairs in (self.origin, self.total, self.earlier):
            out += [v for pair in pairs for v in pair]
        for groups in (self.offset, self.sums):
            out += [v for block in groups for pair in block for v in pair]
        return out

    def rescale(self, origin: list[list[V]]) -> None:
        """Move to a new reference."""
        for n in range(self.blocks):
            factor = [ptx.exp2(origin[n][i] - self.origin[n][i]) for i in range(2)]
            self.origin[n] = origin[n]
            for totals in (self.total, self.earlier):
                if totals:
                    totals[n] = [totals[n][i] * factor[i] for i in range(2)]
            self.offset[n] = [[v[i] * factor[i] for i in range(2)] for v in self.offset[n]]
            self.sums[n] = [[c[i] * factor[i % 2] for i in range(4)] for c in self.sums[n]]

    def begin_tile(self) -> None:
        """From here on `total` is the tile's."""
        self.earlier = self.total
        self.total = [[f32(0.0)] * 2 for _ in range(self.blocks)]

    def end_tile(self) -> list[list[V]]:
        """The tile's Σ p of this lane; from here on `total` is that of all tiles."""
        of_tile = self.total
        self.total = [
            [a + b for a, b in zip(*pairs, strict=True)]
            for pairs in zip(self.earlier, of_tile, strict=True)
        ]
        self.earlier = [[f32(0.0)] * 2 for _ in range(self.blocks)]
        return of_tile


def softmax(
    plan: Plan,
    state: State,
    scores: list[list[list[V]]],
    alpha: float,
    bias: list[list[V]],
    scales: list[list[V]],
    use: Callable[[State, list[list[list[V]]]], tuple[list[V], V]],
    team: Alone,
) -> list[V]:
    """Probabilities p = 2^(α scores[block][half][4] + bias[block][column] + origin), and what `use`
    makes of them: words, and the largest number of this lane that is to stay below LARGEST.

    The reference of the running softmax moves only where that number would leave float16's range:
    rarely, so that the sums are rarely rescaled. A product with `scales`[group][half · 2 + y] then
    fits. `use` updates the state that it is given. Those whose words are weighed together move
    together; what their `team` leaves in registers of the words is returned.
    """
    blocks, halves = len(scores), len(scores[0])

    def attend(to: State) -> tuple[list[V], V]:
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

    kept = State(plan, state.flat())
    words, largest = attend(kept)
    fits = largest <= LARGEST
    overflow = ptx.select(fits, i32(0), 1).equals(1)
    fast = [*kept.flat(), *team.leave(words)]
    overflow = team.any(overflow)

    def move() -> Sequence[V]:
        moved = State(plan, state.flat())
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
        moved.rescale(team.lowest(origin))
        again, _ = attend(moved)
        left = team.leave(again)
        team.meet()
        return [*moved.flat(), *left]

    out = ptx.choose(overflow, move, lambda: fast, fast)
    count = len(state.flat())
    state.__init__(plan, out[:count])  # type: ignore[misc]
    return out[count:]
