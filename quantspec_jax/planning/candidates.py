"""The drafts to choose from: a format, its acceptance, and what makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from quantspec_jax.checks import require
from quantspec_jax.cost import (
    ALL_PAGES,
    BF16,
    READINGS,
    Reading,
    draft_weight_bytes,
    linear_weights,
    target_weight_bytes,
)
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.sizes import bits_per_weight, draft_bytes


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A format of the draft and its acceptance.

    Args:
      name: for people.
      acceptance: of a first proposal.
      config: how it is stored, if that is known.
      bits: a weight of the linear layers, of the model that it was measured on. They count where
        `config` is not known, or names layers of that model (mixed precision).
      reading: what it reads of the cache.
    """

    name: str
    acceptance: float
    config: DraftConfig | None = None
    bits: float | None = None
    reading: Reading = ALL_PAGES

    def __post_init__(self) -> None:
        require(0 <= self.acceptance <= 1, "acceptance", self.acceptance, "0 to 1")
        bits = 16 if self.bits is None else self.bits
        require(0 < bits <= 16, "draft_bits_per_weight", bits, "over 0, up to 16")

    @property
    def title(self) -> str:
        """Its name, and what it reads of the cache."""
        reads = "" if self.reading == ALL_PAGES else f", {self.reading}"
        return self.name + reads

    def sizes(self, model: ModelConfig) -> DraftSizes:
        """Of this draft of `model`."""
        config = self.config
        if config is not None and (self.bits is None or not config.formats):
            return DraftSizes(
                draft_weight_bytes(model, config),
                draft_bytes(model, config),
                bits_per_weight(model, config),
            )
        bits = 16 if self.bits is None else self.bits
        weights = linear_weights(model)
        own = int(weights * bits / 8)
        return DraftSizes(target_weight_bytes(model) - BF16 * weights + own, own, bits)

    @property
    def options(self) -> str:
        """What to give `quantspec generate` for this draft; nothing where it is stored with a
        checkpoint."""
        return f"{self._weight_options} {self.reading.options}".strip()

    @property
    def _weight_options(self) -> str:
        config = self.config
        if config is None or config.method != "rtn" or config.formats:
            return ""
        return "--draft-bits none" if config.bits is None else _format_options(config)

    @property
    def conversion(self) -> str | None:
        """The options of `quantspec convert` that make this draft, where it takes a calibration."""
        config = self.config
        if config is None or config.method != "gptq" or config.formats:
            return None
        return f"--draft gptq {_format_options(config)}"


@dataclasses.dataclass(frozen=True)
class DraftSizes:
    """What a draft of one model takes.

    Args:
      read: bytes of weights that a draft step reads.
      own: bytes of the draft's own arrays, at most.
      bits: a weight of the linear layers.
    """

    read: int
    own: int
    bits: float


def _format_options(config: DraftConfig) -> str:
    """The command line's options for what a draft stores."""
    bits = config.bits if config.average_bits is None else config.average_bits
    symmetric = " --draft-symmetric" if config.symmetric else ""
    layers = "" if config.layers == "all" else f" --draft-layers '{config.layers}'"
    head = " --draft-lm-head-bits 4" if config.lm_head_bits == 4 else ""
    head += f" --draft-lm-head-first {config.lm_head_first}" if config.lm_head_first else ""
    return f"--draft-bits {bits} --draft-group {config.group_size}{symmetric}{layers}{head}"


# Greedy and at temperature 1, SmolLM2-135M-Instruct: the mean over benchmarks/draft-sweep-*.json,
# 2,048 tokens of two novels; calibrated on the other one, benchmarks/draft-weights-*.json. A small
# model: larger ones lose less to rounding.
DEFAULT_FORMATS: tuple[tuple[DraftConfig, float, float], ...] = (
    (DraftConfig(group_size=128, symmetric=True), 0.746, 0.804),
    (DraftConfig(group_size=128), 0.782, 0.826),
    (DraftConfig(group_size=64), 0.819, 0.860),
    (DraftConfig(group_size=64, layers="mlp"), 0.833, 0.870),
    (DraftConfig(group_size=64, method="gptq"), 0.906, 0.929),
    (DraftConfig(bits=8, group_size=64), 0.964, 0.973),
    (DraftConfig(bits=None), 0.970, 0.975),
)


def default_candidates(sampled: bool = False) -> list[Candidate]:
    """`DEFAULT_FORMATS`, with their acceptance at temperature 1 where it is `sampled`."""
    return [
        Candidate(config.describe(), at_temperature_1 if sampled else greedy, config)
        for config, greedy, at_temperature_1 in DEFAULT_FORMATS
    ]


def scaled_candidates(
    acceptance: float, draft: DraftConfig, sampled: bool = False
) -> list[Candidate]:
    """Candidates where `draft` has this acceptance: itself, and where it is one of
    `DEFAULT_FORMATS`, the others with their rejections in the same proportion as there."""
    require(0 <= acceptance <= 1, "acceptance", acceptance, "0 to 1")
    table = default_candidates(sampled)
    known = [each.acceptance for each in table if each.config == draft]
    if not known:
        return [Candidate(draft.describe(), acceptance, draft)]
    ratio = (1 - acceptance) / (1 - known[0])
    return [
        dataclasses.replace(each, acceptance=max(0.0, 1 - ratio * (1 - each.acceptance)))
        for each in table
    ]


def reading_less(
    candidates: Sequence[Candidate], readings: Sequence[Reading] = READINGS
) -> list[Candidate]:
    """Each of them with every reading."""
    return [
        dataclasses.replace(each, acceptance=each.acceptance * reading.kept, reading=reading)
        for each in candidates
        for reading in readings
    ]
