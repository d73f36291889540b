"""Every draft at every γ, plain decoding beside them, and which of them to take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from quantspec_jax.checks import require
from quantspec_jax.cost import MOST_GAMMA, target_weight_bytes, tokens_a_round
from quantspec_jax.planning.candidates import Candidate
from quantspec_jax.planning.setting import Setting

PLAIN_VIEWS: tuple[str, ...] = ("full", "int8")


@dataclasses.dataclass(frozen=True)
class Plain:
    """Autoregressive decoding that reads one view of the cache."""

    view: str
    read_bytes: int
    floor_milliseconds: float
    milliseconds_a_token: float
    needed_bytes: int
    fits: bool | None
    speed_up: float


@dataclasses.dataclass(frozen=True)
class Gamma:
    """One draft with so many proposals a round."""

    gamma: int
    verify_milliseconds: float
    tokens_a_round: float
    milliseconds_a_token: float
    speed_up: float


@dataclasses.dataclass(frozen=True)
class Drafted:
    """One draft at every γ."""

    candidate: Candidate
    draft_bits_per_weight: float
    draft_read_bytes: int
    verify_read_bytes: int
    draft_milliseconds: float
    needed_bytes: int
    fits: bool | None
    gammas: tuple[Gamma, ...]

    @property
    def best(self) -> Gamma:
        """The γ of least time a token."""
        return min(self.gammas, key=lambda each: each.milliseconds_a_token)

    @property
    def milliseconds_a_token(self) -> float:
        return self.best.milliseconds_a_token

    @property
    def speed_up(self) -> float:
        return self.best.speed_up


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was weighed. Milliseconds a token are those of each sequence; the speed-up is over plain
    decoding with a bf16 cache."""

    setting: Setting
    plain: tuple[Plain, ...]
    drafted: tuple[Drafted, ...]

    @property
    def formats(self) -> tuple[Drafted, ...]:
        """Of each format the fastest, whatever it reads of the cache."""
        best: dict[str, Drafted] = {}
        for row in self.drafted:
            name = row.candidate.name
            best[name] = min(best.get(name, row), row, key=lambda each: each.milliseconds_a_token)
        return tuple(best.values())

    @property
    def chosen(self) -> Plain | Drafted | None:
        """The fastest of what fits."""
        rows: tuple[Plain | Drafted, ...] = (*self.drafted, *self.plain)
        split = self.setting.axes.cp > 1  # `generate` splits tiles, and no other cache
        fitting = [row for row in rows if row.fits is not False and not (split and _is_full(row))]
        return min(fitting, key=lambda row: row.milliseconds_a_token, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As --json has it: plain by view, candidates with the best γ's numbers beside all of them,
        and the recommendation, None where nothing fits."""
        return {
            "plain": {row.view: _without(dataclasses.asdict(row), "view") for row in self.plain},
            "candidates": [_candidate_dict(row) for row in self.drafted],
            "recommendation": recommendation(self.chosen),
        }


def plan(setting: Setting, candidates: Sequence[Candidate]) -> Plan:
    """Weigh every candidate at every γ against plain decoding."""
    require(len(candidates) > 0, "candidates", candidates, "one or more")
    base = _plain_milliseconds(setting, "full")
    return Plan(
        setting,
        tuple(_plain(setting, view, base) for view in PLAIN_VIEWS),
        tuple(_drafted(setting, candidate, base) for candidate in candidates),
    )


def _plain_milliseconds(setting: Setting, view: str) -> float:
    """A token. The int8 view is what a verification reads, as fast as that does."""
    meeting = setting.meeting_milliseconds
    share = setting.efficiency.plain if view == "full" else setting.efficiency.verify
    read = setting.read_bytes(target_weight_bytes(setting.model), view)
    return setting.floor(read) / share + meeting


def _is_full(row: Plain | Drafted) -> bool:
    return isinstance(row, Plain) and row.view == "full"


def _plain(setting: Setting, view: str, base: float) -> Plain:
    read = setting.read_bytes(target_weight_bytes(setting.model), view)
    milliseconds = _plain_milliseconds(setting, view)
    needed = setting.needed_bytes(view=view)
    fits = setting.fits(needed)
    floor = setting.floor(read)
    return Plain(view, read, floor, milliseconds, needed, fits, base / milliseconds)


def _drafted(setting: Setting, candidate: Candidate, base: float) -> Drafted:
    """One draft. A round of γ proposals takes γ draft steps and a verification of γ + 1 rows."""
    sizes = candidate.sizes(setting.model)
    read = setting.read_bytes(sizes.read, "int4", candidate.reading.share)
    both = setting.read_bytes(target_weight_bytes(setting.model), "int8")
    meeting = setting.meeting_milliseconds
    draft = setting.floor(read) / setting.efficiency.draft + meeting
    gammas = []
    for gamma in range(1, MOST_GAMMA + 1):
        verify = setting.floor(both, gamma + 1) / setting.efficiency.verify + meeting
        tokens = tokens_a_round(candidate.acceptance, gamma)
        milliseconds = (gamma * draft + verify) / tokens
        gammas.append(Gamma(gamma, verify, tokens, milliseconds, base / milliseconds))
    needed = setting.needed_bytes(sizes.own)
    return Drafted(
        candidate, sizes.bits, read, both, draft, needed, setting.fits(needed), tuple(gammas)
    )


def recommendation(chosen: Plain | Drafted | None) -> dict[str, Any] | None:
    """What to give `quantspec generate`, and what it promises."""
    if chosen is None:
        return None
    promise = {
        name: getattr(chosen, name) for name in ("milliseconds_a_token", "speed_up", "needed_bytes")
    }
    if isinstance(chosen, Plain):
        options = f"--mode autoregressive --kv {chosen.view}"
        mode, view, draft, gamma = "autoregressive", chosen.view, None, None
        reads: dict[str, Any] = {"draft_policy": None, "draft_share": None}
    else:
        draft, gamma = chosen.candidate.name, chosen.best.gamma
        options = f"{chosen.candidate.options} --gamma {gamma}".strip()
        mode, view, reading = "quantspec", "int8", chosen.candidate.reading
        reads = {"draft_policy": reading.policy, "draft_share": reading.share}
    what = {"mode": mode, "kv": view, "draft": draft, **reads, "gamma": gamma}
    return {**what, "options": options, **promise}


def _candidate_dict(row: Drafted) -> dict[str, Any]:
    """A draft, the numbers of its best γ beside those of every γ."""
    values = _without(dataclasses.asdict(row), "candidate")
    return {
        "draft": row.candidate.name,
        "draft_policy": row.candidate.reading.policy,
        "draft_share": row.candidate.reading.share,
        "acceptance": row.candidate.acceptance,
        **values,
        **dataclasses.asdict(row.best),
        "gammas": list(values["gammas"]),
    }


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
