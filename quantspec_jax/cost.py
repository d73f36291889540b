"""What decoding costs: the bytes that each pass reads, and the tokens that a round yields for them.

Decoding long contexts is bound by reading memory, so a pass costs what it reads, each byte once:

    plain    weights             + the cache in full precision    autoregressive, a token a pass
    draft    the draft's weights + upper plane, scales, buffer    a proposal
    verify   weights             + both planes, scales, buffer    γ + 1 rows at once

Of the planes a draft may read a share (`generate.policies`), and has less accepted for it.

A round is γ drafts and a verification. With acceptance α it yields (1 − α^(γ+1))/(1 − α) tokens
(Leviathan et al., arXiv 2211.17192, equation 1). Bytes that a pass writes, activations, and the one
row of the embedding table that it looks up are left out: thousandths of the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from quantspec_jax.axes import ONE, Axes
from quantspec_jax.cache.codecs import codec_of
from quantspec_jax.cache.schedule import room
from quantspec_jax.checks import require
from quantspec_jax.memory import tree_bytes
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import (
    LINEAR_LAYERS,
    layer_shapes,
    parameter_count,
    parameter_shapes,
)
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.sizes import draft_bytes, layer_formats

GROUP_SIZE = 128
MOST_GAMMA = 15  # passes of 16 rows
BF16 = 2  # bytes


def weight_bytes(params: dict[str, Any]) -> int:
    """Bytes that a pass reads of these arrays (or shapes): all but the embedding table, which is
    read whole only where it is tied, as lm_head."""
    read = {k: v for k, v in params.items() if k != "embedding" or "lm_head" not in params}
    return tree_bytes(read)


@functools.lru_cache(maxsize=64)
def target_weight_bytes(model: ModelConfig, itemsize: int = BF16) -> int:
    """`weight_bytes` of the target's weights in a type of `itemsize` bytes."""
    unread = 0 if model.tie_embeddings else parameter_shapes(model)["embedding"].size
    return itemsize * (parameter_count(model) - unread)


def linear_weights(model: ModelConfig) -> int:
    """How many weights the linear layers of the blocks have."""
    shapes = layer_shapes(model)
    return model.num_layers * sum(shapes[f"{name}.kernel"].size for name in LINEAR_LAYERS)


@functools.lru_cache(maxsize=64)
def draft_weight_bytes(model: ModelConfig, draft: DraftConfig, itemsize: int = BF16) -> int:
    """`weight_bytes` of the draft: its own arrays, and the target's where it has none."""
    shapes = parameter_shapes(model)
    replaced = sum(
        shapes[f"{layer}.kernel"].size
        for layer, stored in layer_formats(model, draft).items()
        if stored.bits != 16
    )
    if draft.lm_head_bits == 4:
        whole = min(draft.lm_head_first, model.vocab_size)
        replaced += model.hidden_size * (model.vocab_size - whole)
    return target_weight_bytes(model, itemsize) - itemsize * replaced + draft_bytes(model, draft)


def cache_read_bytes(
    model: ModelConfig,
    view: str,
    context: float,
    itemsize: int = BF16,
    group_size: int = GROUP_SIZE,
    share: float = 1.0,
) -> int:
    """Bytes that a pass reads of one sequence's cache of `context` tokens, `itemsize` bytes a value
    in full precision; of those that are coded, a share."""

    def read(tokens: float) -> int:
        return codec_of(view).read_bytes(model, view, tokens, itemsize, group_size)

    if share == 1:
        return read(context)
    buffer = read(min(context, 1.5 * group_size))
    return int(buffer + share * (read(context) - buffer))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a draft reads of the planes.

    Args:
      policy: name of a policy (`generate.policies`).
      share: of the coded tokens that it reads.
      kept: of what a draft that reads all of them has accepted, the share that this one has.
    """

    policy: str = "all"
    share: float = 1.0
    kept: float = 1.0

    def __post_init__(self) -> None:
        for name in ("share", "kept"):
            value = getattr(self, name)
            require(0 < value <= 1, name, value, "over 0, up to 1")

    @property
    def options(self) -> str:
        """What to give `quantspec generate` for it."""
        if self.policy == "all":
            return ""
        return f"--draft-policy {self.policy} --draft-share {self.share:g}"

    def __str__(self) -> str:
        return self.policy if self.share == 1 else f"{self.policy} {self.share:g}"


ALL_PAGES = Reading()
# Qwen2.5-Coder-1.5B, 8,192 tokens of a novel: the mean of Σ min(p, q) over that of all pages
# (benchmarks/policy-acceptance-*.json). 30,000 keep more, 130,000 (YaRN) 0.986 and 0.971. A model
# of 135M kept 0.96 and 0.93 of 4,096 (benchmarks/page-votes-*.json), where less read saves little.
READINGS = (ALL_PAGES, Reading("top-pages", 0.25, 0.99), Reading("top-pages", 0.125, 0.977))
# As many as an H200 reads in 25 µs: a layer of a pass takes that and more beyond its own bytes, by
# milliseconds_a_round and floor_milliseconds of benchmarks/decode-*.json.
LAYER_BYTES = 110e6
WORTH = 1.02  # times as fast as all pages another reading has to be


@dataclasses.dataclass(frozen=True)
class Costs:
    """One pass of each kind, all in one unit: bytes, or milliseconds.

    plain   autoregressive, the cache in full precision
    draft   a draft step
    verify  a verification; also an autoregressive step that reads the int8 view
    """

    plain: float
    draft: float
    verify: float

    def speed_up(self, acceptance: float, gamma: int, group_size: int = GROUP_SIZE) -> float:
        """Tokens for what one costs in plain decoding; below 1 plain decoding is faster."""
        round_cost = gamma * self.draft + self.verify
        return self.plain * tokens_a_round(acceptance, gamma, group_size) / round_cost

    def best_gamma(
        self, acceptance: float, most: int = MOST_GAMMA, group_size: int = GROUP_SIZE
    ) -> int:
        """The γ from 1 to `most` that yields most for its cost."""
        gammas = range(1, min(most, group_size - 1) + 1)
        return max(gammas, key=lambda gamma: self.speed_up(acceptance, gamma, group_size))


def bytes_read(
    model: ModelConfig,
    draft: DraftConfig,
    context: float,
    *,
    batch: int = 1,
    itemsize: int = BF16,
    group_size: int = GROUP_SIZE,
    view: str = "int4",
    share: float = 1.0,
    axes: Axes = ONE,
) -> Costs:
    """Bytes that a pass of each kind reads for `batch` sequences of `context` tokens. `view`,
    `share`: what drafts read of the planes; `axes`: over which devices it is split, of which each
    reads so many bytes."""
    weights = target_weight_bytes(model, itemsize) // axes.tp
    drafted = draft_weight_bytes(model, draft, itemsize) // axes.tp

    def cache(view: str, share: float = 1.0) -> int:
        every = batch * cache_read_bytes(model, view, context, itemsize, group_size, share)
        return every // axes.size

    return Costs(weights + cache("full"), drafted + cache(view, share), weights + cache("int8"))


def best_reading(
    model: ModelConfig,
    draft: DraftConfig,
    context: float,
    acceptance: float,
    *,
    readings: Sequence[Reading] = READINGS,
    most: int = MOST_GAMMA,
    itemsize: int = BF16,
    group_size: int = GROUP_SIZE,
) -> Reading:
    """The one that yields most at its best γ, `most` at most, by bytes and layers; `acceptance` is
    that of a draft that reads all, which is the choice unless another promises `WORTH` times as
    much."""
    launched = LAYER_BYTES * model.num_layers

    def speed_up(reading: Reading) -> float:
        costs = bytes_read(
            model,
            draft,
            context,
            share=reading.share,
            itemsize=itemsize,
            group_size=group_size,
        )
        costs = Costs(*(each + launched for each in dataclasses.astuple(costs)))
        expected = acceptance * reading.kept
        return costs.speed_up(expected, costs.best_gamma(expected, most))

    best = max(readings, key=speed_up)
    whole = next((reading for reading in readings if reading.share == 1), best)
    return best if speed_up(best) >= WORTH * speed_up(whole) else whole


def operations(
    model: ModelConfig, context: float, rows: int, batch: int = 1, axes: Axes = ONE
) -> float:
    """Multiplications and additions of a pass of `rows` tokens a sequence, by each device of
    `axes`: those of `cp` all multiply with the same weights."""
    products = 2 * target_weight_bytes(model, itemsize=1) / axes.tp
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * context
    return batch / axes.dp * rows * (products + attention / (axes.tp * axes.cp))


def meetings(model: ModelConfig, axes: Axes) -> int:
    """How often the devices meet in a pass: two sums a layer, one of the embedding and the logits
    over `tp`, an exchange of partial attention a layer over `cp`."""
    over_tp = 2 * model.num_layers + 2 if axes.tp > 1 else 0
    return over_tp + (model.num_layers if axes.cp > 1 else 0)


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Tokens of a round: 1 + α + … + α^γ = (1 − α^(γ+1))/(1 − α).

    `acceptance` α is the chance that a proposal is accepted where all before it in its round were
    (what `quantspec eval acceptance` measures, and the acceptance rate at γ = 1). The share of
    accepted proposals, everything after a rejection counted as rejected, is (α + … + α^γ)/γ.
    """
    _check(acceptance, gamma)
    return sum(acceptance**i for i in range(gamma + 1))


@functools.lru_cache(maxsize=4096)
def tokens_a_round(acceptance: float, gamma: int, group_size: int = GROUP_SIZE) -> float:
    """`expected_tokens` with the rounds that a flush cuts short, which propose γ' < γ tokens.

    A round at position n proposes γ' = min(γ, G − 1 − (n mod G)), so each G tokens begin a round.
    With r(n) the rounds from n to the next multiple of G, the mean is G/r(0).
    """
    _check(acceptance, gamma)
    rounds = [0.0] * (group_size + 1)
    for n in reversed(range(group_size)):
        last = min(gamma, room(n, group_size))
        reach = [acceptance**a for a in range(last + 1)]  # P(at least a are accepted)
        chances = [p - q for p, q in zip(reach, [*reach[1:], 0.0], strict=True)]
        rounds[n] = 1 + sum(p * rounds[n + 1 + a] for a, p in enumerate(chances))
    return group_size / rounds[0]


def _check(acceptance: float, gamma: int) -> None:
    require(0 <= acceptance <= 1, "acceptance", acceptance, "0 to 1")
    require(gamma >= 0, "gamma", gamma, "an integer ≥ 0")
