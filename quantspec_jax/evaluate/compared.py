"""What `quantspec eval codecs` found, for people: a table, and a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantspec_jax.plotting import save, short

LEAST_LOSS = 1e-4  # of the plot; what loses less is drawn there


def table(result: dict[str, Any]) -> str:
    """A line a method."""
    rows = result["rows"]
    width = max(len(row["codec"]) for row in rows)
    contexts = list(rows[0]["speed_up"])
    head = f"{'codec':<{width}}{'bits':>7}{'read':>7}{'perplexity':>12}{'over full':>13}{'±':>9}"
    head += f"{'KL':>10}{'top 1':>8}{'greedy':>8}{'sampled':>9}"
    head += "".join(f"{'at ' + short(int(context)):>9}" for context in contexts)
    lines = [head]
    for row in rows:
        cells = f"{row['codec']:<{width}}{row['bits']:7.2f}{row['read_bits']:7.2f}"
        cells += _number(row["perplexity"], "12.3f") + _number(row["over_full"], "+13.3%")
        cells += _number(row["over_full_error"], "9.3%")
        cells += _number(row["kl"], "10.5f") + _number(row["top1"], "8.3f")
        cells += f"{row['greedy_acceptance']:8.3f}{row['sampled_acceptance']:9.3f}"
        lines.append(cells + "".join(f"{row['speed_up'][c]:8.2f}×" for c in contexts))
    lines.append(
        f"up to {result['tokens']} positions of {result['places']} places; ±: standard error of "
        "over full; bits a value and bits read a value at 128K; acceptance as a draft of the 8-bit "
        "view, with the full weights; at a context: the limit of the speed-up over plain decoding "
        f"on {result['predicted_on']} by bytes and operations"
    )
    return "\n".join(lines)


def _number(value: float | None, how: str) -> str:
    width = int(how.lstrip("+").split(".")[0])
    return " " * width if value is None else f"{value:{how}}".rjust(width)


def plot(result: dict[str, Any], path: Path) -> None:
    """Divergence from the full cache against bits stored, and acceptance against bits read; the
    methods of a family, whose names begin alike, are joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    quality, acceptance = figure.subplots(1, 2)
    draw_families(quality, result["rows"], "bits", lambda row: row["kl"])
    draw_families(acceptance, result["rows"], "read_bits", lambda row: row["sampled_acceptance"])
    quality.set_yscale("log")
    quality.set_ylabel("KL from the cache in full precision, nats")
    quality.set_xlabel("bits a value that are stored, all counted")
    acceptance.set_ylabel("acceptance of a sampled proposal")
    acceptance.set_xlabel("bits that a pass reads, a value of the cache")
    figure.suptitle(f"Methods on {result.get('model', 'a model')}, {result.get('text', 'a text')}")
    save(figure, path)


def draw_families(
    axes: Any, rows: list[dict[str, Any]], x: str, y: Callable[[dict[str, Any]], float | None]
) -> None:
    """Points with their names, a colour and a line a family."""
    families: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        value = y(row)
        if value is not None:
            point = (row[x], max(value, LEAST_LOSS), row["codec"])
            families.setdefault(row["codec"].split("-")[0], []).append(point)
    for i, points in enumerate(families.values()):
        across, up, names = zip(*sorted(points), strict=True)
        axes.plot(across, up, ".-", color=f"C{i % 10}", linewidth=0.6)
        for at in zip(across, up, names, strict=True):
            axes.annotate(at[2], at[:2], (3, 2), textcoords="offset points", fontsize=6)
    axes.grid(alpha=0.3)
