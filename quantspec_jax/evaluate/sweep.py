"""Many drafts of one model on one text: acceptance, perplexity, bits, and the speed they promise.

The target reads the text once for all of them. The speed-up that each promises over plain decoding
comes from the bytes that the passes read (`quantspec_jax.cost`) at the best γ: a limit that real
kernels come close to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantspec_jax.checks import require
from quantspec_jax.cost import ALL_PAGES, READINGS, Reading, bytes_read
from quantspec_jax.evaluate.measures import accepted, read_tokens
from quantspec_jax.evaluate.teacher_forced import DRAFT, Overlap, compare_drafts
from quantspec_jax.generate.config import Backend
from quantspec_jax.generate.policies import policy
from quantspec_jax.loading import Model
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import Params
from quantspec_jax.plotting import save, short
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.sizes import bits_per_weight, draft_bytes

DRAFTS = (
    DraftConfig(group_size=128, symmetric=True),
    DraftConfig(group_size=128),
    DraftConfig(group_size=64),
    DraftConfig(group_size=64, layers="mlp"),
    DraftConfig(bits=8, group_size=64),
    DraftConfig(bits=None),
)
CONTEXTS = (8192, 32768, 131072)


def sweep(
    model: Model,
    tokens: str | Sequence[int],
    drafts: Sequence[DraftConfig | Model] | None = None,
    *,
    context: int | None = None,
    first: int | None = None,
    shapes: ModelConfig | None = None,
    contexts: Sequence[int] = CONTEXTS,
    group_size: int = 128,
    progress: bool = False,
    backend: Backend = "auto",
) -> dict[str, Any]:
    """What `acceptance` measures, for each of several drafts; for the model's own also where it
    reads less of the cache (`cost.READINGS`).

    Args:
      tokens: a text or its token ids.
      drafts: formats, rounded to nearest here, or models that stand for their own drafts (stored
        and calibrated ones). None: `DRAFTS`, and the model's own where it is not one of them.
      context, first, group_size, progress: as in `acceptance`.
      shapes: the model to predict speed-ups for; None: this one.
      contexts: lengths to predict them at.

    Returns:
      positions; target_perplexity over them; drafts, `DraftConfig.to_dict` of each; and rows, one a
      draft and what it reads: draft, draft_policy, draft_share, draft_view, greedy_acceptance,
      sampled_acceptance, perplexity (of its predictions, each from the target's cache),
      draft_bits_per_weight, draft_bytes, and, by context, gamma and speed_up (predicted, greedy,
      batch 1, bf16 weights; below 1 plain decoding is faster).

    Raises:
      ValueError: an argument is wrong; says which.
    """
    ids = read_tokens(model, tokens, context)
    first = len(ids) // 4 if first is None else first
    require(0 <= first < len(ids) - 1, "first", first, f"a position from 0 to {len(ids) - 2}")
    configs, trees = _prepare(model, default_drafts(model) if drafts is None else drafts)
    readings = [ALL_PAGES] * len(configs)
    if model.draft in configs:
        own = configs.index(model.draft)
        less = [reading for reading in READINGS if reading != ALL_PAGES]
        readings += less
        configs += [configs[own]] * len(less)
        trees += [trees[own]] * len(less)
    found = compare_drafts(
        model,
        trees,
        ids,
        policies=[policy(each.policy, each.share) for each in readings],
        first=max(first, 1),
        group_size=group_size,
        backend=backend,
        progress=progress,
    )
    counted = slice(first, len(ids) - 1)
    rows = [_row(model.config, *each, first) for each in zip(configs, readings, found, strict=True)]
    return {
        "positions": len(ids) - first,
        "target_perplexity": _perplexity(found[0].log_prob[counted]),
        "rows": [
            row
            | predictions(
                shapes or model.config,
                config,
                row["greedy_acceptance"],
                contexts,
                share=row["draft_share"],
            )
            for config, row in zip(configs, rows, strict=True)
        ],
        "drafts": [config.to_dict() for config in configs],
    }


def default_drafts(model: Model) -> list[DraftConfig | Model]:
    """`DRAFTS`, and the model's own where it is not one of them."""
    own = [] if model.draft in DRAFTS else [model]
    return [*DRAFTS, *own]


def _prepare(
    model: Model, drafts: Sequence[DraftConfig | Model]
) -> tuple[list[DraftConfig], list[Params]]:
    """Configuration and whole tree of each draft; one that comes twice only once."""
    require(len(drafts) > 0, "drafts", drafts, "one or more")
    configs, trees = [], []
    for draft in drafts:
        if isinstance(draft, Model):
            same = draft.config == model.config
            require(same, "drafts", "a draft of another model", "drafts of the evaluated model")
            config, tree = draft.draft, draft.draft_params
        else:
            rounded = draft.method == "rtn"
            require(rounded, "draft method", draft.method, "rtn, or a Model with its own draft")
            if draft in configs:
                continue
            config, tree = draft, Model(model.config, model.params, draft=draft).draft_params
        configs.append(config)
        trees.append(tree)
    return configs, trees


def _perplexity(log_prob: np.ndarray) -> float:
    return math.exp(-log_prob.mean(dtype=np.float64))


def _row(
    model: ModelConfig, config: DraftConfig, reading: Reading, seen: Overlap, first: int
) -> dict[str, Any]:
    return {
        "draft": config.describe(),
        "draft_policy": reading.policy,
        "draft_share": reading.share,
        "draft_view": DRAFT.view,
        "draft_bits_per_weight": bits_per_weight(model, config),
        "draft_bytes": draft_bytes(model, config),
        **accepted(seen, first),
        "perplexity": _perplexity(seen.draft_log_prob[first:-1]),
    }


def predictions(
    shapes: ModelConfig,
    config: DraftConfig,
    acceptance: float,
    contexts: Sequence[int] = CONTEXTS,
    share: float = 1.0,
) -> dict[str, Any]:
    """gamma and speed_up, each by context: the limit by bytes at batch 1, with bf16 weights."""
    gammas, speed_ups = {}, {}
    for context in contexts:
        costs = bytes_read(shapes, config, context, share=share)
        gamma = costs.best_gamma(acceptance)
        gammas[str(context)] = gamma
        speed_ups[str(context)] = costs.speed_up(acceptance, gamma)
    return {"gamma": gammas, "speed_up": speed_ups}


def _title(row: dict[str, Any]) -> str:
    """The draft, and what it reads of the cache."""
    reading = Reading(row["draft_policy"], row["draft_share"])
    return row["draft"] if reading == ALL_PAGES else f"{row['draft']}, {reading}"


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    contexts = list(result["rows"][0]["speed_up"])
    width = max(len(_title(row)) for row in result["rows"])
    head = [f"{'draft':<{width}}", f"{'bits':>6}{'greedy':>8}{'sampled':>9}{'perplexity':>12}"]
    head += [f"{'at ' + short(int(context)):>14}" for context in contexts]
    lines = ["".join(head)]
    for row in result["rows"]:
        cells = (
            f"{_title(row):<{width}}{row['draft_bits_per_weight']:6.2f}"
            f"{row['greedy_acceptance']:8.3f}{row['sampled_acceptance']:9.3f}"
            f"{row['perplexity']:12.3f}"
        )
        predicted = (
            f"{row['speed_up'][c]:6.2f}× (γ{row['gamma'][c]:>2})".rjust(14) for c in contexts
        )
        lines.append(cells + "".join(predicted))
    lines.append(
        f"{result['positions']} positions; the target's perplexity is "
        f"{result['target_perplexity']:.3f}; at a context: the predicted limit of the speed-up "
        f"over plain decoding of {result.get('predicted_for', 'this model')}, and its γ"
    )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Acceptance against bits a weight; each point's label says what it promises by context."""
    from matplotlib.figure import Figure

    rows = sorted(result["rows"], key=lambda row: row["greedy_acceptance"])
    figure = Figure(figsize=(11, 1.6 + 0.62 * max(len(rows), 4)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    for kind, marker in (("greedy", "o"), ("sampled", "x")):
        points = [(r["draft_bits_per_weight"], r[f"{kind}_acceptance"]) for r in rows]
        axes.plot(*zip(*points, strict=True), marker, color="tab:blue", label=kind)
    # Labels in a column on the right, in the order of the points, so that none hides another.
    for i, row in enumerate(rows):
        promised = " · ".join(f"{v:.2f}× {short(int(c))}" for c, v in row["speed_up"].items())
        axes.annotate(
            f"{_title(row)}\n{promised}",
            (row["draft_bits_per_weight"], row["greedy_acceptance"]),
            (1.04, (i + 0.5) / len(rows)),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "gray"},
        )
    ticks = [4, 5, 6, 8, 12, 16]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(3.8, 17)
    axes.set_xlabel("bits a weight of the draft's linear layers, scales counted")
    axes.set_ylabel("acceptance of a first proposal")
    axes.set_title(
        "Drafts, and the limit of the speed-up over plain decoding of "
        f"{result.get('predicted_for', 'this model')}",
        fontsize=10,
    )
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)
