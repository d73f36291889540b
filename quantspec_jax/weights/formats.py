"""How the draft's weights are stored."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from typing import Any

from quantspec_jax.checks import fields_of, is_int, is_number, require


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How one linear layer of the draft is stored.

    Args:
      bits: 4; 8, a second plane of 4 bits that holds what the first one leaves; or 16, the target's
        own weights.
      group_size: input channels that share a scale.
      symmetric: a scale a group only, or a scale and a minimum. (The second plane has scales only.)
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        known = is_int(self.bits) and self.bits in (4, 8, 16)
        require(known, "draft bits", self.bits, "4, 8 or 16")
        require(
            is_int(self.group_size) and self.group_size >= 8 and self.group_size % 8 == 0,
            "draft group_size",
            self.group_size,
            "a multiple of 8",
        )
        require(isinstance(self.symmetric, bool), "draft symmetric", self.symmetric, "true, false")

    def stored_bits(self, kin: int, n: int) -> int:
        """Bits that a [Kin, N] weight takes, scales and minima counted; 16 a weight left alone."""
        if self.bits == 16:
            return 16 * kin * n
        numbers = (1 if self.symmetric else 2) + (self.bits == 8)
        return self.bits * kin * n + 16 * numbers * n * -(-kin // self.group_size)


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """Weights of the draft pass.

    Args:
      bits: 4, 8, or None to draft with the full weights (the 4-bit cache alone).
      group_size: input channels that share a scale.
      symmetric: a scale a group only, or a scale and a minimum.
      layers: which linear layers of the blocks: `all`, `mlp`, or patterns with commas between them,
        such as `layers.*.down,layers.1?.o`.
      method: `rtn` (round to nearest), `gptq` (calibrated on text), or `imported` (the codes of an
        existing 4-bit checkpoint).
      average_bits: mixed precision: each layer of 4 bits gets a format of its own, 4 bits in groups
        of 128 or 64 with or without minima, or 8 bits, so that what rounding costs is least while
        the mean over all linear layers of the blocks, scales counted, is no more than this. Needs
        `gptq`. `group_size` and `symmetric` (then nothing has minima) say where the search starts.
      formats: layers that are stored otherwise than `bits`, `group_size` and `symmetric` say, by
        name (`layers.3.down`): what a mixed-precision search or an import found.
      lm_head_bits: 16: the draft's logits come from the target's lm_head (or tied embedding). 4:
        from a copy of it in groups as above, rounded or calibrated as `method` says; pays off for a
        large vocabulary.
      lm_head_first: beside a copy in 4 bits, so many tokens, those of the smallest ids, have their
        logits from the target's own lm_head. Many tokenizers number their tokens by how often
        they were merged, so that a few thousand of them are most of a text.
    """

    bits: int | None = 4
    group_size: int = 64
    symmetric: bool = False
    layers: str = "all"
    method: str = "rtn"
    average_bits: float | None = None
    formats: tuple[tuple[str, WeightFormat], ...] = ()
    lm_head_bits: int = 16
    lm_head_first: int = 0

    def __post_init__(self) -> None:
        known = self.bits is None or (is_int(self.bits) and self.bits in (4, 8))
        require(known, "draft bits", self.bits, "4, 8 or None")
        known = is_int(self.lm_head_bits) and self.lm_head_bits in (4, 16)
        require(known, "draft lm_head_bits", self.lm_head_bits, "4 or 16")
        known = is_int(self.lm_head_first) and self.lm_head_first >= 0
        require(known, "draft lm_head_first", self.lm_head_first, "an integer ≥ 0")
        useless = self.lm_head_first > 0 and self.lm_head_bits == 16
        words = "0 with lm_head_bits 16, which is the target's own for all tokens"
        require(not useless, "draft lm_head_first", self.lm_head_first, words)
        WeightFormat(4, self.group_size, self.symmetric)
        require(
            isinstance(self.layers, str) and all(self.patterns),
            "draft layers",
            self.layers,
            "all, mlp, or names of layers with * and ?, commas between them",
        )
        methods = ("rtn", "gptq", "imported")
        require(self.method in methods, "draft method", self.method, ", ".join(methods))
        if self.average_bits is not None:
            possible = is_number(self.average_bits) and 4 < self.average_bits <= 16
            require(possible, "draft average_bits", self.average_bits, "a number over 4, up to 16")
            require(
                self.method == "gptq", "draft method", self.method, "gptq (average_bits is set)"
            )

    @functools.cached_property
    def _by_name(self) -> dict[str, WeightFormat]:
        return dict(self.formats)

    @property
    def patterns(self) -> tuple[str, ...]:
        """`layers` as patterns that a layer's name matches or not."""
        if self.layers == "all":
            return ("*",)
        if self.layers == "mlp":
            return ("*.gate", "*.up", "*.down")
        return tuple(pattern.strip() for pattern in self.layers.split(","))

    def format_of(self, layer: str) -> WeightFormat:
        """How the linear layer of this name, such as `layers.3.down`, is stored."""
        if layer in self._by_name:
            return self._by_name[layer]
        if self.bits is None or not any(fnmatch.fnmatchcase(layer, p) for p in self.patterns):
            return WeightFormat(16)
        return WeightFormat(self.bits, self.group_size, self.symmetric)

    def describe(self) -> str:
        """One line for people: what the draft's weights are."""
        head = ", lm_head 4-bit" if self.lm_head_bits == 4 else ""
        head += f" after the first {self.lm_head_first}" if self.lm_head_first else ""
        if self.bits is None:
            return f"full weights{head}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        bits = f"{self.bits}-bit"
        if self.average_bits is not None:
            bits = f"mixed {self.average_bits:g}-bit"
        return f"{bits} {self.method}, {kind}, group {self.group_size}, {self.layers}{head}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` reads back."""
        return dataclasses.asdict(self) | {
            "formats": {name: dataclasses.asdict(stored) for name, stored in self.formats}
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DraftConfig:
        """Inverse of `to_dict`; an unknown key is a ValueError."""
        values = fields_of(cls, data, "draft")
        formats = values.get("formats", {})
        require(isinstance(formats, dict), "draft formats", formats, "an object, by layer")
        values["formats"] = tuple(
            (name, WeightFormat(**fields_of(WeightFormat, value, f"draft formats {name}")))
            for name, value in formats.items()
        )
        return cls(**values)
