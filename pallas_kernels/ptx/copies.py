"""Copies into shared memory that run beside the computation, and the barriers that they report to.

A barrier lies in shared memory and has a phase, which completes when as many threads have arrived
as it was made for, and all bytes are there that were announced with `barrier_expect`.
"""

from __future__ import annotations

from pallas_kernels.ptx.values import V, asm


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


def unit_copy(target: V, source: V) -> None:
    """16 bytes from global to shared memory, past the L1 cache, while the thread goes on."""
    asm("cp.async.cg.shared.global [$0], [$1], 16;", [], [target, source], effects=True)


def commit_copies() -> None:
    """What this thread has ordered by `unit_copy` since the last time is a group, maybe empty."""
    asm("cp.async.commit_group;", [], [], effects=True)


def wait_copies(pending: int) -> None:
    """Until no more than the `pending` newest of this thread's groups are under way. Other threads
    see what has come after a barrier that both meet."""
    asm(f"cp.async.wait_group {pending};", [], [], effects=True)
