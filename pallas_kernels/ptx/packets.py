"""Packets: numbers that lie in another device's memory together with a mark.

Stores of 8 aligned bytes arrive whole, so that whoever finds the mark has the number beside it: no
fence, and no flag that is written after the data (the LL protocol of NCCL; Hu et al., "Demystifying
NCCL", arXiv 2507.04786).

    bytes   0        4      8        12     16      20     ...
            first    mark   second   mark   third   mark
"""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.ptx.values import V, asm

NUMBER_BYTES = 8
_MOST_READS = 1 << 26  # half a minute: whoever has not sent by then has failed


def load_address(where: V) -> V:
    """8 bytes of global memory, as an address."""
    return asm("ld.global.b64 $0, [$1];", ["i64"], [where], effects=True)[0]


def send(where: V, numbers: Sequence[V], mark: V) -> None:
    """Floats, an even number of them, to any device's memory."""
    for i in range(0, len(numbers), 2):
        pair = [number.bits() for number in numbers[i : i + 2]]
        at = where + NUMBER_BYTES * i
        asm(
            "st.volatile.global.v4.b32 [$0], {$1, $3, $2, $3};", [], [at, *pair, mark], effects=True
        )


def receive(where: V, mark: V, count: int) -> list[V]:
    """Wait for so many floats with this mark, in memory of this device. A trap ends a wait that
    would have no end."""
    words = [f"${i}" for i in range(2 * count)]
    at, wanted = f"${2 * count}", f"${2 * count + 1}"
    loads = " ".join(
        f"ld.volatile.global.v4.b32 {{{', '.join(words[i : i + 4])}}}, [{at} + {4 * i}];"
        for i in range(0, 2 * count, 4)
    )
    seen = " ".join(f"setp.ne.or.u32 missing, {word}, {wanted}, missing;" for word in words[3::2])
    found = asm(
        "{ .reg .pred missing, late; .reg .u32 reads; mov.u32 reads, 0; again:"
        f" {loads} setp.ne.u32 missing, {words[1]}, {wanted}; {seen} add.u32 reads, reads, 1;"
        f" setp.gt.u32 late, reads, {_MOST_READS}; @late trap; @missing bra again; }}",
        ["i32"] * (2 * count),
        [where, mark],
        effects=True,
    )
    return [word.as_float() for word in found[::2]]
