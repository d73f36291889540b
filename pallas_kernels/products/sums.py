"""What the warps of a block, and the blocks of a cluster, have summed: added up and written.

Each warp leaves its sums in shared memory, [row][part][output]; results are taken four neighbouring
outputs of a row at a time, a *quad*. Without a cluster a thread adds the warps' quads and writes
the result; with one it leaves what the warps have summed to the block that the quad is of. Of
several devices' products the quads are sent to all, and what has come is added (`Meeting`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels import ptx
from pallas_kernels.collectives.meeting import Meeting, total
from pallas_kernels.products.around import Form
from pallas_kernels.ptx import V, f32

LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Sums:
    """Of a block, or the blocks of a cluster.

    outputs  results of a row
    parts    sums that make one result
    warps    that have summed the same results, of other channels
    threads  of a block
    """

    rows: int
    outputs: int
    parts: int
    warps: int
    cluster: int
    threads: int

    @property
    def row_bytes(self) -> int:
        """A row of a warp's sums, padded against bank conflicts."""
        return 4 * self.parts * self.outputs + 32

    @property
    def warp_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def quads(self) -> int:
        return self.rows * self.outputs // 4

    @property
    def share(self) -> int:
        """Quads that a block of a cluster adds up and writes."""
        return -(-self.quads // self.cluster)

    @property
    def inbox_bytes(self) -> int:
        """Where the blocks of a cluster leave what another one adds up."""
        return 16 * self.parts * self.cluster * self.share if self.cluster > 1 else 0

    def mine(self, thread: V, rank: V) -> list[tuple[V, V]]:
        """Quads that a thread writes: which, and whether there is one."""
        slots = [thread + i for i in range(0, self.share, self.threads)]
        if self.cluster == 1:
            return [(slot, slot < self.quads) for slot in slots]
        found = [(slot, rank * self.share + slot) for slot in slots]
        return [(x, ptx.both(slot < self.share, x < self.quads)) for slot, x in found]

    def add_up(
        self,
        kept: V,
        apart: int,
        inbox: V,
        thread: V,
        rank: V,
        write: Callable[[int, V, list[list[V]]], None],
    ) -> None:
        """Add what the warps have kept, `apart` bytes from each other: always in one order.

        write(i, quad, its parts of four sums) is called for each `mine` that is one. Before, all
        warps have met.
        """
        if self.cluster > 1:
            self._exchange(kept, apart, inbox, thread, rank)

        def finish(i: int, index: V) -> None:
            if self.cluster == 1:
                write(i, index, self._of_warps(kept, apart, index))
            else:
                at = inbox + (index - rank * self.share) * (16 * self.parts)
                step = 16 * self.parts * self.share
                write(
                    i, index, [_added(at + 16 * p, step, self.cluster) for p in range(self.parts)]
                )

        for i, (index, inside) in enumerate(self.mine(thread, rank)):
            ptx.when(inside, functools.partial(finish, i, index))

    def _exchange(self, kept: V, apart: int, inbox: V, thread: V, rank: V) -> None:
        def leave(index: V) -> None:
            slot = rank * self.share + index % self.share
            peer = ptx.peer_address(inbox + slot * (16 * self.parts), index // self.share)
            for p, four in enumerate(self._of_warps(kept, apart, index)):
                ptx.store_peer(peer + 16 * p, four)

        for i in range(0, self.quads, self.threads):
            index = thread + i
            ptx.when(index < self.quads, functools.partial(leave, index))
        ptx.sync_cluster()

    def _of_warps(self, kept: V, apart: int, index: V) -> list[list[V]]:
        row_quads = self.outputs // 4
        at = kept + index // row_quads * self.row_bytes + index % row_quads * 16
        return [_added(at + 4 * self.outputs * p, apart, self.warps) for p in range(self.parts)]


def _added(at: V, step: int, count: int) -> list[V]:
    """Fours of floats in shared memory, `step` bytes apart, added in order."""
    fours = [ptx.load(at + i * step, 4, "f32") for i in range(count)]
    out = fours[0]
    for four in fours[1:]:
        out = [a + b for a, b in zip(out, four, strict=True)]
    return out


@dataclasses.dataclass(frozen=True)
class Product:
    """One of a launch's: its weight, where its results go, how many outputs it has, its place among
    the products; its bias, where it is added in the launch."""

    weight: V
    result: V
    outputs: V
    number: V
    bias: V | None = None


class Results:
    """Where the quads of a block, or a cluster, go, and what is done to them before."""

    def __init__(self, sums: Sums):
        self.sums = sums

    def ahead(self, mine: Sequence[tuple[V, V]]) -> list[Any]:
        """Of each of the thread's quads, what it is finished with: asked for before the
        products."""
        raise NotImplementedError

    def write(self, index: V, parts: list[list[V]], added: Any) -> None:
        """A quad's result from its sums; `added`: `ahead`'s of it."""
        raise NotImplementedError

    def finish(
        self,
        kept: V,
        apart: int,
        inbox: V,
        thread: V,
        rank: V,
        added: list[Any],
        meeting: Meeting | None,
    ) -> None:
        """Add up what the warps have kept (`Sums.add_up`), and with a meeting what it is on all
        devices; and write it."""
        sums = self.sums

        def write(i: int, index: V, parts: list[list[V]]) -> None:
            self.write(index, parts, added[i])

        if meeting is None:
            sums.add_up(kept, apart, inbox, thread, rank, write)
            return

        def slot(i: int) -> V:
            return thread + i * sums.threads

        def send(i: int, index: V, parts: list[list[V]]) -> None:
            meeting.send(slot(i), parts[0])

        def write_total(i: int, index: V) -> None:
            write(i, index, [total(meeting.received(slot(i), 4))])

        sums.add_up(kept, apart, inbox, thread, rank, send)
        for i, (index, inside) in enumerate(sums.mine(thread, rank)):
            ptx.when(inside, functools.partial(write_total, i, index))
        meeting.leave(thread)


class RowResults(Results):
    """Outputs first … end − 1 of [rows, outputs].

    out_bytes  of a result: 4, or 2 for bfloat16
    residual   what is added, bfloat16 in the results' shape; or None
    """

    def __init__(
        self,
        sums: Sums,
        form: Form,
        product: Product,
        first: V,
        end: V,
        residual: V | None,
        out_bytes: int,
    ):
        super().__init__(sums)
        self.form, self.result, self.outputs = form, product.result, product.outputs
        self.first, self.end = first, end
        self.residual, self.out_bytes = residual, out_bytes

    def ahead(self, mine: Sequence[tuple[V, V]]) -> list[list[V]]:
        """What is added to each."""
        if self.residual is None:
            return [[] for _ in mine]
        found = []
        for index, _ in mine:
            place = self._place(ptx.minimum(index, self.sums.quads - 1))[0]
            found.append(ptx.load(self.residual + place * 2, 2))
        return found

    def _place(self, index: V) -> tuple[V, V]:
        """A quad's first element in the results, held inside them; and whether it is there."""
        row_quads = self.sums.outputs // 4
        row, output = index // row_quads, self.first + index % row_quads * 4
        held = ptx.minimum(output, self.end - 4)
        return row.to_i64() * self.outputs.to_i64() + held.to_i64(), output < self.end

    def write(self, index: V, parts: list[list[V]], added: list[V]) -> None:
        four = parts[0]
        if self.form.gated:
            gate, up = (rounded(part) for part in parts)
            four = [silu(a) * b for a, b in zip(gate, up, strict=True)]
        if self.residual is not None:
            four = [a + b for a, b in zip(ptx.unpack_bf16s(added), rounded(four), strict=True)]
        place, inside = self._place(index)
        words = ptx.pack_bf16s(four) if self.out_bytes == 2 else four
        ptx.when(inside, lambda: ptx.store(self.result + place * self.out_bytes, words))


def silu(x: V) -> V:
    """x / (1 + e⁻ˣ)"""
    return x / (ptx.exp2(x * (-LOG2_E)) + f32(1.0))


def rounded(numbers: Sequence[V]) -> list[V]:
    """To bfloat16."""
    return ptx.unpack_bf16s(ptx.pack_bf16s(numbers))
