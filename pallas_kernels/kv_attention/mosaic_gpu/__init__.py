"""Attention over the hierarchical cache from Ampere on, as a Pallas Mosaic GPU kernel.

What is read, once for all query heads and tokens that share it: a tile of G = 128 tokens of one
key-value head with D = 128 is 17 KB in the draft view and 33 KB in the target view,

    keys    upper [G, D/2]  (lower [G, D/2])  scale, minimum [D]        8 KB (8 KB) 256 B 256 B
    values  upper [D, G/2]  (lower [D, G/2])  scale, minimum [V, G]     8 KB (8 KB) 256 B 256 B

each part one piece of memory, which the copy engine brings into shared memory as it is. A tile
takes a stage of a ring that a *team* of warps owns; 32 full-precision tokens (K and V, 16 KB) take
a stage likewise, so the buffer is a few more units of the same stream. All units of all sequences
and heads, as many as the lengths on the device say, are dealt evenly to the teams of 132 persistent
blocks; a team that crosses from one head to the next writes one partial result for each:

    units   | b0 k0: tile tile tile rows | b0 k1: tile tile ... | b1 k0: ...
    teams   |<----- 0 ----->|<----- 1 ----->|<----- 2 ----->|
    team    leader   order unit i+1 | wait for unit i | compute | leave the stage
            others                  | wait for unit i | compute | leave the stage

Tokens or channels are the rows of m16n8k16 products, queries their 8 columns: codes are converted
in registers, from words that already lie in the order the instruction wants, with 5 instructions
for 8 codes (`Tile`). Key scales are folded into the queries, once a tile; key minima give the
scores' bias; value scales go into the probabilities; value minima are summed on the side. The
running maximum moves only when a probability would leave float16, so that sums are rarely rescaled.
A second kernel merges the partial results by log-sum-exp, and rounds to bfloat16 if asked to.

Where a list says which pages are read, a head's tiles are those of its list, as many as its count
on the device says: the address of a tile's parts is all that changes, and the entry that names it
is loaded a unit before it is needed. A count without a list is for a device that has a part of the
tiles alone. Tiles that the draft view reads exactly take two stages, as
the others and then their lower planes, and one computation, in a loop of its own before the others.
Page log-sums (`pages`) come from the sums of probabilities that the softmax keeps anyway, set apart
for a tile; each warp writes those of its tokens, and who reads them adds them up (`PageLogSums`).

Query rows (tokens × query heads of a key-value head) that it takes: up to 256, 16 tokens × 16
heads, of head_dim up to 128; up to 128, 16 tokens × 8 heads, of 256.

Up to 8 query rows a head: memory bounds it, and what a launch costs at any size. On an H200 that
reads 4,587 GB/s, merge included, per cent of the time that the bytes alone would take:

    kv heads   view    query tokens   length                    ms        reached
    32         int4    1              131,072                   0.140     89%
    32         int4    1              32,768                    0.042     75%
    8          int4    1 (× 4 heads)  131,072                   0.042     73%
    32         int4    1              16 of 1,024 to 32,768     0.303     85%
    32         int8    5              131,072                   0.258     94%
    32         int8    8              131,072                   0.258     94%
    8          int8    4 (× 4 heads)  131,072                   0.079     76%
    8          int8    5 (× 4 heads)  131,072                   0.097     62%
    8          int8    8 (× 4 heads)  131,072                   0.104     58%
    32         full    1              131,072                   0.505     93%

At 32,768 tokens 11 µs come on top of the bytes, 3 of them the merge. From there to 131,072 each
further byte comes at 95% of the ceiling. (The rows of 4 and 5 tokens with 8 heads are of a tuning
run.)

Plain decoding in the int8 view, a block of rows, exchanges probabilities, too (`Config.exchange`):
it leaves a partial result a team instead of one a warp, and two heads × 6 rows at 30,000 tokens
take 11.9 µs with the merge, 14.8 without. Drafts, which have half the bytes, take longer with it.

With 8 key-value heads and 8 query tokens × 4 heads a converted value meets 32 columns, and latency
is the bound: two warps a scheduler, that issue an instruction in 2.5 cycles together. Where each
warp takes 16 of the columns for half of the tokens, two warps convert the same codes, and the sums
of all channels fill the registers: 52%. With `Config.exchange` a warp computes the probabilities of
a quarter of the tokens for all columns, leaves them in shared memory, and sums up a quarter of the
channels over all tokens: each code is converted once, and sums take 32 registers instead of 64.
Tried without gain: loops instead of unrolled tokens (48%), twice the tokens between two checks of
the reference (52%), one barrier less a tile (53%), 12 and 16 warps of one column block (44, 36%).

Errors, ‖found − exact‖ / ‖exact‖ before rounding: 2 to 3e-4 over 131,072 random tokens, up to 9e-4
over a few hundred; 1.0e-3 in the worst layer of SmolLM2 after 4,000 (benchmarks/kernel_error.py).
Queries times scales are float16, which weighs most where an attention sink has a score of 70.
Products with what their rounding leaves would be exact, and take 1 to 13% more time; codes counted
from their middle halve the error (`Tile.queries`).
"""

from pallas_kernels.kv_attention.mosaic_gpu.kernel import (
    kv_attention,
    most_rows,
    shape_of,
    unsupported,
)
from pallas_kernels.kv_attention.mosaic_gpu.plan import Config, Plan, Shape

__all__ = ["Config", "Plan", "Shape", "kv_attention", "most_rows", "shape_of", "unsupported"]
