"""Clusters: blocks that run together and reach each other's shared memory (9.0 and later).

They take neighbouring multiprocessors, and some are left over: of an H200's 132, with a block each,
clusters of two take all, of three 117, of four and of eight 120, of six 102 (as CUDA's occupancy
calculator says there).
"""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.ptx.values import V, asm


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
