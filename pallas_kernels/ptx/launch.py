"""A Pallas kernel of thread-level code.

Tried: launches that begin while the one before them ends (`griddepcontrol`, which jax 0.11 launches
so), where products order their first weights before they wait for it. Without CUDA graphs a draft
step of Qwen2.5-1.5B at 30,000 tokens takes 1.31 ms on an H200 instead of 1.58. In graphs it takes
1.26 with and without: jax 0.11.2 records each kernel as a graph of its own, and between those
nothing can begin early.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ptx.memory import address


def kernel(
    body: Callable[..., None],
    out_type: Sequence[jax.ShapeDtypeStruct],
    *,
    name: str,
    blocks: int,
    warpgroups: int,
    shared_bytes: int = 0,
    cluster: int = 1,
    updated: int = 0,
) -> Callable[..., tuple[jax.Array, ...]]:
    """A Pallas kernel whose body is thread-level code.

    body(addresses of the operands and results, address of the shared memory or None). Of `blocks`,
    each `cluster` neighbours (`ctaid.x`) are a cluster. The last `updated` operands are written in
    place: what they have become comes after the results.
    """
    if blocks % cluster:
        raise ValueError(f"there are {blocks} blocks; a multiple of the cluster's {cluster} can be")
    mesh = plgpu.Mesh(
        grid=(blocks // cluster,),
        grid_names=("block",),
        cluster=(cluster,) if cluster > 1 else (),
        cluster_names=("peer",) if cluster > 1 else (),
        num_threads=warpgroups,
        thread_name="warpgroup",
    )

    def pallas_body(*refs: Any) -> None:
        def in_scope(shared: Any) -> None:
            types = tuple(plgpu.RefType() for _ in range(len(refs) + 1))

            @plgpu.inline_mgpu(arg_types=types)
            def inline(ctx: Any, *inner: Any) -> None:
                del ctx
                body([address(ref) for ref in inner[:-1]], address(inner[-1]))

            inline(*refs, shared)

        words = max(shared_bytes, 16) // 4
        pl.run_scoped(in_scope, plgpu.SMEM((words,), jnp.uint32), collective_axes="warpgroup")

    run = pl.kernel(
        pallas_body,
        tuple(out_type),
        mesh=mesh,
        name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )

    def call(*operands: jax.Array) -> tuple[jax.Array, ...]:
        read = len(operands) - updated
        written = [jax.new_ref(x) for x in operands[read:]]
        results = run(*operands[:read], *written)
        return (*results, *map(jax.freeze, written))

    return call
