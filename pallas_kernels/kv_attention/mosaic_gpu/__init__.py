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
    a warp  order its parts of unit i+1 | wait for unit i | compute | leave the stage

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
    32         int4    1              131,072                   0.136     91%
    32         int4    1              32,768                    0.042     75%
    8          int4    1 (× 4 heads)  131,072                   0.041     75%
    32         int4    1              16 of 1,024 to 32,768     0.303     85%
    32         int8    5              131,072                   0.254     95%
    32         int8    8              131,072                   0.258     94%
    8          int8    5 (× 4 heads)  32,768                    0.027     56%
    8          int8    5 (× 4 heads)  131,072                   0.075     80%
    8          int8    8 (× 4 heads)  131,072                   0.082     73%
    4          int8    5 (× 7 heads)  131,072                   0.057     53%
    32         full    1              131,072                   0.505     93%

At 32,768 tokens 11 µs come on top of the bytes, 3 of them the merge. From there to 131,072 each
further byte comes at 95% of the ceiling.

Plain decoding in the int8 view, a block of rows, exchanges probabilities, too (`Config.exchange`):
it leaves a partial result a team instead of one a warp, and two heads × 6 rows at 30,000 tokens
take 10.2 µs with the merge. Drafts, which have half the bytes, take longer with it.

With grouped heads a converted value meets many columns, and its rows' latency is the bound: the
sums of 32 to 40 columns leave registers for two warps a scheduler alone. Each code is converted
once: with `Config.exchange` a warp computes the probabilities of a quarter of the tokens for all
columns, leaves them in shared memory, and sums up a quarter of the channels over all tokens. On
Hopper such a team is a warpgroup and multiplies as one (`ptx.wgmma`): scaled queries and
probabilities are then read from shared memory once for four warps, not by each.

What a tile of 8 heads × 8 tokens × 4 heads took of its 4,700 cycles, of which two teams a
multiprocessor share each: one warp ordered all copies while the others waited for it, 500; queries
times scales, which are made anew a tile, 800 with the bias; products with keys and values 820 and
1,020, the softmax 630. Now each warp orders its share of the copies, queries become float16 once a
head, and the bias takes two thirds of the products: 94 → 82 µs together, 84 → 75 with 5 tokens,
86 → 57 with 4 heads × 5 tokens × 7. Of the warps' time 22% are instructions, 27% waits for the one
before, 8% for products of a warpgroup, 8% for tensor cores that the other team has.

Tried without gain: each warp with 16 of the columns (132); 16 warps (143); three teams, with stages
that hold a tile's keys or its values (of 24 columns 76 instead of 73, of 32 112: 12 warps leave 168
registers a thread); each warp scaling a quarter of the channels of all rows (3% less of 40 columns,
3 to 5% more of 32); the next tile's queries scaled while the last products run (2 µs longer); the
next tile's copies and the stage left before the last products have ended (±1% at 131,072, 1 µs
longer at 30,000); one barrier less a tile (±1%); loops instead of unrolled tokens; twice the tokens
between two checks of the reference.

Where launches begin early, attention waits at its beginning for what was launched before it. Planes
and lengths are as the layer before read them, so that from the second layer of a pass on the first
tiles are ordered before that wait (`ahead`), and else after the first query rows, which would come
behind 18 MB of tiles: a round of Qwen2.5-1.5B at 30,000 tokens took 5.14 ms before, and 5.02. Since
the merge finds its part of the results before it waits, and RoPE asks for its angles before, it is
4.85. More tiles ordered ahead can be worse: of six layers of Llama-3.1-8B's draft step at 32,768
tokens each takes 0.9 µs less with two stages than with three.

Tried without gain, in six layers of a step: a merge of one warpgroup, whose registers fit beside
attention's, so that it and what comes after begin before attention's end (0 to 2 µs a layer
longer); before the first orders, lengths asked for before all else, a barrier by each of some
threads, one copy of the code (−1.3 to +0.3 µs); drafts of 8 heads × 4 and 2 heads × 6 in teams of
four warps, or by 12 and 16 warps (0.5 to 7 µs longer); 64 tokens of a draft between two checks of
the reference (±0.1); of three stages, 8 heads × 4, one alone ordered before the wait (0.4 µs
longer); a stage ordered anew by whoever leaves it, not before the next unit (0 to 2.4 µs longer).

The arithmetic of tiles is a small part of a draft's attention: a step in which it only waits for
its tiles and leaves them takes 1.4 µs a layer less with 8 heads × 4, and 0.6 with 2 heads × 6.

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
