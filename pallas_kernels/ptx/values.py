"""Values of one thread, arithmetic on them, PTX instructions by name, and control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith as _arith
from jaxlib.mlir.dialects import llvm as _llvm
from jaxlib.mlir.dialects import scf as _scf

# Their stubs do not know the convenience layer over the generated operations.
arith: Any = _arith
llvm: Any = _llvm
scf: Any = _scf


def type_named(name: str) -> Any:
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
        return V(arith.extui(type_named("i64"), self.value))

    def bits(self) -> V:
        """A float's bits, as i32."""
        return V(arith.bitcast(type_named("i32"), self.value))

    def as_float(self) -> V:
        """i32 bits read as a float."""
        return V(arith.bitcast(type_named("f32"), self.value))


def constant(number: int | float, kind: Any = "i32") -> V:
    kind = type_named(kind) if isinstance(kind, str) else kind
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
    tied: Sequence[V] = (),
    early: bool = False,
) -> list[V]:
    """PTX. $0, $1, … are first the results (types by name), then as many as are `tied`, then the
    arguments.

    tied   what the results' registers hold before, of the first ones
    early  results are written while arguments are yet to be read
    """
    constraints = [("=&" if early else "=") + _LETTERS[name] for name in results]
    constraints += [str(i) for i in range(len(tied))]
    constraints += [_LETTERS[str(a.type)] for a in args]
    args = [*tied, *args]
    if effects:
        constraints.append("~{memory}")
    types = [type_named(name) for name in results]
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


def merge_bits(a: V, b: V, mask: int, inverted: bool = False) -> V:
    """Bits of a where mask is 1, of b where it is 0, or these inverted, in one instruction."""
    table = 0x1B if inverted else 0xE4
    return asm(f"lop3.b32 $0, $1, $2, {mask:#x}, {table:#x};", ["i32"], [a, b])[0]


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


def f16_below(x: V) -> V:
    """Bits of the greatest float16 that is not above x."""
    return asm("{ .reg .b16 half; cvt.rm.f16.f32 half, $1; cvt.u32.u16 $0, half; }", ["i32"], [x])[
        0
    ]


def f16_above(x: V) -> V:
    """Bits of the smallest float16 that is not below x."""
    return asm("{ .reg .b16 half; cvt.rp.f16.f32 half, $1; cvt.u32.u16 $0, half; }", ["i32"], [x])[
        0
    ]


def multiply_f16(a: V, b: V) -> V:
    """Products of the two float16 of a word."""
    return asm("mul.rn.f16x2 $0, $1, $2;", ["i32"], [a, b])[0]


def pack_f16(low: V, high: V) -> V:
    return asm("cvt.rn.f16x2.f32 $0, $1, $2;", ["i32"], [high, low])[0]


def pack_bf16(low: V, high: V) -> V:
    return asm("cvt.rn.bf16x2.f32 $0, $1, $2;", ["i32"], [high, low])[0]


def unpack_bf16s(words: Sequence[V]) -> list[V]:
    """float32 of both bf16 of each word."""
    return [half(word) for word in words for half in (low_bf16, high_bf16)]


def pack_bf16s(numbers: Sequence[V]) -> list[V]:
    """Words of two bf16 each, from an even number of float32."""
    return [pack_bf16(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


def multiply_bf16(a: V, b: V) -> V:
    """Products of the two bf16 of a word. (`mul.rn.bf16x2` is for 9.0 and later; a product plus −0
    is the product.)"""
    minus_zero = i32(0x80008000)
    return asm("fma.rn.bf16x2 $0, $1, $2, $3;", ["i32"], [a, b, minus_zero])[0]


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
