"""Loads and stores of a thread, by address: i32 in shared memory, i64 in global memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir

from pallas_kernels.ptx.values import V, asm, i32, llvm, type_named


def address(ref: Any) -> V:
    """Address of a reference's first element: i32 in shared memory, i64 in global memory."""
    pointer = utils.memref_ptr(ref)
    shared = utils.is_smem_ref(ref)
    return V(llvm.ptrtoint(type_named("i32" if shared else "i64"), pointer))


def _pointer(where: V) -> Any:
    shared = str(where.type) == "i32"
    return llvm.inttoptr(llvm.PointerType.get(3 if shared else 1), where.value)


def load(where: V, words: int = 1, kind: str = "i32") -> list[V]:
    """1, 2 or 4 neighbouring words, aligned to their size, from shared (i32) or global memory."""
    element = type_named(kind)
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
