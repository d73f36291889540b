"""Write what recorded runs say into README.md and benchmarks/README.md.

    python benchmarks/render.py [--check]

Each benchmarks/*.json is one run: what, command, device, versions (name → version), date, rows (a
list of flat or nested objects), perhaps a note. benchmarks/README.md has a table a run. README.md
has one table, between two markers, of the runs that `HEADLINES` names. `--check` changes nothing
and exits with 1 where a file is not what the runs say.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
ALL_RUNS = FOLDER / "README.md"
BEGIN = "<!-- results: made by benchmarks/render.py from benchmarks/*.json -->"
END = "<!-- end of results -->"
MOST_ROWS = 24
WIDE = 12  # columns; a single row of more is a list
MOST_HEADLINES = 8
KEYS = ("what", "title", "command", "note", "outdated", "device", "versions", "date", "rows")

# The runs of README.md's table by name, and which rows of each; real text comes first.
HEADLINES: tuple[tuple[str, slice], ...] = (
    ("text-*", slice(5)),
    ("text-smollm2-135m-*", slice(1)),  # where drafting does not pay
    ("policies-qwen2.5-coder-1.5b-131k-moby-dick-h200-*", slice(1)),
    ("yarn-*", slice(-1, None)),  # the longest context
    ("decode-llama-2-7b-h200-*", slice(2)),
    ("decode-llama-3.1-8b-h200-*", slice(1)),
)

# The sections of benchmarks/README.md, and the names of their runs; the first that fits counts.
SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Decoding real text", ("text-*", "yarn-*", "couplings-*", "decode-cpu-*", "first-token-*")),
    ("Greedy tokens beside those of the target", ("identity-*",)),
    ("Acceptance of drafts", ("draft-*", "first-proposals-*")),
    ("Pages that drafts read", ("policies-*", "policy-acceptance-*", "page-votes-*")),
    ("Methods that compress a cache", ("codecs-*", "quality-*", "kv-numbers-*", "key-biases-*")),
    ("Decoding with simulated acceptance", ("decode-*",)),
    ("Serving", ("serving-*", "server-*", "saved-caches-*", "engine-*")),
    ("Hostile files, kills, long processes", ("fuzz-*", "kills-*", "soak-*")),
    ("Prefill, calibration", ("prefill-*", "calibration-*")),
    ("Kernels", ("kernel*",)),
    ("Other runs", ("*",)),
)
INTRODUCTION = """\
# Recorded runs

Made by `python benchmarks/render.py` from the files of this folder, one JSON a run, which have the
command, the versions and every row. A command names the files that it reads, not where they lie:
M, A, B, TEXT stand for a model and for texts. `quantspec bench text` measures what users run, a
real model on a real text. `quantspec bench decode` has random weights at full size, and accepts
each proposal with a given probability: its tables say "simulated acceptance".
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A recorded run and its file."""

    path: Path
    record: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Its rows, flat; of rows for single prompts and for all of them (`bench text`) the latter
        alone."""
        rows = [flatten(row) for row in self.record.get("rows", [])]
        most = max((row.get("prompts", 1) for row in rows), default=1)
        return [row for row in rows if row.get("prompts", most) == most]

    @property
    def simulated(self) -> float | None:
        """The acceptance that was simulated; None where it is the model's own."""
        return self.record.get("simulated_acceptance")

    @property
    def title(self) -> str:
        """The run's title, else its name in words."""
        name = re.sub(r"-\d{4}-\d\d-\d\d$", "", self.record["what"]).replace("-", " ")
        name = re.sub(r"\b([cg]pu|[hab]\d+)\b", lambda found: found[0].upper(), name)
        words = self.record.get("title", name[:1].upper() + name[1:])
        return words if self.simulated is None else f"{words}, simulated acceptance"


def recorded(folder: Path = FOLDER) -> list[Run]:
    """All runs, in the order of their files' names."""
    return [
        Run(path, json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"))
    ]


def matching(runs: Iterable[Run], pattern: str) -> list[Run]:
    return [run for run in runs if fnmatch.fnmatch(run.path.stem, pattern)]


# README.md's table


@dataclasses.dataclass(frozen=True)
class Headline:
    """Plain decoding and QuantSpec side by side, of one run."""

    model: str
    context: int
    sampling: str
    plain: float
    ours: float
    acceptance: str
    device: str
    simulated: bool
    named: bool  # policy or γ were, and are not what users get unless they say otherwise
    copied: float = 0.0  # share of the tokens
    without: float | None = None  # the speed-up where nothing is copied
    text: str = ""

    @property
    def speed_up(self) -> float:
        return self.ours / self.plain

    @property
    def cells(self) -> list[str]:
        return [
            *(self.model, f"{self.context:,}{self.text and f' of {self.text}'}", self.sampling),
            *(f"{self.plain:,.0f}", f"{self.ours:,.0f}", f"{self.speed_up:.2f} ×"),
            f"{self.copied:.0%}" if self.copied else "",
            "" if self.without is None else f"{self.without:.2f} ×",
            *(self.acceptance, self.device),
        ]


HEADLINE_COLUMNS = (
    *("model", "context", "sampling", "plain, tokens/s", "QuantSpec, tokens/s", "speed-up"),
    *("copied", "without copies", "acceptance", "device"),
)


def headlines(runs: Sequence[Run]) -> list[Headline]:
    """The rows of README.md's table: of runs that this version would repeat."""
    found, runs = [], [run for run in runs if "outdated" not in run.record]
    for pattern, which in HEADLINES:
        found += [row for run in matching(runs, pattern) for row in headlines_of(run)][which]
    return found[:MOST_HEADLINES]


def headlines_of(run: Run) -> list[Headline]:
    """A row for each model, context and temperature: what users get unless they say otherwise, auto
    by policy, γ and copies, where the run has it; else all pages, or the fastest policy, which is
    named beside the sampling; and the fastest γ."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in run.rows:
        drafts = row.get("gamma", row.get("acceptance")) is not None
        if drafts and row.get("speed_up") is not None:
            setting = (row.get("model"), row["context"], row.get("temperature"))
            groups.setdefault(setting, []).append(row)
    return [_headline(run, rows) for rows in groups.values()]


def _headline(run: Run, rows: list[dict[str, Any]]) -> Headline:
    """`speed_up` is over plain decoding with a cache in full precision, of the same run."""
    every = rows
    for name, usual in (
        *(("lookup", (None, 7)), ("policy", ("auto",)), ("policy", (None, "all"))),
        ("gamma", ("auto",)),
    ):
        rows = [row for row in rows if row.get(name) in usual] or rows
    row = max(rows, key=lambda each: each["tokens_per_second"])
    same = [each for each in every if all(each.get(k) == row.get(k) for k in ("policy", "gamma"))]
    without = [each["speed_up"] for each in same if each.get("lookup") == 0 and row.get("lookup")]
    named = row.get("policy") not in (None, "auto", "all")
    copies = bool(row.get("lookup")) and row["gamma"] != "auto"  # which copies nothing by itself
    gamma = f"γ {row['gamma']}" if copies else ""
    head = "draft lm_head 4-bit" if "lm_head 4-bit" in run.record.get("draft", "") else ""
    share = row.get("share")
    policy = row["policy"] + (f" {share:g}" if share else "") if named else ""
    sampling = _sampling(row.get("temperature"))
    if run.simulated is not None:
        acceptance = f"{run.simulated:g}, *simulated*"
    elif row["acceptance_rate"] is not None:
        acceptance = f"{row['acceptance_rate']:.2f}"
    else:
        acceptance = "nothing drafted"
    return Headline(
        model=row.get("model") or run.record.get("model") or run.record["preset"],
        context=row["context"],
        sampling=", ".join(filter(None, (sampling, policy, gamma, head))),
        plain=row["tokens_per_second"] / row["speed_up"],
        ours=row["tokens_per_second"],
        acceptance=acceptance,
        device=run.record["device"],
        simulated=run.simulated is not None,
        named=named or copies,
        copied=row.get("lookup_accepted") or 0.0,
        without=max(without, default=None),
        text=run.record.get("text", ""),
    )


def _sampling(temperature: float | None) -> str:
    """In words; nothing where it was not the model's own choice of tokens."""
    if temperature is None:
        return ""
    return f"temperature {temperature:g}" if temperature else "greedy"


def headline_text(runs: Sequence[Run]) -> str:
    """One sentence of result, and the table."""
    rows = headlines(runs)
    if not rows:
        return "No runs are recorded yet.\n"
    real = [row for row in rows if not row.simulated]
    lines = ["No run on real text is recorded on this version."]
    if real:
        best = max(real, key=lambda row: (not row.named, row.speed_up))
        lines = [
            f"On real text, {best.model} makes {best.ours:,.0f} tokens/s after "
            f"{best.context:,} tokens, {best.speed_up:.2f} times plain decoding ({best.sampling}, "
            f"{best.device})."
        ]
        if best.copied and best.without is not None:
            lines[0] += (
                f" {best.copied:.0%} of them were copied from the text so far: greedy text repeats "
                f"itself. Without copies it is {best.without:.2f} times."
            )
    if len(real) < len(rows):
        lines[0] += (
            " Rows marked *simulated* have random weights, and accept proposals at a given rate."
        )
    columns, cells = HEADLINE_COLUMNS, [row.cells for row in rows]
    if len({row.device for row in rows}) == 1:
        lines[0] += f" All rows: {rows[0].device}."
        columns, cells = columns[:-1], [each[:-1] for each in cells]
    return "\n".join([*lines, "", *markdown(columns, cells)]) + "\n"


# benchmarks/README.md


def all_runs(runs: Sequence[Run]) -> str:
    """Markdown: a section a kind of run, a table a file."""
    parts, left = [INTRODUCTION], list(runs)
    for heading, patterns in SECTIONS:
        chosen = [run for run in left if any(matching([run], pattern) for pattern in patterns)]
        left = [run for run in left if run not in chosen]
        if chosen:
            parts += [f"## {heading}\n", *roofline(chosen), *map(table, chosen)]
    if not runs:
        parts.append("No runs are recorded yet.\n")
    return "\n".join(parts)


def roofline(runs: Sequence[Run]) -> list[str]:
    """How near decoding is to the time that reading its bytes takes, all runs of `bench decode` in
    one table; nothing where there are none."""
    names = {
        "context": "context",
        "batch": "batch",
        "mode": "mode",
        "floor_milliseconds": "floor, ms",
        "milliseconds_a_round": "reached, ms",
        "percent_of_floor": "% of floor",
        "milliseconds_a_call": "a call, ms",
        "percent_of_floor_without_call": "% without it",
        "profile attention": "attention",
        "profile matmuls": "matmuls",
        "profile elementwise": "elementwise",
        "profile gaps": "gaps",
        "launches_a_token": "launches a token",
        "tokens_per_second": "tokens/s",
        "speed_up": "speed-up",
    }
    rows = [
        [
            run.record.get("preset", ""),
            *(cell(name, row.get(name)) for name in names),
            run.record["device"],
        ]
        for run in runs
        for row in map(_with_simulation(run), run.rows)
        if "floor_milliseconds" in row
    ]
    if not rows:
        return []
    lines = [
        "**Roofline, simulated acceptance** · the floor of a round is the time that reading its "
        "bytes takes, weights and cache once a pass, at the read ceiling measured in the run; what "
        "was reached is split by kind of kernel, in ms from a trace (elementwise: norms and copies "
        "into the cache, too). A call, of as many rounds as the run's command says, takes some "
        "milliseconds beside them: what was reached has its part of these, and so have gaps where "
        "no column says what a call takes",
        "",
        *markdown(["model", *names.values(), "device"], rows),
    ]
    return ["\n".join(lines) + "\n"]


def _with_simulation(run: Run) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Marks the mode of a row whose acceptance is none of the model's."""

    def marked(row: dict[str, Any]) -> dict[str, Any]:
        if not row.get("acceptance_is_simulated"):
            return row
        return row | {"mode": f"{row['mode']}, acceptance {run.simulated} simulated"}

    return marked


def table(run: Run) -> str:
    """One run: what, where and when, how to repeat it, and its rows."""
    record, rows = run.record, run.rows
    columns = list(dict.fromkeys(name for row in rows for name in row))
    same = [name for name in columns if len(rows) > 1 and is_same(name, rows)]
    columns = [name for name in columns if name not in same]
    settings = {name: record[name] for name in record if name not in KEYS}
    settings = flatten(settings) | {name: rows[0][name] for name in same}
    about = f"[{run.path.name}]({run.path.name}): `{one_line(record['command'])}`"
    if settings:
        about += "; " + ", ".join(f"{words(n)} {cell(n, v)}" for n, v in settings.items())
    for name in ("note", "outdated"):
        if name in record:
            about += f" ({record[name]})"
    lines = [
        f"**{run.title}** · {record['device']} · {record['date']} · {versions(record)}",
        *("", about, ""),
    ]
    plot = run.path.with_suffix(".png")
    if plot.exists():
        lines += [f"![{run.title}]({plot.name})", ""]
    if "floor_milliseconds" in columns:
        lines.append("Its rows are in the table above.")
        return "\n".join(lines) + "\n"
    if len(rows) == 1 and len(columns) > WIDE:
        lines += markdown(["", ""], [[words(n), cell(n, rows[0][n])] for n in columns])
    elif columns:
        shown = [[cell(name, row.get(name)) for name in columns] for row in rows[:MOST_ROWS]]
        lines += markdown(list(map(words, columns)), shown)
    if len(rows) > MOST_ROWS:
        lines += ["", f"The first {MOST_ROWS} of {len(rows)} rows; the file has them all."]
    return "\n".join(lines) + "\n"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def is_same(name: str, rows: list[dict[str, Any]]) -> bool:
    """Whether every row has this column, with the same value, and it looks like a setting: measured
    numbers are shown even where they agree."""
    values = [row.get(name) for row in rows]
    return values.count(values[0]) == len(rows) and not isinstance(values[0], float | None)


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as columns of their own, "outer inner"; of a list of objects its length."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name} ")
        elif isinstance(value, list) and (not value or isinstance(value[0], dict | list)):
            flat[prefix + name] = len(value)
        else:
            flat[prefix + name] = value
    return flat


def cell(name: str, value: Any) -> str:
    """A value for people: four significant digits, thousands separated."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(cell(name, item) for item in value)
    if isinstance(value, float):
        if value != 0 and not 1e-3 <= abs(value) < 1e5:
            return f"{value:.2e}" if abs(value) < 1 else f"{value:,.0f}"
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if "seed" not in name else str(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def words(name: str) -> str:
    """A column's name for people."""
    return name.replace("_", " ").replace("|", "\\|")


def one_line(command: str | list[str]) -> str:
    text = command if isinstance(command, str) else " ".join(command)
    return " ".join(text.split())


def versions(record: dict[str, Any]) -> str:
    """Those that decide what a number is; the file has the rest."""
    given = record.get("versions", {})
    return ", ".join(
        f"{name} {given[name]}" for name in ("jax", "torch", "python") if name in given
    )


def rendered(text: str, runs: Sequence[Run]) -> str:
    """README.md's `text` with the table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks a line {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{headline_text(runs)}\n{END}{after}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    return parser


def main() -> int:
    check, runs = make_parser().parse_args().check, recorded()
    old = README.read_text(encoding="utf-8")
    new = {README: rendered(old, runs), ALL_RUNS: all_runs(runs)}
    if check:
        return int(any(not p.exists() or p.read_text("utf-8") != new[p] for p in new))
    for path, text in new.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
