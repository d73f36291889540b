"""Acceptance against what a draft reads of the cache, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pallas_kernels.kv_attention.xla import ideal_bytes
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.plotting import save, short

MARKERS = {"int4": "o", "int8": "s"}
LINES = ("-", "--", ":", "-.")  # shares, from the smallest on


def megabytes(row: dict[str, Any], model: ModelConfig) -> float:
    """MB of coded tokens that a pass of the draft reads, all layers: its share of the pages."""
    heads, size = model.num_kv_heads, model.head_dim
    group = GenerateConfig.group_size
    each = ideal_bytes(row["view"] or "int4", row["context"], heads, size, group)
    share = 1.0 if row["draft_read_share"] is None else row["draft_read_share"]
    return model.num_layers * each * share / 1e6


def plot(rows: list[dict[str, Any]], model: ModelConfig, title: str, path: Path) -> None:
    """Of each policy, view, γ and temperature: the share of proposals that was accepted against MB
    read, a point a share; and by place in the round.

    Args:
      rows: of `bench text`, those over all prompts; what drafts nothing is left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    against, by_place = figure.subplots(1, 2, sharey=True)
    drafting = [row for row in rows if row["acceptance_rate"] is not None]
    settings = ("policy", "view", "context", "gamma", "temperature")
    several = [name for name in settings[2:] if len({row[name] for row in drafting}) > 1]
    policies = dict.fromkeys(row["policy"] for row in drafting)
    shares = sorted({row["share"] for row in drafting if row["share"] is not None})
    colours = {policy: f"C{i}" for i, policy in enumerate(policies)}
    for group in dict.fromkeys(tuple(row[name] for name in settings) for row in drafting):
        points = [row for row in drafting if tuple(row[name] for name in settings) == group]
        points.sort(key=lambda row: megabytes(row, model))
        first = points[0]
        view, colour = first["view"] or "int4", colours[first["policy"]]
        label = " ".join([first["policy"], view, *(f"{name} {first[name]}" for name in several)])
        across = [megabytes(row, model) for row in points]
        up = [row["acceptance_rate"] for row in points]
        against.plot(across, up, MARKERS[view] + "-", color=colour, label=label)
        for row in points:
            places = row["accepted_by_position"]
            share = "" if row["share"] is None else f" {row['share']:g}"
            line = LINES[shares.index(row["share"]) % len(LINES)] if share else LINES[0]
            style = {"color": colour, "label": label + share, "linestyle": line}
            by_place.plot(range(1, len(places) + 1), places, MARKERS[view], **style)
    against.set_xscale("log")
    ticks: list[float] = []
    for tick in sorted({float(f"{megabytes(row, model):.2g}") for row in drafting}):
        if not ticks or tick >= 1.2 * ticks[-1]:  # else their labels would lie upon each other
            ticks.append(tick)
    against.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    against.minorticks_off()
    most = max((len(row["accepted_by_position"]) for row in drafting), default=0)
    by_place.set_xticks(range(1, most + 1))
    against.set_xlabel("MB of the cache that a pass of the draft reads")
    against.set_ylabel("proposals that are accepted")
    by_place.set_xlabel("place in the round, where those before were accepted")
    for axes in (against, by_place):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    contexts = ", ".join(short(n) for n in sorted({row["context"] for row in rows}))
    figure.suptitle(f"{title}, {contexts} tokens", fontsize=10)
    save(figure, path)
