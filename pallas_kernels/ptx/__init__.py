"""Thread-level code inside a Pallas Mosaic GPU kernel.

Pallas' own operations act on whole warpgroups and their layouts; a kernel whose inner loop has to
spend less than four instructions a 4-bit code needs to name registers, lanes and PTX instructions.
This package is what such a kernel is written with, inside `plgpu.inline_mgpu`: values of one thread
(`V`), loads and stores by address, loops, and the few PTX instructions that matter (matrix products
of one warp, bulk copies, barriers). It holds no kernel.

Python code that uses it runs once, while JAX lowers the kernel, and emits the instructions.

    values     values of one thread, arithmetic, PTX by name, control
    warps      lanes and warps, matrix products
    warpgroups matrix products of four warps
    memory     loads and stores by address
    copies     copies into shared memory beside the computation, and their barriers
    clusters   blocks that reach each other's shared memory
    packets    numbers for another device's memory
    launch     a Pallas kernel of such code
"""

from pallas_kernels.ptx.clusters import (
    peer_address,
    store_peer,
    sync_cluster,
)
from pallas_kernels.ptx.copies import (
    BulkCopies,
    Piece,
    UnitCopies,
    arrive_after_copies,
    barrier_arrive,
    barrier_expect,
    barrier_init,
    barrier_poll,
    barrier_wait,
    bulk_copy,
    commit_copies,
    copies_of,
    fence_barrier_init,
    fence_proxies,
    unit_copy,
    wait_copies,
)
from pallas_kernels.ptx.launch import (
    begins_early,
    kernel,
    let_next_begin,
    wait_for_launches,
)
from pallas_kernels.ptx.memory import (
    load,
    load_wide,
    store,
    store_half,
)
from pallas_kernels.ptx.packets import load_address, receive, send
from pallas_kernels.ptx.values import (
    V,
    asm,
    at_least,
    both,
    ceil_div,
    choose,
    constant,
    exp2,
    f16_above,
    f16_below,
    f32,
    fma,
    high_bf16,
    i32,
    log2,
    loop,
    low_bf16,
    maximum,
    merge_bits,
    minimum,
    multiply_bf16,
    multiply_f16,
    pack_bf16,
    pack_bf16s,
    pack_f16,
    permute_bytes,
    reciprocal_sqrt,
    select,
    unpack_bf16s,
    unpack_f16,
    when,
)
from pallas_kernels.ptx.warpgroups import load_operand, store_operand, wait_wgmma, wgmma
from pallas_kernels.ptx.warps import (
    any_lane,
    any_thread,
    elected,
    load_matrices_transposed,
    mma,
    shuffle_xor,
    shuffle_xor_bits,
    special,
    store_matrices,
    sync_threads,
    sync_warp,
    transpose_8x8,
    uniform,
)

__all__ = [
    "BulkCopies",
    "Piece",
    "UnitCopies",
    "V",
    "any_lane",
    "any_thread",
    "arrive_after_copies",
    "asm",
    "at_least",
    "barrier_arrive",
    "barrier_expect",
    "barrier_init",
    "barrier_poll",
    "barrier_wait",
    "begins_early",
    "both",
    "bulk_copy",
    "ceil_div",
    "choose",
    "commit_copies",
    "constant",
    "copies_of",
    "elected",
    "exp2",
    "f16_above",
    "f16_below",
    "f32",
    "fence_barrier_init",
    "fence_proxies",
    "fma",
    "high_bf16",
    "i32",
    "kernel",
    "let_next_begin",
    "load",
    "load_address",
    "load_matrices_transposed",
    "load_operand",
    "load_wide",
    "log2",
    "loop",
    "low_bf16",
    "maximum",
    "merge_bits",
    "minimum",
    "mma",
    "multiply_bf16",
    "multiply_f16",
    "pack_bf16",
    "pack_bf16s",
    "pack_f16",
    "peer_address",
    "permute_bytes",
    "receive",
    "reciprocal_sqrt",
    "select",
    "send",
    "shuffle_xor",
    "shuffle_xor_bits",
    "special",
    "store",
    "store_half",
    "store_matrices",
    "store_operand",
    "store_peer",
    "sync_cluster",
    "sync_threads",
    "sync_warp",
    "transpose_8x8",
    "uniform",
    "unit_copy",
    "unpack_bf16s",
    "unpack_f16",
    "wait_copies",
    "wait_for_launches",
    "wait_wgmma",
    "wgmma",
    "when",
]
