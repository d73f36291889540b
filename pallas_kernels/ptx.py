"""Thread-level code inside a Pallas Mosaic GPU kernel.

Pallas' own operations act on whole warpgroups and their layouts; a kernel whose inner loop has to
spend less than four instructions a 4-bit code needs to name registers, lanes and PTX instructions.
This module is what such a kernel is written with, inside `plgpu.inline_mgpu`: values of one thread
(`V`), loads and stores by address, loops, and the few PTX instructions that matter (matrix products
of one warp, bulk copies, barriers). It holds no kernel.

Python code that uses it runs once, while JAX lowers the kernel, and emits the instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith as _arith
from jaxlib.mlir.dialects import llvm as _llvm
from jaxlib.mlir.dialects import scf as _scf

# Their stubs do not know the convenience layer over the generated operations.
arith: Any = _arith
llvm: Any = _llvm
scf: Any = _scf


def _type(name: str) -> Any:
    if name == "f32":
        return ir.F32Type.get()
    return ir.IntegerType.get_signless(int(name[1:]))


class V:
    """A value of one thread: i1, i32, i64 or f32. Python numbers become constants of its type."""

    def __init__(self, value: Any):
        self.value = value

    @property
    def type(self) -> Any:
        return self.value.type

    @property
    def is_float(self) -> bool:
        return isinstance(self.type, ir.FloatType)

    def like(self, other: V | int | float) -> V:
        """`other` as a value of this type."""
        return other if isinstance(other, V) else constant(other, self.type)

    def _arith(self, other: V | int | float, integer: Any, floating: Any = None) -> V:
        op = floating if self.is_float else integer
        return V(op(self.value, self.like(other).value))

    def __add__(self, other):
        return self._arith(other, arith.addi, arith.addf)

    def __sub__(self, other):
        return self._arith(other, arith.subi, arith.subf)

    def __mul__(self, other):
        return self._arith(other, arith.muli, arith.mulf)

    def __floordiv__(self, other):
        return self._arith(other, arith.divui)

    def __truediv__(self, other):
        return self._arith(other, None, arith.divf)

    def __mod__(self, other):
        return self._arith(other, arith.remui)

    def __and__(self, other):
        return self._arith(other, arith.andi)

    def __or__(self, other):
        return self._arith(other, arith.ori)

    def __xor__(self, other):
        return self._arith(other, arith.xori)

    def __lshift__(self, other):
        return self._arith(other, arith.shli)

    def __rshift__(self, other):
        return self._arith(other, arith.shrui)

    def _compare(self, other: V | int | float, integer: Any, floating: Any) -> V:
        right = self.like(other).value
        if self.is_float:
            return V(arith.cmpf(floating, self.value, right))
        return V(arith.cmpi(integer, self.value, right))

    def __lt__(self, other):
        return self._compare(other, arith.CmpIPredicate.slt, arith.CmpFPredicate.OLT)

    def __le__(self, other):
        return self._compare(other, arith.CmpIPredicate.sle, arith.CmpFPredicate.OLE)

    def __gt__(self, other):
        return self._compare(other, arith.CmpIPredicate.sgt, arith.CmpFPredicate.OGT)

    def __ge__(self, other):
        return self._compare(other, arith.CmpIPredicate.sge, arith.CmpFPredicate.OGE)

    def equals(self, other: V | int) -> V:
        return self._compare(other, arith.CmpIPredicate.eq, arith.CmpFPredicate.OEQ)

    def to_i64(self) -> V:
        """Zero-extended."""
        return V(arith.extui(_type("i64"), self.value))

    def to_i32(self) -> V:
        """The low word."""
        return V(arith.trunci(_type("i32"), self.value))

    def bits(self) -> V:
        """A float's bits, as i32."""
        return V(arith.bitcast(_type("i32"), self.value))

    def as_float(self) -> V:
        """i32 bits read as a float."""
        return V(arith.bitcast(_type("f32"), self.value))


def constant(number: int | float, kind: Any = "i32") -> V:
    kind = _type(kind) if isinstance(kind, str) else kind
    if isinstance(kind, ir.FloatType):
        return V(arith.constant(kind, ir.FloatAttr.get(kind, float(number))))
    width = ir.IntegerType(kind).width
    number = int(number)
    if number >= 1 << (width - 1):
        number -= 1 << width
    return V(arith.constant(kind, ir.IntegerAttr.get(kind, number)))


def f32(number: float) -> V:
    return constant(number, "f32")


def i32(number: int) -> V:
    return constant(number, "i32")


_LETTERS = {"i1": "b", "i32": "r", "i64": "l", "f32": "f"}


def asm(
    template: str,
    results: Sequence[str],
    args: Sequence[V],
    *,
    effects: bool = False,
) -> list[V]:
    """PTX. $0, $1, … are first the results (types by name), then the arguments."""
    constraints = ["=" + _LETTERS[name] for name in results]
    constraints += [_LETTERS[str(a.type)] for a in args]
    if effects:
        constraints.append("~{memory}")
    types = [_type(name) for name in results]
    if not types:
        out = ir.Type.parse("!llvm.void")
    elif len(types) == 1:
        out = types[0]
    else:
        out = llvm.StructType.get_literal(types)
    result = llvm.inline_asm(
        out, [a.value for a in args], template, ",".join(constraints), has_side_effects=effects
    )
    if not types:
        return []
    if len(types) == 1:
        return [V(result)]
    return [
        V(llvm.extractvalue(t, result, ir.DenseI64ArrayAttr.get([i]))) for i, t in enumerate(types)
    ]


# Arithmetic -------------------------------------------------------------------------------------


def select(condition: V, yes: V, no: V | int | float) -> V:
    return V(arith.select(condition.value, yes.value, yes.like(no).value))


def both(a: V, b: V) -> V:
    """Two conditions."""
    return V(arith.andi(a.value, b.value))


def fma(a: V, b: V, c: V) -> V:
    return asm("fma.rn.f32 $0, $1, $2, $3;", ["f32"], [a, b, c])[0]


def exp2(x: V) -> V:
    return asm("ex2.approx.ftz.f32 $0, $1;", ["f32"], [x])[0]


def log2(x: V) -> V:
    return asm("lg2.approx.ftz.f32 $0, $1;", ["f32"], [x])[0]


def reciprocal(x: V) -> V:
    return asm("rcp.approx.ftz.f32 $0, $1;", ["f32"], [x])[0]


def reciprocal_sqrt(x: V) -> V:
    return asm("rsqrt.approx.ftz.f32 $0, $1;", ["f32"], [x])[0]


def maximum(a: V, b: V) -> V:
    """A NaN gives the other operand."""
    return asm("max.f32 $0, $1, $2;", ["f32"], [a, b])[0]


def minimum(a: V, b: V | int) -> V:
    """Signed integers."""
    return V(arith.minsi(a.value, a.like(b).value))


def at_least(a: V, b: V | int) -> V:
    """Signed integers: the larger."""
    return V(arith.maxsi(a.value, a.like(b).value))


def ceil_div(a: V, b: int) -> V:
    return (a + (b - 1)) // b


def merge_bits(a: V, b: V, mask: int) -> V:
    """Bits of a where mask is 1, of b where it is 0, in one instruction."""
    return asm(f"lop3.b32 $0, $1, $2, {mask:#x}, 0xE4;", ["i32"], [a, b])[0]


def permute_bytes(a: V, b: V, selector: int) -> V:
    """Bytes of (a: 0–3, b: 4–7) named by the selector's nibbles."""
    return asm(f"prmt.b32 $0, $1, $2, {selector:#x};", ["i32"], [a, b])[0]


def low_bf16(pair: V) -> V:
    """float32 of the lower bf16 of a word."""
    return (pair << 16).as_float()


def high_bf16(pair: V) -> V:
    """float32 of the upper bf16 of a word."""
    return (pair & 0xFFFF0000).as_float()


def unpack_f16(pair: V) -> list[V]:
    """float32 of the lower and of the upper float16 of a word."""
    return asm(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
        " cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
        ["f32", "f32"],
        [pair],
    )


def pack_f16(low: V, high: V) -> V:
    return asm("cvt.rn.f16x2.f32 $0, $1, $2;", ["i32"], [high, low])[0]


def pack_bf16(low: V, high: V) -> V:
    return asm("cvt.rn.bf16x2.f32 $0, $1, $2;", ["i32"], [high, low])[0]


def multiply_bf16(a: V, b: V) -> V:
    """Products of the two bf16 of a word."""
    return asm("mul.rn.bf16x2 $0, $1, $2;", ["i32"], [a, b])[0]


# Lanes, warps, blocks ---------------------------------------------------------------------------


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


# Memory -----------------------------------------------------------------------------------------


def address(ref: Any) -> V:
    """Address of a reference's first element: i32 in shared memory, i64 in global memory."""
    pointer = utils.memref_ptr(ref)
    shared = utils.is_smem_ref(ref)
    return V(llvm.ptrtoint(_type("i32" if shared else "i64"), pointer))


def _pointer(where: V) -> Any:
    shared = str(where.type) == "i32"
    return llvm.inttoptr(llvm.PointerType.get(3 if shared else 1), where.value)


def load(where: V, words: int = 1, kind: str = "i32") -> list[V]:
    """1, 2 or 4 neighbouring words, aligned to their size, from shared (i32) or global memory."""
    element = _type(kind)
    if words == 1:
        return [V(llvm.load(element, _pointer(where), alignment=4))]
    vector = ir.VectorType.get((words,), element)
    out = llvm.load(vector, _pointer(where), alignment=4 * words)
    return [V(llvm.extractelement(out, i32(i).value)) for i in range(words)]


def load_wide(where: V, words: int) -> list[V]:
    """`words` neighbouring words in the widest loads that divide them."""
    step = next(n for n in (4, 2, 1) if words % n == 0)
    out: list[V] = []
    for first in range(0, words, step):
        out += load(where + 4 * first, step)
    return out


def store(where: V, values: Sequence[V]) -> None:
    """1, 2 or 4 neighbouring words, aligned to their size."""
    if len(values) == 1:
        llvm.store(values[0].value, _pointer(where), alignment=4)
        return
    kind = ir.VectorType.get((len(values),), values[0].type)
    vector = llvm.mlir_undef(kind)
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value.value, i32(i).value)
    llvm.store(vector, _pointer(where), alignment=4 * len(values))


def store_half(where: V, value: V) -> None:
    """The low 16 bits of a word, to global memory."""
    asm(
        "{ .reg .b16 half; cvt.u16.u32 half, $1; st.global.b16 [$0], half; }",
        [],
        [where, value],
        effects=True,
    )


def barrier_init(barrier: V, arrivals: int) -> None:
    asm(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", [], [barrier], effects=True)


def fence_barrier_init() -> None:
    asm("fence.mbarrier_init.release.cluster;", [], [], effects=True)


def barrier_arrive(barrier: V) -> None:
    asm("mbarrier.arrive.shared::cta.b64 _, [$0];", [], [barrier], effects=True)


def barrier_expect(barrier: V, num_bytes: V) -> None:
    """Arrive, and wait for so many bytes of bulk copies too."""
    asm(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;",
        [],
        [barrier, num_bytes],
        effects=True,
    )


def barrier_wait(barrier: V, parity: V) -> None:
    asm(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;"
        " @!done bra again; }",
        [],
        [barrier, parity],
        effects=True,
    )


def bulk_copy(target: V, source: V, num_bytes: V, barrier: V) -> None:
    """Global to shared memory by the copy engine, 16-byte units, reported to the barrier."""
    asm(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        [],
        [target, source, num_bytes, barrier],
        effects=True,
    )


# Clusters: blocks that run at the same time and reach each other's shared memory -----------------


def peer_address(where: V, rank: V) -> V:
    """What lies at a place of this block's shared memory in the block `rank` of the cluster."""
    return asm("mapa.shared::cluster.u32 $0, $1, $2;", ["i32"], [where, rank])[0]


def store_peer(where: V, four: Sequence[V]) -> None:
    """Four floats to a peer's shared memory."""
    asm(
        "st.shared::cluster.v4.f32 [$0], {$1, $2, $3, $4};",
        [],
        [where, *four],
        effects=True,
    )


def sync_cluster() -> None:
    """All threads of a cluster meet; what they stored before is seen by all after."""
    asm("barrier.cluster.arrive.release.aligned;", [], [], effects=True)
    asm("barrier.cluster.wait.acquire.aligned;", [], [], effects=True)


# Control ----------------------------------------------------------------------------------------


def loop(
    first: V, end: V, carry: Sequence[V], body: Callable[[V, list[V]], Sequence[V]], step: int = 1
) -> list[V]:
    """for i in range(first, end, step): carry = body(i, carry). Signed."""
    op = scf.ForOp(first.value, end.value, i32(step).value, [v.value for v in carry])
    with ir.InsertionPoint(op.body):
        new = body(V(op.induction_variable), [V(v) for v in op.inner_iter_args])
        scf.YieldOp([v.value for v in new])
    return [V(v) for v in op.results]


def when(condition: V, body: Callable[[], None]) -> None:
    op = scf.IfOp(condition.value)
    with ir.InsertionPoint(op.then_block):
        body()
        scf.YieldOp([])


def choose(
    condition: V, yes: Callable[[], Sequence[V]], no: Callable[[], Sequence[V]], like: Sequence[V]
) -> list[V]:
    """Results of one of two branches; `like` gives their types."""
    op = scf.IfOp(condition.value, [v.type for v in like], has_else=True)
    for block, body in ((op.then_block, yes), (op.else_block, no)):
        with ir.InsertionPoint(block):
            scf.YieldOp([v.value for v in body()])
    return [V(v) for v in op.results]


# Launch -----------------------------------------------------------------------------------------


def kernel(
    body: Callable[..., None],
    out_type: Sequence[jax.ShapeDtypeStruct],
    *,
    name: str,
    blocks: int,
    warpgroups: int,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> Callable[..., Any]:
    """A Pallas kernel whose body is thread-level code.

    body(addresses of the operands and results, address of the shared memory or None). Of `blocks`,
    each `cluster` neighbours (`ctaid.x`) are a cluster.
    """
    if blocks % cluster:
        raise ValueError(f"there are {blocks} blocks; a multiple of the cluster's {cluster} can be")
    scratch = {"shared": plgpu.SMEM((max(shared_bytes, 16) // 4,), jnp.uint32)}

    def pallas_body(*refs: Any, shared: Any) -> None:
        types = tuple(plgpu.RefType() for _ in range(len(refs) + 1))

        @plgpu.inline_mgpu(arg_types=types)
        def inline(ctx: Any, *inner: Any) -> None:
            del ctx
            body([address(ref) for ref in inner[:-1]], address(inner[-1]))

        inline(*refs, shared)

    pallas_body.__name__ = name
    return plgpu.kernel(
        pallas_body,
        out_type=tuple(out_type),
        scratch_types=scratch,
        grid=(blocks // cluster,),
        grid_names=("block",),
        cluster=(cluster,) if cluster > 1 else (),
        cluster_names=("peer",) if cluster > 1 else (),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
