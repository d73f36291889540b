"""Which codec of the cache is stored with a checkpoint, what it learned from a text beside it.

`quantspec_jax.methods.stored` says what the arrays are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from quantspec_jax.checks import fields_of, require

KV_CODECS, KV_BITS = ("aqua",), (2, 3, 4)


@dataclasses.dataclass(frozen=True)
class StoredKV:
    """codec: a method that learns. bits: of a value's code."""

    codec: str = "aqua"
    bits: int = 2

    def __post_init__(self) -> None:
        require(self.codec in KV_CODECS, "kv codec", self.codec, ", ".join(KV_CODECS))
        require(self.bits in KV_BITS, "kv bits", self.bits, ", ".join(map(str, KV_BITS)))

    @property
    def name(self) -> str:
        """In `quantspec_jax.methods.METHODS`."""
        return f"{self.codec}-{self.bits}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> StoredKV:
        """Inverse of `to_dict`."""
        return cls(**fields_of(cls, values, "kv"))
