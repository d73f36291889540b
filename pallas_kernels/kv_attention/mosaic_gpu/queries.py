"""A warp's query rows, and what a tile makes of them: operands of the products with keys."""

from __future__ import annotations

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.operands import Operands, row_offset
from pallas_kernels.kv_attention.mosaic_gpu.plan import Plan
from pallas_kernels.ptx import V, i32


class Rows:
    """A warp's query rows of one key-value head, as matrix operands.

    Lane 4 g + q holds, of row g of each block of 8, channels [D/8 · q, D/8 · (q+1)) of either half
    of the head: `low` and `high`, words of two bf16.
    """

    def __init__(self, plan: Plan, loaded: list[V], first_row: V, lane: V):
        """`loaded`: what `load` has loaded of these rows."""
        words, out = plan.shape.head_dim // 16, []
        for i in range(0, len(loaded), words):
            valid = first_row + 8 * (i // words // 2) + (lane >> 2) < plan.shape.rows
            out.append([ptx.select(valid, w, i32(0)) for w in loaded[i : i + words]])
        self.low, self.high = out[::2], out[1::2]
        # Both in words of two float16; of rows that are kept, once for all tiles.
        self.float16 = [
            [[ptx.pack_f16(ptx.low_bf16(w), ptx.high_bf16(w)) for w in block] for block in half]
            for half in (self.low, self.high)
        ]

    @staticmethod
    def load(
        plan: Plan, operands: Operands, b: V, k: V, first_row: V, lane: V, blocks: int
    ) -> list[V]:
        """Words of the rows, something else where there is no row."""
        s = plan.shape
        g, q = lane >> 2, lane & 3
        loaded: list[V] = []
        for n in range(blocks):
            row = first_row + 8 * n + g
            safe = ptx.select(row < s.rows, row, i32(0))
            offset = row_offset(s, b, k, safe) * (2 * s.head_dim)
            here = operands["q"] + offset + (q * (s.head_dim // 4)).to_i64()
            for half in (0, s.head_dim):
                loaded += ptx.load_wide(here + half, s.head_dim // 16)
        return loaded


class Queries:
    """Scaled queries of a warp as matrix operands, and the scores' bias, in registers."""

    def __init__(self, operands: list[list[list[V]]], bias: list[list[V]]):
        self.operands, self.bias = operands, bias

    def pairs(self, block: int, word: int) -> list[list[V]]:
        """Operands of the two steps that a word of codes is for."""
        return self.operands[block][2 * word : 2 * word + 2]


class SharedQueries(Queries):
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
        self.write_bias(block, bias)

    def write_bias(self, block: V, bias: list[V]) -> None:
        ptx.when(self.lane < 4, lambda: ptx.store(self.bias_at + block * 32, bias))

    def read_bias(self) -> None:
        blocks = range(self.plan.config.column_blocks)
        self.bias = [ptx.load(self.bias_at + (self.first_block + n) * 32, 2, "f32") for n in blocks]

    def pairs(self, block: int, word: int) -> list[list[V]]:
        at = self.where + (self.first_block + block) * self.block_bytes
        words = ptx.load(at + self.lane * 16 + 512 * word, 4)
        return [words[:2], words[2:]]


class WarpgroupQueries(SharedQueries):
    """The same where products of a warpgroup find them: its blocks side by side (`ptx.wgmma`)."""

    @property
    def operands_at(self) -> V:
        return self.where + self.first_block * self.block_bytes

    def write(self, block: V, operands: list[list[V]], bias: list[V]) -> None:
        blocks = self.plan.config.column_blocks
        at = self.where + block // blocks * (blocks * self.block_bytes)
        words = [x for pair in operands for x in pair]
        ptx.store_operand(at, blocks, block % blocks, words, self.lane)
        self.write_bias(block, bias)
        ptx.fence_proxies()
