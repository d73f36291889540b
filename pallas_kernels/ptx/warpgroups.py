"""Products of a warpgroup (Hopper's `wgmma`), whose right operand lies in shared memory.

The four warps of a warpgroup have 16 rows of the left operand each, in registers, as `mma` takes
them; all read the same right operand, once for the four. Products run beside what the warps do
next, until `wait_wgmma`.
"""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.ptx.memory import load
from pallas_kernels.ptx.values import V, asm
from pallas_kernels.ptx.warps import store_matrices

MATRIX_BYTES = 128  # 8 × 8 numbers of 16 bits: a word a lane


def wgmma(
    kind: str, a: Sequence[Sequence[V]], b: V, blocks: int, c: Sequence[V] | None = None
) -> list[V]:
    """C[64, 8 · blocks] += Σ A_i[64, 16] B_i[16, 8 · blocks] of a warpgroup, float32 sums; kind f16
    or bf16; C is 0 before if `c` is None.

    Each warp gives the four words of its 16 rows that `mma` takes, a step, and four sums a block.
    B lies at `b` as `store_operand` writes it. Those who wrote it have called `fence_proxies`, and
    then met. Until `wait_wgmma` nobody reads what is returned, or writes to B.
    """
    count = 4 * blocks
    tied = [] if c is None else [*c]
    words = [x for step in a for x in step]
    first = count + len(tied)
    out = ",".join(f"${i}" for i in range(count))
    # Of the descriptor: 16-byte units, at bit 0 the address, at 16 from one word's matrix to the
    # other's, at 32 from a block to the next.
    across, down = blocks * MATRIX_BYTES // 16, MATRIX_BYTES // 16
    template = [
        "{ .reg .b64 b; .reg .b32 low; .reg .pred sum, none; setp.ne.b32 sum, 1, 0;",
        "setp.ne.b32 none, 0, 0; wgmma.fence.sync.aligned;",
        f"bfe.u32 low, ${first + len(words)}, 4, 14; or.b32 low, low, {across << 16};",
        f"mov.b64 b, {{low, {down}}};",
    ]
    for i in range(len(a)):
        left = ",".join(f"${first + 4 * i + j}" for j in range(4))
        added = "none" if i == 0 and c is None else "sum"
        template.append(
            f"wgmma.mma_async.sync.aligned.m64n{8 * blocks}k16.f32.{kind}.{kind} "
            f"{{{out}}}, {{{left}}}, b, {added}, 1, 1, 0; add.s64 b, b, {2 * across};"
        )
    template.append("wgmma.commit_group.sync.aligned; }")
    return asm(
        " ".join(template),
        ["f32"] * count,
        [*words, b],
        effects=True,
        tied=tied,
        early=c is None,
    )


def wait_wgmma(sums: Sequence[V]) -> list[V]:
    """`sums`, once all products that this warp has ordered are done."""
    template = "wgmma.wait_group.sync.aligned 0;"
    return asm(template, ["f32"] * len(sums), [], effects=True, tied=sums)


def store_operand(
    b: V, blocks: int, block: V, words: Sequence[V], lane: V, transposed: bool = False
) -> None:
    """Write a block of 8 columns of B for `wgmma`: two words a step, as `mma` takes them, of two
    steps or any multiple. `transposed`: each word is one of a sum of `mma`, whose rows are B's.

    A matrix of 8 × 8 is 128 bytes, a row 16; of each word those of all blocks lie side by side:

        b    | word 0 of block 0, 1, … | word 1 of block 0, 1, … | word 2 …
    """
    row = b + (lane >> 3) * (MATRIX_BYTES * blocks) + (lane & 7) * 16 + block * MATRIX_BYTES
    for i in range(0, len(words), 4):
        store_matrices(row + i * (MATRIX_BYTES * blocks), words[i : i + 4], transposed)


def load_operand(b: V, blocks: int, block: int, first: int, count: int, lane: V) -> list[V]:
    """`count` words of a block from word `first` on, as `mma` takes them."""
    at = b + lane * 4
    return [load(at + MATRIX_BYTES * (blocks * (first + i) + block))[0] for i in range(count)]
