"""`quantspec plan`: which draft, and how many tokens a round, for a model, a context and a device.

Each format of the draft at each γ is given the time a token that the cost model
(`quantspec_jax.cost`) says, beside plain decoding, and the memory it needs. A pass takes what its
bytes take at the device's bandwidth, or its arithmetic where that takes longer, divided by the
share of that limit which the kernels reach (1: the limit itself).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantspec_jax.checks import require
from quantspec_jax.cost import (
    BF16,
    MOST_GAMMA,
    cache_read_bytes,
    draft_weight_bytes,
    linear_weights,
    operations,
    target_weight_bytes,
    tokens_a_round,
)
from quantspec_jax.generate.config import Mode
from quantspec_jax.info import cache_sizes
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import parameter_count
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.sizes import bits_per_weight, draft_bytes

GIB = 2**30
# Plain decoding, by the view of the cache that it reads.
PLAIN: dict[str, str] = {"full": "bf16", "int8": "8-bit"}
# What is read of the bandwidth in the data sheet: 4,390 of 4,800 GB/s, measured on an H200.
READABLE = 0.915
# The kernels of this package need it; elsewhere XLA runs, far from the limit.
LEAST_CAPABILITY = 9.0


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device can do.

    Args:
      memory: GiB, None if unknown: then whether a plan fits is not judged.
      bandwidth: GB/s that are read in practice.
      teraflops: bf16 products with sums in float32, dense; None: taken to be no limit.
      capability: CUDA compute capability, None if unknown.
    """

    memory: float | None
    bandwidth: float
    teraflops: float | None = None
    capability: float | None = None

    def __post_init__(self) -> None:
        for name in ("memory", "bandwidth"):
            value = getattr(self, name)
            positive = value is None or 0 < value < float("inf")
            require(positive, name, value, "a positive number")

    def milliseconds(self, bytes_read: float, operations: float = 0) -> float:
        """The least time of a pass: what takes longer, reading or arithmetic."""
        arithmetic = operations / (self.teraflops * 1e9) if self.teraflops else 0
        return max(bytes_read / (self.bandwidth * 1e6), arithmetic)


def _data_sheet(memory: float, bandwidth: float, teraflops: float, capability: float) -> Device:
    return Device(memory, READABLE * bandwidth, teraflops, capability)


DEVICES = {
    "a100": _data_sheet(79.2, 2039, 312, 8.0),
    "a100-40gb": _data_sheet(39.4, 1555, 312, 8.0),
    "b200": _data_sheet(178, 8000, 2250, 10.0),
    "h100": _data_sheet(79.2, 3350, 989, 9.0),
    "h100-pcie": _data_sheet(79.2, 2000, 756, 9.0),
    "h200": _data_sheet(139.8, 4800, 989, 9.0),
    "l4": _data_sheet(22.5, 300, 121, 8.9),
    "l40s": _data_sheet(44.5, 864, 362, 8.9),
    "rtx3090": _data_sheet(23.6, 936, 71, 8.6),
    "rtx4090": _data_sheet(23.6, 1008, 165, 8.9),
    "rtx5090": _data_sheet(31.4, 1792, 209, 12.0),
}


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Which share of its limit a pass reaches; 1 is the limit itself."""

    plain: float = 1.0
    draft: float = 1.0
    verify: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(0 < value <= 1, f"{field.name} efficiency", value, "over 0, up to 1")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A format of the draft and its acceptance.

    Args:
      name: for people.
      acceptance: of a first proposal.
      config: how it is stored, if that is known.
      bits: a weight of the linear layers, of the model that it was measured on. They count where
        `config` is not known, or names layers of that model (mixed precision).
    """

    name: str
    acceptance: float
    config: DraftConfig | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        require(0 <= self.acceptance <= 1, "acceptance", self.acceptance, "0 to 1")
        bits = 16 if self.bits is None else self.bits
        require(0 < bits <= 16, "draft_bits_per_weight", bits, "over 0, up to 16")

    def sizes(self, model: ModelConfig) -> tuple[int, int, float]:
        """Bytes of weights that a draft step reads, bytes of the draft's own arrays (at most), and
        bits."""
        config = self.config
        if config is not None and (self.bits is None or not config.formats):
            return (
                draft_weight_bytes(model, config),
                draft_bytes(model, config),
                bits_per_weight(model, config),
            )
        bits = 16 if self.bits is None else self.bits
        weights = linear_weights(model)
        own = int(weights * bits / 8)
        return target_weight_bytes(model) - BF16 * weights + own, own, bits

    @property
    def options(self) -> str:
        """What to give `quantspec generate` for this draft; nothing where it is stored with a
        checkpoint."""
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


def _format_options(config: DraftConfig) -> str:
    """The command line's options for what a draft stores."""
    bits = config.bits if config.average_bits is None else config.average_bits
    symmetric = " --draft-symmetric" if config.symmetric else ""
    layers = "" if config.layers == "all" else f" --draft-layers '{config.layers}'"
    head = " --draft-lm-head-bits 4" if config.lm_head_bits == 4 else ""
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


def candidates(
    acceptance: float | None = None,
    measured: str | None = None,
    stored: DraftConfig | None = None,
    sampled: bool = False,
) -> tuple[list[Candidate], str]:
    """The drafts to choose from, and where their acceptance comes from.

    Args:
      acceptance: of the stored draft, else of `DraftConfig()`.
      measured: path of what `quantspec eval acceptance` wrote.
      stored: the draft of the checkpoint.
      sampled: take the acceptance at temperature 1.
    """
    if measured is not None:
        return measured_candidates(measured, sampled), measured
    if acceptance is not None:
        draft = stored or DraftConfig()
        require(0 <= acceptance <= 1, "acceptance", acceptance, "0 to 1")
        found = scaled_candidates(acceptance, draft, sampled)
        others = "; others scaled from SmolLM2-135M's" if len(found) > 1 else ""
        return found, f"{acceptance:g} for {draft.describe()}, as given{others}"
    return default_candidates(sampled), (
        "SmolLM2-135M's, a small model: larger ones lose less; `quantspec eval acceptance --sweep` "
        "measures this one's, for --measured"
    )


def default_candidates(sampled: bool = False) -> list[Candidate]:
    """`DEFAULT_FORMATS`."""
    return [
        Candidate(config.describe(), at_temperature_1 if sampled else greedy, config)
        for config, greedy, at_temperature_1 in DEFAULT_FORMATS
    ]


def scaled_candidates(
    acceptance: float, draft: DraftConfig, sampled: bool = False
) -> list[Candidate]:
    """Candidates where `draft` has this acceptance: itself, and where it is one of
    `DEFAULT_FORMATS`, the others with their rejections in the same proportion as there."""
    table = default_candidates(sampled)
    known = [each.acceptance for each in table if each.config == draft]
    if not known:
        return [Candidate(draft.describe(), acceptance, draft)]
    ratio = (1 - acceptance) / (1 - known[0])
    return [
        dataclasses.replace(each, acceptance=max(0.0, 1 - ratio * (1 - each.acceptance)))
        for each in table
    ]


def notes(setting: Setting) -> list[str]:
    """What to know when reading a plan."""
    found = ["working memory of the prefill and of the logits comes on top of weights and cache"]
    if setting.efficiency == Efficiency():
        found.append(
            "times are limits: bytes over bandwidth; give --speed, or --plain-efficiency, "
            "--draft-efficiency and --verify-efficiency, for what kernels reach (recorded runs: "
            "README.md)"
        )
    capability = setting.device.capability
    if capability is not None and capability < LEAST_CAPABILITY:
        found.append(
            f"the kernels need compute capability {LEAST_CAPABILITY}, and this device has "
            f"{capability}: there XLA runs, far from these limits"
        )
    return found


def measured_candidates(path: str, sampled: bool = False) -> list[Candidate]:
    """Candidates from what `quantspec eval acceptance` wrote, of one draft or of a sweep.

    Raises:
      ValueError: the file is something else; says what it lacks.
    """
    run = _read_json(path)
    rows = run.get("rows", [run])
    kind = "sampled_acceptance" if sampled else "greedy_acceptance"
    needed = {"draft", "draft_bits_per_weight", kind}
    good = isinstance(rows, list) and bool(rows)
    if not good or not all(isinstance(row, dict) and needed <= set(row) for row in rows):
        raise ValueError(f"{path} is not what `quantspec eval acceptance` writes: each of its rows "
                         f"has {', '.join(sorted(needed))}")  # fmt: skip
    configs: list[DraftConfig | None] = [DraftConfig.from_dict(x) for x in run.get("drafts", ())]
    return [
        Candidate(row["draft"], row[kind], config, row["draft_bits_per_weight"])
        for row, config in zip(rows, configs or [None] * len(rows), strict=True)
    ]


def measured_speed(path: str, context: int) -> tuple[float, Efficiency]:
    """GB/s read and efficiencies from what `quantspec bench decode --json` wrote, each from the row
    whose context is nearest.

    Raises:
      ValueError: the file is something else; says what it lacks.
    """
    run = _read_json(path)
    found = []
    for kind in ("autoregressive full", "draft step", "verify step"):
        rows = [row for row in run.get("rows", ()) if row.get("mode", "").startswith(kind)]
        if not rows or "read_ceiling_gb_per_second" not in run:
            raise ValueError(
                f"{path} is not what `quantspec bench decode --json` writes: it lacks rows of mode "
                f"{kind!r} (--mode full draft verify)"
            )
        nearest = min(rows, key=lambda row: abs(math.log(row["context"] / context)))
        found.append(min(1.0, nearest["percent_of_floor"] / 100))
    return run["read_ceiling_gb_per_second"], Efficiency(*found)


def _read_json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    require(isinstance(found, dict), path, type(found).__name__, "one JSON object")
    return found


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is decoded where: the arguments of `plan` besides the candidates."""

    model: ModelConfig
    context: int
    device: Device
    batch: int = 1
    efficiency: Efficiency = Efficiency()

    def __post_init__(self) -> None:
        require(self.batch >= 1, "batch", self.batch, "an integer ≥ 1")
        limit = self.model.max_context
        require(1 <= self.context <= limit, "context", self.context, f"1 to {limit}, the model's")

    def read_bytes(self, weights: int, view: str) -> int:
        """Of a pass over these weights and a view of the cache."""
        return weights + self.batch * cache_read_bytes(self.model, view, self.context)

    def floor(self, read: int, rows: int = 1) -> float:
        """Least milliseconds of a pass of `rows` tokens a sequence."""
        return self.device.milliseconds(
            read, operations(self.model, self.context, rows, self.batch)
        )

    @functools.cached_property
    def _planes_and_buffer(self) -> int:
        return cache_sizes(self.model, self.context)["total"]

    def memory(self, draft: int = 0, view: str = "int8") -> dict[str, Any]:
        """Bytes of weights, draft and cache, and whether there are as many."""
        cache = cache_read_bytes(self.model, "full", self.context)
        if view != "full":
            cache = self._planes_and_buffer
        needed = BF16 * parameter_count(self.model) + draft + self.batch * cache
        there = self.device.memory
        return {"needed_bytes": needed, "fits": None if there is None else needed <= there * GIB}


def plan(setting: Setting, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Every candidate at every γ, plain decoding beside them, and which to take.

    Returns:
      plain {full, int8}: decoding without a draft, by the view of the cache; candidates, one a
      format: draft, draft_bits_per_weight, acceptance, draft_milliseconds, needed_bytes, fits, and
      gammas: gamma, verify_milliseconds, tokens_a_round, milliseconds_a_token, speed_up; the best
      of them beside; recommendation, None where nothing fits; and reasons. Milliseconds a token are
      those of each sequence; the speed-up is over plain decoding with a bf16 cache.
    """
    require(len(candidates) > 0, "candidates", candidates, "one or more")
    plain = {view: _plain(setting, view) for view in PLAIN}
    rows = [_candidate(setting, candidate) for candidate in candidates]
    base = plain["full"]["milliseconds_a_token"]
    gammas = [each for row in rows for each in row["gammas"]]
    for row in [*plain.values(), *rows, *gammas]:
        row["speed_up"] = base / row["milliseconds_a_token"]
    fitting = [row for row in [*rows, *plain.values()] if row["fits"] is not False]
    best = min(fitting, key=lambda row: row["milliseconds_a_token"], default=None)
    reasons = _misfits(setting, plain, rows)
    recommendation = None
    if best in rows:
        chosen = candidates[rows.index(best)]
        recommendation = _recommendation("quantspec", "int8", best, chosen.options)
        reasons = [*_draft_reasons(setting, plain, rows, best), *reasons]
        if chosen.conversion is not None:
            reasons.append(f"unless it is stored already: quantspec convert {chosen.conversion}")
    elif best is not None:
        view = next(view for view in PLAIN if plain[view] is best)
        recommendation = _recommendation("autoregressive", view, best, "")
        reasons = [*_plain_reasons(plain, rows, view), *reasons]
    return {
        "plain": plain,
        "candidates": rows,
        "recommendation": recommendation,
        "reasons": reasons,
    }


def _plain(setting: Setting, view: str) -> dict[str, Any]:
    """Autoregressive decoding. The int8 view is what a verification reads."""
    read = setting.read_bytes(target_weight_bytes(setting.model), view)
    floor = setting.floor(read)
    share = setting.efficiency.plain if view == "full" else setting.efficiency.verify
    return {
        "read_bytes": read,
        "floor_milliseconds": floor,
        "milliseconds_a_token": floor / share,
        **setting.memory(view=view),
    }


def _candidate(setting: Setting, candidate: Candidate) -> dict[str, Any]:
    """One format at every γ, the best one's numbers beside."""
    weights, own, bits = candidate.sizes(setting.model)
    read = setting.read_bytes(weights, "int4")
    both = setting.read_bytes(target_weight_bytes(setting.model), "int8")
    draft = setting.floor(read) / setting.efficiency.draft
    gammas = []
    for gamma in range(1, MOST_GAMMA + 1):
        verify = setting.floor(both, gamma + 1) / setting.efficiency.verify
        tokens = tokens_a_round(candidate.acceptance, gamma)
        gammas.append(
            {
                "gamma": gamma,
                "verify_milliseconds": verify,
                "tokens_a_round": tokens,
                "milliseconds_a_token": (gamma * draft + verify) / tokens,
            }
        )
    return {
        "draft": candidate.name,
        "draft_bits_per_weight": bits,
        "acceptance": candidate.acceptance,
        "draft_read_bytes": read,
        "verify_read_bytes": both,
        "draft_milliseconds": draft,
        **setting.memory(own),
        **min(gammas, key=lambda row: row["milliseconds_a_token"]),
        "gammas": gammas,
    }


def _recommendation(mode: Mode, view: str, row: dict[str, Any], draft: str) -> dict[str, Any]:
    options = f"--mode {mode} --kv {view}"
    if mode == "quantspec":
        options = f"{draft} --gamma {row['gamma']}".strip()
    return {
        "mode": mode,
        "kv": view,
        "draft": row.get("draft"),
        "gamma": row.get("gamma"),
        "options": options,
        **{name: row[name] for name in ("milliseconds_a_token", "speed_up", "needed_bytes")},
    }


def _draft_reasons(
    setting: Setting, plain: dict[str, Any], rows: list[dict[str, Any]], best: dict[str, Any]
) -> list[str]:
    near = [row for row in best["gammas"] if abs(row["gamma"] - best["gamma"]) == 1]
    reasons = [
        f"a draft step reads {_number(best['draft_read_bytes'] / 1e9)} GB and a verification "
        f"{_number(best['verify_read_bytes'] / 1e9)} GB, where a plain step reads "
        f"{_number(plain['full']['read_bytes'] / 1e9)} GB",
        f"at acceptance {best['acceptance']:.3f}, {best['gamma']} proposals a round yield "
        f"{best['tokens_a_round']:.2f} tokens for {best['gamma']} × "
        f"{_number(best['draft_milliseconds'])} + {_number(best['verify_milliseconds'])} ms",
        f"{_ms(best)} ms a token, "
        + ", ".join(f"at γ = {row['gamma']} {_ms(row)}" for row in near)
        + "".join(f", plain with the {PLAIN[v]} cache {_ms(row)}" for v, row in plain.items()),
    ]
    others = [row for row in rows if row is not best and row["fits"] is not False]
    if others:
        next_best = min(others, key=lambda row: row["milliseconds_a_token"])
        reasons.append(
            f"the next format, {next_best['draft']}: acceptance {next_best['acceptance']:.3f}, "
            f"{_number(next_best['draft_milliseconds'])} ms a draft step, {_ms(next_best)} ms a "
            f"token at its best γ = {next_best['gamma']}"
        )
    return reasons


def _plain_reasons(plain: dict[str, Any], rows: list[dict[str, Any]], view: str) -> list[str]:
    reasons = []
    best = min(rows, key=lambda row: row["milliseconds_a_token"])
    if best["milliseconds_a_token"] >= plain[view]["milliseconds_a_token"]:
        reasons.append(
            f"no draft pays: the best, {best['draft']} at γ = {best['gamma']}, yields "
            f"{best['tokens_a_round']:.2f} tokens for {best['gamma']} × "
            f"{_number(best['draft_milliseconds'])} + {_number(best['verify_milliseconds'])} ms, "
            f"{_ms(best)} ms a token; plain decoding takes {_ms(plain[view])}"
        )
    if view == "int8" and plain["full"]["fits"] is not False:
        reasons.append(f"with the {PLAIN['full']} cache it takes {_ms(plain['full'])} ms a token")
    return reasons


def _number(x: float) -> str:
    """Three digits that count: models differ a thousandfold."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _ms(row: dict[str, Any]) -> str:
    return _number(row["milliseconds_a_token"])


def _misfits(setting: Setting, plain: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """What does not fit, in bytes needed and there."""
    named = [(row["draft"], row) for row in rows]
    named += [(f"plain decoding with the {PLAIN[view]} cache", row) for view, row in plain.items()]
    return [
        f"{name} does not fit: weights and cache take {row['needed_bytes']:,} bytes, and there are "
        f"{int((setting.device.memory or 0) * GIB):,}"
        for name, row in named
        if row["fits"] is False
    ]


def table(result: dict[str, Any]) -> str:
    """A plan for people."""
    device, recommendation = result["device"], result["recommendation"]
    memory = f", {device['memory_gib']:.1f} GiB" if device["memory_gib"] else ""
    plain = {f"plain, {PLAIN[view]} cache": row for view, row in result["plain"].items()}
    width = 1 + max(len(name) for name in [*plain, *(r["draft"] for r in result["candidates"])])
    head = "  bits  accept   γ  draft ms  verify ms  tokens  ms a token  speed-up     GiB"
    lines = [
        f"{result['model']}, {result['context']:,} tokens, batch {result['batch']}; "
        f"{device['name']}: {device['bandwidth_gb_per_second']:,.0f} GB/s{memory}",
        f"acceptance: {result['acceptance_source']}",
        "",
        " " * width + head,
    ]
    for row in result["candidates"]:
        lines.append(
            f"{row['draft']:<{width}}{row['draft_bits_per_weight']:6.2f}{row['acceptance']:8.3f}"
            f"{row['gamma']:4}{_number(row['draft_milliseconds']):>10}{_number(row['verify_milliseconds']):>11}"
            f"{row['tokens_a_round']:8.2f}{_end(row)}"
        )
    lines += [f"{name:<{width}}{'':47}{_end(row)}" for name, row in plain.items()]
    lines += ["", "recommended: nothing, for nothing fits"]
    if recommendation is not None:
        what = recommendation["draft"] or "plain decoding"
        lines[-1] = f"recommended: {what}: {recommendation['options']}"
    return "\n".join([*lines, *(f"- {x}" for x in [*result["reasons"], *result["notes"]])])


def _end(row: dict[str, Any]) -> str:
    over = "  does not fit" if row["fits"] is False else ""
    size = row["needed_bytes"] / GIB
    return f"{_ms(row):>12}{row['speed_up']:9.2f}×{size:8.1f}{over}"
