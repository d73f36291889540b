"""Write the tables of recorded runs into README.md: `python benchmarks/render.py`.

Each benchmarks/*.json is one run: what, command, device, versions (name → version), date, rows (a
list of flat or nested objects). Its table stands between the two markers of README.md; `--check`
changes nothing and exits with 1 where README.md is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
BEGIN = "<!-- results: made by benchmarks/render.py from benchmarks/*.json -->"
END = "<!-- end of results -->"
MOST_ROWS = 24
KEYS = ("what", "title", "command", "device", "versions", "date", "rows")


def tables(folder: Path = FOLDER) -> str:
    """Markdown: a table a file, in the order of the files' names."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        return "No runs are recorded yet.\n"
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    parts = [table(run, path) for run, path in zip(runs, paths, strict=True)]
    return "\n".join([*roofline(runs), *parts])


def roofline(runs: list[dict[str, Any]]) -> list[str]:
    """How near decoding is to the time that reading its bytes takes, all runs of `bench decode` in
    one table; nothing where there are none."""
    names = {
        "context": "context",
        "batch": "batch",
        "mode": "mode",
        "floor_milliseconds": "floor, ms",
        "milliseconds_a_round": "reached, ms",
        "percent_of_floor": "% of floor",
        "profile attention": "attention",
        "profile matmuls": "matmuls",
        "profile elementwise": "elementwise",
        "profile gaps": "gaps",
        "launches_a_token": "launches a token",
        "tokens_per_second": "tokens/s",
        "speed_up": "speed-up",
    }
    rows = [
        [run.get("preset", ""), *(cell(name, row.get(name)) for name in names), run["device"]]
        for run in runs
        for row in map(_with_simulation(run), map(flatten, run.get("rows", [])))
        if "floor_milliseconds" in row
    ]
    if not rows:
        return []
    columns = ["model", *names.values(), "device"]
    lines = [
        "**Roofline** · the floor of a round is the time that reading its bytes takes, weights and "
        "cache once a pass, at the read ceiling measured in the run; what was reached is split by "
        "kind of kernel, in ms from a trace (elementwise: norms and copies into the cache, too)",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return ["\n".join(lines) + "\n"]


def _with_simulation(run: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Marks the mode of a row whose acceptance is none of the model's."""

    def marked(row: dict[str, Any]) -> dict[str, Any]:
        if not row.get("acceptance_is_simulated"):
            return row
        return row | {"mode": f"{row['mode']}, acceptance {run['simulated_acceptance']} simulated"}

    return marked


def table(run: dict[str, Any], path: Path) -> str:
    """One run: what, where and when, how to repeat it, and its rows."""
    rows = [flatten(row) for row in run.get("rows", [])]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    same = [name for name in columns if len(rows) > 1 and is_same(name, rows)]
    columns = [name for name in columns if name not in same]
    settings = {name: run[name] for name in run if name not in KEYS}
    settings = flatten(settings) | {name: rows[0][name] for name in same}
    lines = [
        f"**{title(run)}** · {run['device']} · {run['date']} · {versions(run)}",
        "",
        f"[{path.name}](benchmarks/{path.name}): `{one_line(run['command'])}`",
    ]
    if settings:
        lines[-1] += "; " + ", ".join(f"{words(n)} {cell(n, v)}" for n, v in settings.items())
    lines.append("")
    if "floor_milliseconds" in columns:
        lines.append("Its rows are in the table above.")
        return "\n".join(lines) + "\n"
    if columns:
        lines.append("| " + " | ".join(map(words, columns)) + " |")
        lines.append("|" + " --- |" * len(columns))
    for row in rows[:MOST_ROWS]:
        lines.append("| " + " | ".join(cell(name, row.get(name)) for name in columns) + " |")
    if len(rows) > MOST_ROWS:
        lines += ["", f"The first {MOST_ROWS} of {len(rows)} rows; the file has them all."]
    return "\n".join(lines) + "\n"


def title(run: dict[str, Any]) -> str:
    """The run's title, else its name in words."""
    name = re.sub(r"-\d{4}-\d\d-\d\d$", "", run["what"]).replace("-", " ")
    name = re.sub(r"\b([cg]pu|[hab]\d+)\b", lambda found: found[0].upper(), name)
    return run.get("title", name[:1].upper() + name[1:])


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


def versions(run: dict[str, Any]) -> str:
    """Those that decide what a number is; the file has the rest."""
    given = run.get("versions", {})
    return ", ".join(
        f"{name} {given[name]}" for name in ("jax", "torch", "python") if name in given
    )


def rendered(text: str, folder: Path = FOLDER) -> str:
    """`text` with the tables between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks a line {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{tables(folder)}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the recorded runs into README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = rendered(old)
    if check:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
