"""Lanes, warps and blocks: who a thread is, what lanes tell each other, products of a warp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pallas_kernels.ptx.values import V, asm, i32, select


def special(name: str) -> V:
    """A special register of PTX, such as `tid.x`."""
    return asm(f"mov.u32 $0, %{name};", ["i32"], [])[0]


def uniform(x: V) -> V:
    """Lane 0's value: the compiler then knows that the warp agrees."""
    return asm("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", ["i32"], [x], effects=True)[0]


def shuffle_xor_bits(x: V, distance: int) -> V:
    """The word of lane ^ distance."""
    return asm(f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;", ["i32"], [x], effects=True)[0]


def shuffle_xor(x: V, distance: int) -> V:
    """The float of lane ^ distance."""
    return shuffle_xor_bits(x.bits(), distance).as_float()


def _shuffled(x: V, distance: int) -> V:
    return (shuffle_xor if x.is_float else shuffle_xor_bits)(x, distance)


def over_lanes(x: V, merge: Callable[[V, V], V], distances: Sequence[int] = (16, 8, 4, 2, 1)) -> V:
    """Numbers of the lanes that are so far apart, merged, for each of these; of all lanes unless
    it is said."""
    for distance in distances:
        x = merge(x, _shuffled(x, distance))
    return x


def over_lanes_before(x: V, lane: V, lanes: int = 32) -> tuple[V, V]:
    """Sums over the lanes before this one, and over all: of each `lanes` neighbours, a power of
    two."""
    before, total, distance = x.like(0), x, 1
    while distance < lanes:
        other = _shuffled(total, distance)
        before = before + select((lane & distance) > 0, other, x.like(0))
        total, distance = total + other, 2 * distance
    return before, total


def elected() -> V:
    """Whether this is the lane that stands for its warp, the same one each time; all lanes ask.

    From 9.0 on. Of what it alone does the compiler knows that one lane does it: without, it makes a
    loop over lanes around each bulk copy, of ten instructions and a branch that waits for a vote.
    """
    return asm("elect.sync _|$0, -1;", ["i1"], [], effects=True)[0]


def any_lane(condition: V) -> V:
    word = select(condition, i32(1), 0)
    out = asm(
        "{ .reg .pred p, r; setp.ne.u32 p, $1, 0; vote.sync.any.pred r, p, -1;"
        " selp.u32 $0, 1, 0, r; }",
        ["i32"],
        [word],
        effects=True,
    )[0]
    return out > 0


def any_thread(condition: V, barrier: V, threads: int) -> V:
    """Named barrier of `threads` threads, whole warps: whether the condition holds in any."""
    word = select(condition, i32(1), 0)
    out = asm(
        "{ .reg .pred p, r; setp.ne.u32 p, $1, 0;"
        f" barrier.cta.red.or.pred r, $2, {threads}, p; selp.u32 $0, 1, 0, r; }}",
        ["i32"],
        [word, barrier],
        effects=True,
    )[0]
    return out > 0


def transpose_8x8(x: V) -> V:
    """An 8×8 matrix of 16-bit numbers, a row per four lanes, transposed across the warp."""
    return asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", ["i32"], [x], effects=True)[0]


def load_matrices_transposed(where: V) -> list[V]:
    """Four 8×8 matrices of 16-bit numbers, transposed; lane i gives the address of row i."""
    return asm(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
        ["i32"] * 4,
        [where],
        effects=True,
    )


def store_matrices(where: V, words: Sequence[V], transposed: bool = False) -> None:
    """Four 8×8 matrices of 16-bit numbers, each a word of two neighbours in a row per lane, to
    shared memory, transposed if asked to; lane i gives the address of row i. From 9.0 on."""
    trans = ".trans" if transposed else ""
    asm(
        f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [$0], {{$1,$2,$3,$4}};",
        [],
        [where, *words],
        effects=True,
    )


def mma(kind: str, a: Sequence[V], b: Sequence[V], c: Sequence[V]) -> list[V]:
    """C[16, 8] += A[16, 16] B[16, 8] of one warp, float32 sums; kind f16 or bf16.

    With lane = 4 g + q, a word holding two neighbours along k:
      a: (g, 2q), (g+8, 2q), (g, 2q+8), (g+8, 2q+8)     row, k
      b: (2q, g), (2q+8, g)                             k, column
      c: (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1)     row, column
    """
    return asm(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        ["f32"] * 4,
        [*a, *b, *c],
    )


def sync_warp() -> None:
    asm("bar.warp.sync -1;", [], [], effects=True)


def sync_threads(barrier: V, threads: int) -> None:
    """Named barrier of `threads` threads, whole warps."""
    asm(f"bar.sync $0, {threads};", [], [barrier], effects=True)
