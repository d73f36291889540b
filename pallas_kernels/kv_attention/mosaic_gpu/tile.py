"""Attention of a warp to the tokens of a tile of codes."""

from __future__ import annotations

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.exchange import (
    Alone,
    WarpgroupExchange,
    largest_of,
)
from pallas_kernels.kv_attention.mosaic_gpu.plan import Plan
from pallas_kernels.kv_attention.mosaic_gpu.queries import Queries, Rows, WarpgroupQueries
from pallas_kernels.kv_attention.mosaic_gpu.softmax import LOG2E, State, softmax
from pallas_kernels.ptx import V, f32, i32


class Tile:
    """Computation of a warp on its tokens of a tile of codes in shared memory.

    Codes enter the products as float16 subnormals: the bits of code c, in bits 0–3 or 4–7 of a
    half word, read as float16, are c·2⁻²⁴ or 16 c·2⁻²⁴, exactly, and matrix instructions take them
    at full speed. Products with the second kind carry a factor 1/16 on the other side; with both
    planes a byte 16 u + l + 8 takes their place, and none is needed.

    Of values' codes half are counted from the top, in 16 tokens of each 32, and weighed negatively:
    p (m̂ + ŝ c) = p (m̂ + ŝ top) − p ŝ (top − c). Tensor cores cut off what lies two bits below the
    last place of the largest of what they add, so a sum that only grows comes out short: of codes
    that are all ≥ 0, over 16,000 tokens, by 0.006 of what minima leave of it in the end. Of both
    kinds it stays small. (A model that cuts so gives the errors that an H200 showed: 0.0014, 0.0031
    and 0.0064 after 4,000, 8,000 and 16,000 tokens. This way an H200 shows 0.0002 to 0.0003.)

    `lower`: in the draft view, of a tile that is read exactly, how far behind it the lower planes
    of keys and values lie.
    """

    def __init__(self, plan: Plan, lane: V, lower: V | None = None):
        self.plan, self.lane = plan, lane
        self.g, self.q = lane >> 2, lane & 3
        s = plan.shape
        # Of 16 tokens, a lane's rows g and g + 8 are 2 g and 2 g + 1 in the draft view, and in the
        # target view `order` and order + 2: there neighbours g read neighbouring rows of keys, from
        # all banks, and the value codes are sorted as cheaply.
        self.order = (self.g >> 1) * 4 + (self.g & 1)
        self.both = s.planes == 2 or lower is not None
        # What 1 is in the scores, and what the sums' unit is short of it.
        self.unit = 2.0**-20 if self.both else 2.0**-24
        self.to_sums = s.unit / self.unit
        # What the codes are short of in the draft and target views, in steps.
        self.half = 0.5 if self.both else 1 / 32
        self.high_factor = 1.0 if self.both else 1 / 16
        self.top = 255 / 16 if self.both else 15.0
        self.words = s.head_dim // 32
        starts = plan.section_starts
        parts = len(starts) // 2
        self.key_at, self.value_at = starts[:parts], starts[parts:]
        self.key_codes: list[V | int] = [*self.key_at[: s.planes]]
        self.value_codes: list[V | int] = [*self.value_at[: s.planes]]
        if lower is not None:
            self.key_codes.append(lower)
            self.value_codes.append(lower + plan.code_bytes)

    def queries(self, tile: V, rows: Rows) -> tuple[list[list[list[V]]], list[list[V]]]:
        """Key scales folded into the queries: (operands[block][step], bias[block][column]).

        The bias is what the scores are short of, for key minima and the codes' offset. It also
        moves the codes' origin to their middle, where float16's rounding of the scaled queries
        weighs least: Σ x₁₆ (u − 8) + 8 Σ x, x the scaled queries and x₁₆ the rounded ones.

        Queries become float16, as scales and minima are: exactly, from 2⁻¹⁴ to 65,504.
        """
        s = self.plan.shape
        here = tile + self.q * (s.head_dim // 4)
        *_, scale_at, minimum_at = self.key_at
        minima = self.lane < 16
        mixed_at = ptx.select(minima, i32(minimum_at), scale_at)
        scale, mixed = (
            [ptx.load_wide(here + at + half, 2 * self.words) for half in (0, s.head_dim)]
            for at in (scale_at, mixed_at)
        )
        numbers = [*mixed[0], *mixed[1]]
        weight = ptx.select(minima, f32(1.0), 8 - self.half)
        operands, bias = [], []
        for low, high in zip(*rows.float16, strict=True):
            steps = self._scaled(low, high, scale)
            # Sums of their own, since each product waits for the last one of its sum.
            sums = [[f32(0.0)] * 4 for _ in range(4)]
            # Rows 0–3 are minima, 4–7 scales. Four words as they lie are words 0 and 2 of row g and
            # words 1 and 3 of row g + 8: each is right where it meets its own.
            x = [*low, *high]
            for w in range(0, len(x), 4):
                for j in range(2):
                    sums[j] = ptx.mma("f16", numbers[w : w + 4], [x[w + j], x[w + j + 2]], sums[j])
            first = i32(0xC800C800)  # −8 twice
            second = first if self.both else i32(0xD800D800)  # −8 · 16
            for i, pair in enumerate(steps):
                j = 2 + i % 2
                sums[j] = ptx.mma("f16", [first, first, second, second], pair, sums[j])
            operands.append(steps)
            factor = s.sm_scale * LOG2E
            exact = [(sums[0][i] + sums[1][2 + i]) * weight for i in (0, 1)]
            bias.append(
                [
                    (own + ptx.shuffle_xor(own, 16) + (sums[2][i] + sums[3][i])) * factor
                    for i, own in enumerate(exact)
                ]
            )
        return operands, bias

    def _scaled(self, low: list[V], high: list[V], scale: list[list[V]]) -> list[list[V]]:
        """Words of queries times scales, in pairs of a word of either half."""
        if not self.both:
            high = [ptx.multiply_f16(x, i32(0x2C002C00)) for x in high]  # high_factor twice
        halves = [
            [ptx.multiply_f16(a, b) for a, b in zip(x, numbers, strict=True)]
            for x, numbers in zip((low, high), scale, strict=True)
        ]
        if self.both:
            return [list(pair) for pair in zip(*halves, strict=True)]
        # Channels in the order of `fragments`: every other one.
        return [
            [ptx.permute_bytes(x[w], x[w + 1], selector) for x in halves]
            for w in range(0, 2 * self.words, 2)
            for selector in (0x5410, 0x7632)
        ]

    def numbers(self, where: V) -> V:
        """A word of this lane's two of the 16 numbers at `where`."""
        if not self.both:
            return ptx.load(where + self.g * 4)[0]
        low, high = ptx.load(where + (self.g >> 1) * 8, 2)
        odd = (self.g & 1).equals(1)
        return ptx.select(
            odd, ptx.permute_bytes(low, high, 0x7632), ptx.permute_bytes(low, high, 0x5410)
        )

    def fragments(
        self, upper: list[V], lower: list[V] | None = None, *, mirrored: bool = False
    ) -> list[list[V]]:
        """Matrix operands of two steps from one word of each of rows g and g + 8; `mirrored`: the
        high nibbles' codes counted from the top."""
        if lower is None:
            steps = []
            for shift in (0, 8):
                x = [w >> shift if shift else w for w in upper]
                high = [w ^ 0x00F000F0 for w in x] if mirrored else x
                steps.append([w & 0x000F000F for w in x] + [w & 0x00F000F0 for w in high])
            return steps
        pairs = [*zip(upper, lower, strict=True)]
        both = [ptx.merge_bits(u << 4, w, 0xF0F0F0F0) for u, w in pairs]
        both += [ptx.merge_bits(u, w >> 4, 0xF0F0F0F0, mirrored) for u, w in pairs]
        zero = i32(0)
        return [
            [ptx.permute_bytes(w, zero, 0x4140) for w in both],
            [ptx.permute_bytes(w, zero, 0x4342) for w in both],
        ]

    def scores(self, tile: V, first: V, operands: Queries) -> list[list[list[V]]]:
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
                    for at in self.key_codes
                ]
            )
        if isinstance(operands, WarpgroupQueries):
            halves = []
            for planes in loaded:
                words = ([[x[i] for x in plane] for plane in planes] for i in range(self.words))
                a = [step for each in words for step in self.fragments(*each)]
                halves.append(ptx.wgmma("f16", a, operands.operands_at, blocks))
            return _blocks(halves)
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
        state: State,
        tile: V,
        mine: V,
        turn: int,
        operands: Queries,
        team: Alone,
    ) -> None:
        """Attend to 32 tokens, number `turn` of the part of warp `mine`."""
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
                scale = ptx.unpack_f16(self.numbers(at + scale_at + 32 * half))
                minimum = ptx.unpack_f16(self.numbers(at + minimum_at + 32 * half))
                origin = self.top - self.half if half else -self.half
                for exact, least in zip(scale, minimum, strict=True):
                    group_minimum.append(ptx.fma(exact, f32(origin), least))
                    factor = self.to_sums * (self.high_factor if half else 1.0)
                    group_scale.append(exact * factor if factor != 1.0 else exact)
            scales.append(group_scale)
            minima.append(group_minimum)
        signed = [[*group[:2], *[x * -1.0 for x in group[2:]]] for group in scales]
        alpha = s.sm_scale * LOG2E / self.unit

        def use(to: State, p: list[list[list[V]]]) -> tuple[list[V], V]:
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
                for group in signed
                for y in range(2)
                for h, half in enumerate(block)
            ]
            above, below = (
                largest_of(f"{which}.NaN.f16x2", "i32", words[h::2])
                for h, which in enumerate(("max", "min"))
            )
            both = largest_of("max.NaN.f16x2", "i32", [above, below ^ 0x80008000])
            return words, largest_of("max.NaN.f32", "f32", ptx.unpack_f16(both))

        if turn:
            team.meet()  # all have read what they left in the last turn
        found = softmax(self.plan, state, scores, alpha, operands.bias, scales, use, team)
        if isinstance(team, WarpgroupExchange):
            places = [where + offset for where, offset in team.places(tile, turn)]
            channels = []
            for m in range(self.plan.channel_blocks):
                codes = [step for at in places for step in self.value_fragments(at + 256 * m)]
                sums = [x for block in state.sums for x in block[m]]
                channels.append(ptx.wgmma("f16", codes, team.operands_at, blocks, sums))
            state.sums = _blocks(channels)
            return
        for where, offset, weights in team.runs(tile, first, turn, found):
            for m in range(self.plan.channel_blocks):
                for step, a in enumerate(self.value_fragments(where + (offset + 256 * m))):
                    for n in range(blocks):
                        b = weights[n][16 * m // s.value_width][2 * step : 2 * step + 2]
                        state.sums[n][m] = ptx.mma("f16", a, b, state.sums[n][m])

    def value_fragments(self, where: V) -> list[list[V]]:
        """Matrix operands of two steps: 32 tokens and the 16 channels at `where`."""
        loaded = [[ptx.load(where + at + 128 * y)[0] for y in range(2)] for at in self.value_codes]
        return self.fragments(*loaded, mirrored=True)


def _blocks(products: list[list[V]]) -> list[list[list[V]]]:
    """Sums of products that a warpgroup has ordered, [product][4 a block], once they are there:
    [block][product][4]."""
    done = ptx.wait_wgmma([x for each in products for x in each])
    each = len(products[0])
    return [
        [done[each * i + n : each * i + n + 4] for i in range(len(products))]
        for n in range(0, each, 4)
    ]
