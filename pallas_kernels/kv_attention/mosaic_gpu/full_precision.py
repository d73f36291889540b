"""Attention of a warp to full-precision tokens.

A unit's rows lie in the buffer one after the other, 2 D bytes each: eight neighbours begin in the
same bank of shared memory. So they are copied in pieces, between which 16 bytes are left free, and
what a warp reads at once comes from different pieces, and from all banks. Of 8 pieces of 4 rows:

    bank (of 16 bytes)   0        1        2            7
    piece                0        1        2     …      7
    warp 0               0, 1     4, 5     8, 9         28, 29      row g of 16 in piece g, its
    warp 1               2, 3     6, 7     10, 11       30, 31      first row; row g + 8 the second
"""

from __future__ import annotations

import math

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.exchange import Alone, largest_of
from pallas_kernels.kv_attention.mosaic_gpu.plan import Plan
from pallas_kernels.kv_attention.mosaic_gpu.queries import Rows
from pallas_kernels.kv_attention.mosaic_gpu.softmax import LOG2E, State, softmax
from pallas_kernels.ptx import V, f32, i32


class FullPrecision:
    """Computation of a warp on 16 full-precision tokens in shared memory."""

    def __init__(self, plan: Plan, rows: Rows, lane: V):
        self.plan, self.rows, self.lane, self.unit = plan, rows, lane, plan.shape.unit
        self.g, self.q = lane >> 2, lane & 3

    def accumulate(
        self,
        state: State,
        keys: V,
        values: V,
        first: V,
        slot: V,
        used: V,
        visible: list[list[V]],
        team: Alone,
    ) -> None:
        """Attend to this warp's tokens of the unit that begins at slot `first`; `slot` is their
        first one's, `keys` its row, `values` the row at `team.origin`.

        Column i of block n sees slots up to visible[n][i]; slots from `used` on hold anything.
        """
        s = self.plan.shape
        blocks = self.plan.config.column_blocks
        stride = 2 * s.head_dim
        words = s.head_dim // 16
        here = keys + self.g * self.plan.piece_bytes + self.q * (s.head_dim // 4)
        scores = [[f32(0.0)] * 4 for _ in range(blocks)]
        for half, x in ((0, self.rows.low), (s.head_dim, self.rows.high)):
            token_rows = [ptx.load_wide(here + half + stride * y, words) for y in range(2)]
            for w in range(0, words, 2):
                a = [token_rows[y][w + i] for i in range(2) for y in range(2)]
                for n in range(blocks):
                    scores[n] = ptx.mma("bf16", a, [x[n][w], x[n][w + 1]], scores[n])
        for n in range(blocks):
            for j in range(4):
                token = slot + self.g * self.plan.piece_rows + j // 2
                scores[n][j] = ptx.select(token <= visible[n][j % 2], scores[n][j], f32(-math.inf))

        def use(_: State, p: list[list[list[V]]]) -> tuple[list[V], V]:
            flat = [x for block in p for x in block[0]]
            return self.split(flat), largest_of("max.NaN.f32", "f32", flat)

        one_half, none = [[x] for x in scores], [[f32(0.0)] * 2] * blocks
        alpha = s.sm_scale * LOG2E
        team.meet()  # all have read what the last unit's warps left
        found = softmax(self.plan, state, one_half, alpha, none, [], use, team)
        for where, start, operands in team.rows(values, first, slot, found):
            self.weigh(state, where, start, used, operands)

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

    def weigh(self, state: State, values: V, slot: V, used: V, operands: list[list[V]]) -> None:
        """Add the products of 16 tokens' probabilities, four words a block, with their values."""
        stride = 2 * self.plan.shape.head_dim
        masks = []
        piece_rows = self.plan.piece_rows
        for y in range(2):
            token = slot + self.q * (2 * piece_rows) + y
            low = ptx.select(token < used, i32(0x0000FFFF), 0)
            high = ptx.select(token + piece_rows < used, i32(0xFFFF0000), 0)
            masks.append(low | high)
        # Row of this lane in the four 8×8 matrices that a load takes: rows 0–7 and 8–15 of two
        # neighbouring runs of 8 channels.
        row = (self.lane & 7) * self.plan.piece_bytes + ((self.lane >> 4) & 1) * stride
        where = values + row + ((self.lane >> 3) & 1) * 16
        for m in range(self.plan.channel_blocks):
            a = ptx.load_matrices_transposed(where + 32 * m)
            a = [x & masks[i // 2] for i, x in enumerate(a)]
            for n, four in enumerate(operands):
                for b in (four[:2], four[2:]):
                    state.sums[n][m] = ptx.mma("bf16", a, b, state.sums[n][m])
