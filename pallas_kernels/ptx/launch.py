"""A Pallas kernel of thread-level code, and when it begins.

From compute capability 9.0 on a launch may begin while the one before it ends (PTX ISA,
"griddepcontrol"; CUDA's programming guide, "Programmatic Dependent Launch"): what it does before it
waits costs nothing then. It waits for all that was launched before it, since that waits, too.

Not where the environment's QUANTSPEC_EARLY_LAUNCHES is 0, to compare.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.ptx.memory import address
from pallas_kernels.ptx.values import asm

# JAX 0.11 launches kernels so, but not in CUDA graphs, where decoding runs.
_LEAST_JAX = (0, 12)


def begins_early() -> bool:
    """Whether a launch begins before the one before it has ended, on the default device."""
    if os.environ.get("QUANTSPEC_EARLY_LAUNCHES") == "0" or jax.__version_info__ < _LEAST_JAX:
        return False
    return dispatch.target().generation.early_launches


def wait_for_launches() -> None:
    """Until what was launched before has ended, and what it wrote is seen here: in each thread that
    reads that, or writes."""
    if begins_early():
        asm("griddepcontrol.wait;", [], [], effects=True)


def let_next_begin() -> None:
    """The next launch may begin, once each block has said so or ended. Its blocks take their place
    beside this one's: where this one reads much, not before it has what it reads."""
    if begins_early():
        asm("griddepcontrol.launch_dependents;", [], [], effects=True)


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
    ahead: Sequence[int] | None = None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """A Pallas kernel whose body is thread-level code.

    body(addresses of the operands and results, address of the shared memory or None). Of `blocks`,
    each `cluster` neighbours (`ctaid.x`) are a cluster. The last `updated` operands are written in
    place: what they have become comes after the results.

    ahead: the body itself calls `wait_for_launches` and `let_next_begin`, else it begins with both;
    and these operands it reads before it waits. What writes them has to have ended when this launch
    begins: a program's arguments are such, and what was there for an earlier launch that lets the
    next begin only after its own wait.
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

    early = begins_early()

    def pallas_body(*refs: Any) -> None:
        def in_scope(shared: Any) -> None:
            types = tuple(plgpu.RefType() for _ in range(len(refs) + 1))

            @plgpu.inline_mgpu(arg_types=types)
            def inline(ctx: Any, *inner: Any) -> None:
                del ctx
                if ahead is None:
                    let_next_begin()
                    wait_for_launches()
                body([address(ref) for ref in inner[:-1]], address(inner[-1]))

            inline(*refs, shared)

        words = max(shared_bytes, 16) // 4
        pl.run_scoped(in_scope, plgpu.SMEM((words,), jnp.uint32), collective_axes="warpgroup")
        if early:
            plgpu.griddepcontrol_wait()  # tells JAX how to launch it

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
        # XLA would hand over a slice where it lies and take the result from elsewhere, as if it
        # were not updated in place (its dynamic-slice fusion, which JAX 0.11 and 0.12 have on).
        written = [jax.new_ref(jax.lax.optimization_barrier(x)) for x in operands[read:]]
        results = run(*operands[:read], *written)
        return (*results, *map(jax.freeze, written))

    return call
