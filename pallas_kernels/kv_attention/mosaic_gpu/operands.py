"""Where the kernel's operands and results lie."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels import ptx
from pallas_kernels.kv_attention.mosaic_gpu.plan import Plan, Shape
from pallas_kernels.ptx import V


class Operands:
    """Addresses of the kernel's operands and results, in the order they are passed."""

    def __init__(self, plan: Plan, addresses: Sequence[V]):
        names = ["quantized_length", "start", "q", "key_buffer", "value_buffer"]
        for part in ("keys", "values") if plan.shape.planes else ():
            names += [f"{part}.upper", f"{part}.lower"][: plan.shape.planes]
            names += [f"{part}.scale", f"{part}.minimum"]
        self.tile_names = [n for n in names if "." in n]
        self.lower_names = ["keys.lower", "values.lower"] if plan.shape.exact_tiles else []
        names += self.lower_names
        names += ["tiles"] if plan.shape.listed else []
        names += ["count"] if plan.shape.counted else []
        names += ["output", "statistics"]
        names += ["page_sums"] if plan.shape.page_log_sums else []
        self.by_name = dict(zip(names, addresses, strict=True))

    def __getitem__(self, name: str) -> V:
        return self.by_name[name]

    def get(self, name: str) -> V | None:
        """None where the call has no such operand."""
        return self.by_name.get(name)

    @property
    def tile_parts(self) -> list[V]:
        """Parts of a tile in the order of `Plan.sections`."""
        return [self.by_name[n] for n in self.tile_names]

    @property
    def lower_parts(self) -> list[V]:
        """What a tile that is read exactly has beside them."""
        return [self.by_name[n] for n in self.lower_names]

    def listed_tile(self, shape: Shape, b: V, k: V, unit: V) -> V:
        """Entry `unit` of a head's list, or its last place where there are not as many."""
        assert shape.places is not None
        last = ptx.minimum(unit, shape.places - 1)
        index = (b * shape.kv_heads + k) * shape.places + last
        return ptx.load(self["tiles"] + index.to_i64() * 4)[0]


def row_offset(shape: Shape, b: V, k: V, row: V) -> V:
    """Index of row (head of the group, token) of key-value head k in [B, S, H], as i64."""
    head = k * shape.group + row // shape.tokens
    token = b * shape.tokens + row % shape.tokens
    return (token * (shape.kv_heads * shape.group) + head).to_i64()
