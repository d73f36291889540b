"""Where the time of a program on a GPU goes, from a trace of its kernels."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pallas_kernels.timing import Kernel

# A kernel is of the first kind whose pattern its name contains: this package's kernels, cuDNN's
# and cuBLAS', and what moves data; XLA's other fusions are the rest.
KINDS = {
    "collectives": r"nccl|all.?reduce|all.?gather|psum|merge_parts",
    "merges": r"kv_attention_merge",
    "int4 attention": r"kv_attention_int4",
    "int8 attention": r"kv_attention_int8",
    "full attention": r"kv_attention|fmha|flash|sdpa|cudnn",
    "int4 products": r"int4_matmul",
    "full products": r"bf16_matmul|gemm|gemv|nvjet|cutlass|xmma|cublas|splitk",
    "norms": r"rms_norm",
    "rope": r"rope_append",
    "quantization": r"quantize_(keys|values)",
    "copies": r"memcpy|memset|copy|concatenate|transpose|dynamic_update_slice",
}
REST, GAPS = "elementwise", "gaps"


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return REST


def busy(kernels: Sequence[Kernel]) -> float:
    """Nanoseconds in which at least one of the kernels, sorted by start, ran."""
    total, end = 0.0, 0.0
    for kernel in kernels:
        stop = kernel.start + kernel.duration
        total += max(0.0, stop - max(kernel.start, end))
        end = max(end, stop)
    return total


def breakdown(
    kernels: Sequence[Kernel], rounds: int, milliseconds_a_round: float
) -> dict[str, float]:
    """Milliseconds a round of each kind of kernel, and of the gaps in which none ran.

    Args:
      kernels: of `rounds` rounds, sorted by start.
      milliseconds_a_round: how long a round takes while nothing is traced.
    """
    found = dict.fromkeys([*KINDS, REST], 0.0)
    for kernel in kernels:
        found[kind_of(kernel.name)] += kernel.duration / rounds / 1e6
    return found | {GAPS: max(0.0, milliseconds_a_round - busy(kernels) / rounds / 1e6)}
