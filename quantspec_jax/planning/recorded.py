"""What is read from recorded runs: acceptance of `eval acceptance`, speed of `bench decode`."""

from __future__ import annotations

import math
from typing import Any

from quantspec_jax.checks import require
from quantspec_jax.cost import ALL_PAGES, READINGS, Reading
from quantspec_jax.files import read_json
from quantspec_jax.planning.candidates import Candidate
from quantspec_jax.planning.devices import Efficiency
from quantspec_jax.weights.formats import DraftConfig

PASSES = ("autoregressive full", "draft step", "verify step")  # the order of Efficiency's fields


def measured_candidates(path: str, sampled: bool = False) -> list[Candidate]:
    """Candidates from what `quantspec eval acceptance` wrote, of one draft or of a sweep: its
    drafts that read all of the cache. Of the others `measured_readings` has what is to know.

    Raises:
      ValueError: the file is something else; says what it lacks.
    """
    run = read_json(path)
    rows = run.get("rows", [run])
    kind = "sampled_acceptance" if sampled else "greedy_acceptance"
    needed = {"draft", "draft_bits_per_weight", kind}
    good = isinstance(rows, list) and bool(rows)
    if not good or not all(isinstance(row, dict) and needed <= set(row) for row in rows):
        raise ValueError(f"{path} is not what `quantspec eval acceptance` writes: each of its rows "
                         f"has {', '.join(sorted(needed))}")  # fmt: skip
    configs: list[DraftConfig | None] = [DraftConfig.from_dict(x) for x in run.get("drafts", ())]
    found = [
        Candidate(row["draft"], row[kind], config, row["draft_bits_per_weight"])
        for row, config in zip(rows, configs or [None] * len(rows), strict=True)
        if row.get("draft_share", 1) == 1
    ]
    require(bool(found), "--measured", path, "a run with a draft that reads all of the cache")
    return found


def measured_readings(path: str, sampled: bool = False) -> tuple[Reading, ...]:
    """What drafts may read, and what is kept of their acceptance, from a sweep whose rows
    `measured_candidates` takes; where it has no draft that reads less, what was measured elsewhere.
    """
    rows = read_json(path).get("rows", [])
    kind = "sampled_acceptance" if sampled else "greedy_acceptance"

    def draft(row: dict[str, Any]) -> tuple[str, float]:
        return row["draft"], row["draft_bits_per_weight"]

    whole = {draft(row): row[kind] for row in rows if row.get("draft_share", 1) == 1}
    found = [
        Reading(row["draft_policy"], row["draft_share"], min(1.0, row[kind] / whole[draft(row)]))
        for row in rows
        if row.get("draft_share", 1) < 1 and row[kind] > 0 and whole.get(draft(row))
    ]
    return (ALL_PAGES, *found) if found else READINGS


def measured_mesh(path: str) -> dict[str, int] | None:
    """Over which mesh `quantspec bench decode` ran; None: on one device."""
    return read_json(path).get("mesh")


def measured_speed(path: str, context: int) -> tuple[float, Efficiency]:
    """GB/s read and efficiencies from what `quantspec bench decode --json` wrote, each from the row
    whose context is nearest.

    Raises:
      ValueError: the file is something else; says what it lacks.
    """
    run = read_json(path)
    shares = []
    for kind in PASSES:
        rows = [row for row in run.get("rows", ()) if row.get("mode", "").startswith(kind)]
        if not rows or "read_ceiling_gb_per_second" not in run:
            raise ValueError(
                f"{path} is not what `quantspec bench decode --json` writes: it lacks rows of mode "
                f"{kind!r} (--mode full draft verify)"
            )
        nearest = min(rows, key=lambda row: abs(math.log(row["context"] / context)))
        shares.append(min(1.0, nearest["percent_of_floor"] / 100))
    return run["read_ceiling_gb_per_second"], Efficiency(*shares)
