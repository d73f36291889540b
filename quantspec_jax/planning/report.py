"""A plan in English: where its numbers come from, the reasons, and the table."""

from __future__ import annotations

from typing import Any

from quantspec_jax.cost import meetings
from quantspec_jax.planning.candidates import Candidate
from quantspec_jax.planning.devices import AT_THE_LIMIT
from quantspec_jax.planning.plan import Drafted, Plain, Plan, recommendation
from quantspec_jax.planning.setting import GIB, Setting
from quantspec_jax.weights.formats import DraftConfig

CACHES: dict[str, str] = {"full": "bf16", "int8": "8-bit"}
MEASURED_ELSEWHERE = (
    "SmolLM2-135M's, a small model: larger ones lose less; `quantspec eval acceptance --sweep` "
    "measures this one's, for --measured"
)


def given_acceptance(acceptance: float, draft: DraftConfig, found: list[Candidate]) -> str:
    """Where the acceptance of `scaled_candidates` comes from."""
    others = "; others scaled from SmolLM2-135M's" if len(found) > 1 else ""
    return f"{acceptance:g} for {draft.describe()}, as given{others}"


def notes(setting: Setting) -> list[str]:
    """What to know when reading a plan."""
    lines = ["working memory of the prefill and of the logits comes on top of weights and cache"]
    if setting.efficiency == AT_THE_LIMIT:
        lines.append(
            "times are limits: bytes over bandwidth; give --speed, or --plain-efficiency, "
            "--draft-efficiency and --verify-efficiency, for what kernels reach (recorded runs: "
            "benchmarks/README.md)"
        )
    if setting.axes.size > 1:
        lines.append(
            f"bytes and times are those of each of {setting.axes.size} devices, which meet "
            f"{meetings(setting.model, setting.axes)} times a pass: "
            f"{setting.meeting_milliseconds:.3g} ms at {setting.meeting_microseconds:g} µs each "
            "(--meeting-microseconds)"
        )
    if (reason := setting.device.without_kernels) is not None:
        lines.append(f"no kernel runs on this device: {reason}; XLA is far from these limits")
    return lines


def reasons(plan: Plan) -> list[str]:
    """Why this is recommended, and what does not fit."""
    chosen, lines = plan.chosen, []
    if isinstance(chosen, Drafted):
        lines = _draft_reasons(plan, chosen)
    elif chosen is not None:
        lines = _plain_reasons(plan, chosen)
    lines += _misfits(plan)
    if isinstance(chosen, Drafted) and chosen.candidate.conversion is not None:
        lines.append(
            f"unless it is stored already: quantspec convert {chosen.candidate.conversion}"
        )
    return lines


def _draft_reasons(plan: Plan, chosen: Drafted) -> list[str]:
    best = chosen.best
    near = [each for each in chosen.gammas if abs(each.gamma - best.gamma) == 1]
    lines = [
        f"a draft step reads {_number(chosen.draft_read_bytes / 1e9)} GB and a verification "
        f"{_number(chosen.verify_read_bytes / 1e9)} GB, where a plain step reads "
        f"{_number(plan.plain[0].read_bytes / 1e9)} GB",
        f"at acceptance {chosen.candidate.acceptance:.3f}, {best.gamma} proposals a round yield "
        f"{_round(chosen)}",
        f"{_ms(chosen)} ms a token, "
        + ", ".join(f"at γ = {each.gamma} {_ms(each)}" for each in near)
        + "".join(f", {_plain_name(row, 'plain with')} {_ms(row)}" for row in plan.plain),
    ]
    others = [row for row in plan.formats if row is not chosen and row.fits is not False]
    if others:
        after = min(others, key=lambda row: row.milliseconds_a_token)
        lines.append(
            f"the next format, {after.candidate.title}: acceptance "
            f"{after.candidate.acceptance:.3f}, {_number(after.draft_milliseconds)} ms a draft "
            f"step, {_ms(after)} ms a token at its best γ = {after.best.gamma}"
        )
    return lines


def _plain_reasons(plan: Plan, chosen: Plain) -> list[str]:
    lines = []
    fastest = min(plan.drafted, key=lambda row: row.milliseconds_a_token)
    if fastest.milliseconds_a_token >= chosen.milliseconds_a_token:
        lines.append(
            f"no draft pays: the best, {fastest.candidate.title} at γ = {fastest.best.gamma}, "
            f"yields {_round(fastest)}, {_ms(fastest)} ms a token; plain decoding takes "
            f"{_ms(chosen)}"
        )
    full = plan.plain[0]
    if chosen is not full and full.fits is not False:
        lines.append(f"with the {CACHES['full']} cache it takes {_ms(full)} ms a token")
    return lines


def _round(row: Drafted) -> str:
    """Tokens of a round at the best γ, and the time that it takes."""
    best = row.best
    return (
        f"{best.tokens_a_round:.2f} tokens for {best.gamma} × {_number(row.draft_milliseconds)} + "
        f"{_number(best.verify_milliseconds)} ms"
    )


def _misfits(plan: Plan) -> list[str]:
    """What does not fit, in bytes needed and there."""
    named: list[tuple[str, Plain | Drafted]] = [(row.candidate.name, row) for row in plan.formats]
    named += [(_plain_name(row, "plain decoding with"), row) for row in plan.plain]
    there = int((plan.setting.device.memory or 0) * GIB)
    return [
        f"{name} does not fit: weights and cache take {row.needed_bytes:,} bytes, and there are "
        f"{there:,}"
        for name, row in named
        if row.fits is False
    ]


def _plain_name(row: Plain, words: str) -> str:
    return f"{words} the {CACHES[row.view]} cache"


def table(plan: Plan, model: str, device: str, acceptance_source: str) -> str:
    """A plan for people."""
    setting = plan.setting
    there = f", {setting.device.memory:.1f} GiB" if setting.device.memory else ""
    many = f"{setting.axes.size} × " if setting.axes.size > 1 else ""
    plain = {f"plain, {CACHES[row.view]} cache": row for row in plan.plain}
    drafts = {row.candidate.title: row for row in plan.formats}
    width = 1 + max(map(len, [*plain, *drafts]))
    head = "  bits  accept   γ  draft ms  verify ms  tokens  ms a token  speed-up     GiB"
    lines = [
        f"{model}, {setting.context:,} tokens, batch {setting.batch}; "
        f"{many}{device}: {setting.device.bandwidth:,.0f} GB/s{there}",
        f"acceptance: {acceptance_source}",
        "",
        " " * width + head,
        *(f"{name:<{width}}{_drafted_cells(row)}{_end(row)}" for name, row in drafts.items()),
        *(f"{name:<{width}}{'':47}{_end(row)}" for name, row in plain.items()),
        "",
        _recommended(recommendation(plan.chosen)),
    ]
    return "\n".join([*lines, *(f"- {line}" for line in [*reasons(plan), *notes(setting)])])


def _drafted_cells(row: Drafted) -> str:
    best = row.best
    return (
        f"{row.draft_bits_per_weight:6.2f}{row.candidate.acceptance:8.3f}{best.gamma:4}"
        f"{_number(row.draft_milliseconds):>10}{_number(best.verify_milliseconds):>11}"
        f"{best.tokens_a_round:8.2f}"
    )


def _end(row: Plain | Drafted) -> str:
    over = "  does not fit" if row.fits is False else ""
    return f"{_ms(row):>12}{row.speed_up:9.2f}×{row.needed_bytes / GIB:8.1f}{over}"


def _recommended(advice: dict[str, Any] | None) -> str:
    if advice is None:
        return "recommended: nothing, for nothing fits"
    reads = "" if advice["draft_policy"] in (None, "all") else f", {advice['draft_policy']}"
    what = f"{advice['draft']}{reads}" if advice["draft"] else "plain decoding"
    return f"recommended: {what}: {advice['options']}"


def _number(x: float) -> str:
    """Three digits that count: models differ a thousandfold."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _ms(row: Any) -> str:
    return _number(row.milliseconds_a_token)
