"""Copies into shared memory that run beside the computation, and the barriers that they report to.

A barrier lies in shared memory and has a phase, which completes when as many threads have arrived
as it was made for, and all bytes are there that were announced with `barrier_expect`.

Some threads of a block fill a stage of shared memory together. Who does what depends on the device;
what is waited for, and when, does not:

               bulk, from compute capability 9.0 on     asynchronous, from 8.0 on
    order      one thread a warp orders whole pieces    each copies its 16-byte units of all pieces
    barrier    their arrivals, and the bytes            an arrival of each, once its units are there
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from pallas_kernels.ptx.values import V, asm, i32, select, when
from pallas_kernels.ptx.warps import elected, sync_warp

UNIT = 16  # bytes that a thread copies at once


def barrier_init(barrier: V, arrivals: int) -> None:
    asm(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", [], [barrier], effects=True)


def fence_barrier_init() -> None:
    """What the copy engine sees of barriers is what was made of them before."""
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
    """Sleep until the phase of a parity is complete."""
    asm(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;"
        " @!done bra again; }",
        [],
        [barrier, parity],
        effects=True,
    )


def barrier_poll(barrier: V, parity: V) -> None:
    """As `barrier_wait`, by asking again and again."""
    asm(
        "{ .reg .pred done; again: mbarrier.test_wait.parity.shared::cta.b64 done, [$0], $1;"
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


def fence_proxies() -> None:
    """Until this thread's reads and writes of shared memory are done for the copy engine, too, and
    for `wgmma`, which are of another proxy (PTX ISA, "Proxies").

    An arrival at a barrier does not wait for reads that are under way. Other threads' writes come
    after them all the same, but not those of the copy engine: where eight warps'
    `load_matrices_transposed` hit the same banks, a bulk copy that the arrival had allowed was seen
    to overtake them.
    """
    asm("fence.proxy.async.shared::cta;", [], [], effects=True)


def unit_copy(target: V, source: V, line: int = 0) -> None:
    """16 bytes from global to shared memory, past the L1 cache, while the thread goes on. `line`:
    bytes around them, 64, 128 or 256, that L2 may fetch at once."""
    ahead = f".L2::{line}B" if line else ""
    template = f"cp.async.cg.shared.global{ahead} [$0], [$1], 16;"
    asm(template, [], [target, source], effects=True)


def commit_copies() -> None:
    """What this thread has ordered by `unit_copy` since the last time is a group, maybe empty."""
    asm("cp.async.commit_group;", [], [], effects=True)


def wait_copies(pending: int) -> None:
    """Until no more than the `pending` newest of this thread's groups are under way. Other threads
    see what has come after a barrier that both meet."""
    asm(f"cp.async.wait_group {pending};", [], [], effects=True)


def arrive_after_copies(barrier: V) -> None:
    """Arrive when all `unit_copy` that this thread has ordered are there."""
    asm("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", [], [barrier], effects=True)


Piece = tuple[V | int, V, V | int]  # its place in a stage, source, bytes


class BulkCopies:
    """Pieces that the copy engine brings: of each warp that fills a stage, a thread orders some.

    threads  that fill a stage together, and wait for it: whole warps
    thread   which of them this one is
    """

    def __init__(self, threads: int, thread: V):
        self.threads, self.thread = threads, thread
        self.warps, self.warp = threads // 32, thread >> 5

    @staticmethod
    def arrivals(threads: int) -> int:
        """Of a full barrier."""
        return threads // 32

    @staticmethod
    def publish_barriers() -> None:
        """After `barrier_init`, by the thread that has called it."""
        fence_barrier_init()

    def start(self, prepare: Callable[[], None], order: Callable[[], None]) -> None:
        """Make a warp's barriers, and order the first pieces."""

        def both_of_them() -> None:
            prepare()
            order()

        when(elected(), both_of_them)
        sync_warp()

    def order(self, condition: V, fill: Callable[[], None]) -> None:
        """Where a condition holds, which is the same for all of them: let the threads fill a stage,
        those that have something to do there."""
        when(condition, lambda: when(elected(), fill))

    def dealt(self, pieces: Sequence[tuple[int, V, int]]) -> list[Piece]:
        """Those that this thread copies: warp i the i-th of as many as there are warps, the largest
        first; of 0 bytes where there is none left."""
        pieces = sorted(pieces, key=lambda piece: -piece[2])
        if self.warps == 1:
            return [*pieces]
        found: list[Piece] = []
        for i in range(0, len(pieces), self.warps):
            turn = pieces[i : i + self.warps]
            turn += [(*turn[0][:2], 0)] * (self.warps - len(turn))
            places, sources, sizes = zip(*turn, strict=True)
            place = self._own([i32(x) for x in places])
            size = sizes[0] if len(set(sizes)) == 1 else self._own([i32(x) for x in sizes])
            found.append((place, self._own(sources), size))
        return found

    def _own(self, values: Sequence[V]) -> V:
        """This warp's."""
        out = values[0]
        for i, x in enumerate(values[1:], 1):
            out = select(self.warp.equals(i), x, out)
        return out

    def each(self, count: int, copy: Callable[[V], None]) -> None:
        """Call `copy` with the number of each of `count` pieces that this thread copies."""
        for i in range(0, count, self.warps):
            number = self.warp + i
            one = functools.partial(copy, number)
            if i + self.warps <= count:
                one()
            else:
                when(number < count, one)

    def expect(self, barrier: V, num_bytes: V) -> None:
        """Before the pieces of a stage: their bytes together."""
        if self.warps > 1:
            num_bytes = select(self.warp.equals(0), num_bytes, 0)
        barrier_expect(barrier, num_bytes)

    def copy(self, target: V, source: V, num_bytes: V | int, barrier: V, most: int) -> None:
        """One piece, of at most `most` bytes; addresses and bytes are multiples of 16."""
        size = i32(num_bytes) if isinstance(num_bytes, int) else num_bytes
        bulk_copy(target, source, size, barrier)

    def arrive(self, barrier: V) -> None:
        """After the pieces of a stage."""

    def wait(self, barrier: V, parity: V) -> None:
        """Until the barrier's phase of a parity is complete."""
        barrier_wait(barrier, parity)

    def leave(self) -> None:
        """The warp has read a stage, which may then be filled anew.

        PTX orders reads before a later copy, of the other proxy, by a fence alone. Without it, in
        attention and 4-bit products, a verification of Qwen2.5-7B at 131,072 tokens took 0.7% less
        on an H200; steps and rounds of Llama-3.1-8B and Qwen2.5-1.5B 0.5% less to 0.6% more.
        """
        fence_proxies()
        sync_warp()


class UnitCopies(BulkCopies):
    """Pieces that the threads bring themselves: thread i the units i, i + threads, … of each."""

    @staticmethod
    def arrivals(threads: int) -> int:
        return threads

    @staticmethod
    def publish_barriers() -> None:
        pass  # the threads meet before they use them

    def start(self, prepare: Callable[[], None], order: Callable[[], None]) -> None:
        when(self.thread.equals(0), prepare)
        sync_warp()
        order()

    def order(self, condition: V, fill: Callable[[], None]) -> None:
        when(condition, fill)

    def dealt(self, pieces: Sequence[tuple[int, V, int]]) -> list[Piece]:
        return [*pieces]  # of each a part

    def each(self, count: int, copy: Callable[[V], None]) -> None:
        for i in range(count):
            copy(i32(i))

    def expect(self, barrier: V, num_bytes: V) -> None:
        pass

    def copy(self, target: V, source: V, num_bytes: V | int, barrier: V, most: int) -> None:
        offset, together = self.thread * UNIT, UNIT * self.threads
        to, at = target + offset, source + offset.to_i64()
        for first in range(0, most, together):
            unit = functools.partial(_unit, to, at, first)
            if isinstance(num_bytes, int) and first + together <= num_bytes:
                unit()  # there is one for each of the threads
            else:
                when(offset + first < num_bytes, unit)

    def arrive(self, barrier: V) -> None:
        arrive_after_copies(barrier)

    def wait(self, barrier: V, parity: V) -> None:
        barrier_poll(barrier, parity)

    def leave(self) -> None:
        sync_warp()


def _unit(target: V, source: V, offset: int) -> None:
    unit_copy(target + offset, source + offset)


def copies_of(bulk: bool) -> type[BulkCopies]:
    """How threads fill stages: in bulk, or unit by unit."""
    return BulkCopies if bulk else UnitCopies
