"""Where the kernel's operands and results lie."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.kv_attention.mosaic_gpu.plan import Plan, Shape
from pallas_kernels.ptx import V


class Operands:
    """Addresses of the kernel's operands and results, in the order they are passed."""

    def __init__(self, plan: Plan, addresses: Sequence[V]):
        names = ["quantized_length", "start", "q", "key_buffer", "value_buffer"]
        for part in ("keys", "values") if plan.shape.planes else ():
            names += [f"{part}.upper", f"{part}.lower"][: plan.shape.planes]
            names += [f"{part}.scale", f"{part}.minimum"]
        names += ["output", "statistics"]
        self.by_name = dict(zip(names, addresses, strict=True))
        self.tile_parts = [self.by_name[n] for n in names if "." in n]

    def __getitem__(self, name: str) -> V:
        return self.by_name[name]


def row_offset(shape: Shape, b: V, k: V, row: V) -> V:
    """Index of row (head of the group, token) of key-value head k in [B, S, H], as i64."""
    head = k * shape.group + row // shape.tokens
    token = b * shape.tokens + row % shape.tokens
    return (token * (shape.kv_heads * shape.group) + head).to_i64()
