"""`quantspec plan`: the draft's format and γ for a model, a context and a device."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantspec_jax.checks import require
from quantspec_jax.commands.options import add_mesh, command, preset

if TYPE_CHECKING:
    from quantspec_jax.axes import Axes
    from quantspec_jax.models.config import ModelConfig
    from quantspec_jax.planning.candidates import Candidate
    from quantspec_jax.planning.devices import Device, Efficiency
    from quantspec_jax.weights.formats import DraftConfig

PASSES = ("plain", "draft", "verify")


def add(commands: Any) -> None:
    """The parser."""
    summary = "recommend the draft's format and gamma, without loading weights"
    parser = command(commands, "plan", run, summary)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("source", nargs="?", metavar="SOURCE", help="what `convert` reads or wrote")
    model.add_argument("--preset", metavar="NAME", help="shapes of a well-known model")
    parser.add_argument("--context", required=True, type=int, metavar="N", help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences (1)")
    acceptance = parser.add_argument_group("acceptance (default: measured on SmolLM2-135M)")
    given = acceptance.add_mutually_exclusive_group()
    given.add_argument(
        "--acceptance",
        type=float,
        metavar="A",
        help="of the stored draft, else of 4 bits, asymmetric, group 64",
    )
    given.add_argument(
        "--measured", metavar="FILE", help="what `eval acceptance --sweep --output` wrote"
    )
    acceptance.add_argument(
        "--sampled", action="store_true", help="acceptance at temperature 1, not greedy"
    )
    device = parser.add_argument_group("device")
    device.add_argument(
        "--device", metavar="NAME", help="figures of its data sheet: h200, a100, ..."
    )
    device.add_argument("--bandwidth", type=float, metavar="GB/s", help="of memory that is read")
    add_mesh(parser)
    device.add_argument(
        "--meeting-microseconds",
        type=float,
        metavar="US",
        help="what each meeting of the mesh's devices takes (7; 0 with --speed over this mesh, "
        "which counts them)",
    )
    device.add_argument("--memory", type=float, metavar="GiB", help="default: the device's")
    device.add_argument(
        "--speed", metavar="FILE", help="bandwidth and efficiencies, as `bench decode --json` wrote"
    )
    for name in PASSES:
        device.add_argument(
            f"--{name}-efficiency", type=float, metavar="E", help="share of the limit reached (1)"
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Put together what is known of model, device and acceptance, and plan."""
    from quantspec_jax.cost import READINGS, Reading
    from quantspec_jax.planning import report
    from quantspec_jax.planning.candidates import reading_less
    from quantspec_jax.planning.plan import plan
    from quantspec_jax.planning.recorded import measured_readings
    from quantspec_jax.planning.setting import Setting

    name, model, stored = planned_model(args)
    device, device_name, efficiency = planned_device(args)
    candidates, source = candidates_and_source(
        args.acceptance, args.measured, stored, sampled=args.sampled
    )
    model, axes = over_mesh(model, args.mesh or {})
    candidates = with_whole_groups(candidates, model, args.mesh or {})
    meeting = meeting_microseconds(args)
    setting = Setting(model, args.context, device, args.batch, efficiency, axes, **meeting)
    readings: Sequence[Reading] = READINGS
    if args.measured is not None:
        readings = measured_readings(args.measured, args.sampled)
    found = plan(setting, reading_less(candidates, readings))
    if not args.json:
        print(report.table(found, name, device_name, source))
    return {
        "model": name,
        "context": args.context,
        "batch": args.batch,
        "device": {
            "name": device_name,
            "bandwidth_gb_per_second": device.bandwidth,
            "memory_gib": device.memory,
        },
        "mesh": args.mesh,
        "meeting_microseconds": setting.meeting_microseconds if axes.size > 1 else None,
        "efficiency": vars(efficiency),
        "acceptance_source": source,
        **found.to_dict(),
        "reasons": report.reasons(found),
        "notes": report.notes(setting),
    }


def planned_model(args: argparse.Namespace) -> tuple[str, ModelConfig, DraftConfig | None]:
    """Name, configuration and stored draft of what to plan for."""
    known = preset(args.preset)
    if known is not None:
        return args.preset, known, None
    import convert

    checkpoint = convert.open_source(args.source)
    return str(args.source), checkpoint.config, checkpoint.draft_config


def over_mesh(model: ModelConfig, sizes: dict[str, int]) -> tuple[ModelConfig, Axes]:
    """The model as devices hold it together, and the mesh's sizes; no device is asked for.

    Raises:
      ValueError: the mesh does not divide the model.
    """
    from quantspec_jax.axes import Axes
    from quantspec_jax.sharding import abstract_mesh, check_mesh, heads_over

    require(min(sizes.values(), default=1) >= 1, "--mesh", sizes, "axes of 1 and more devices")
    mesh = abstract_mesh(sizes)
    check_mesh(model, mesh)
    return heads_over(model, mesh), Axes.over(sizes)


def with_whole_groups(
    candidates: list[Candidate], model: ModelConfig, sizes: dict[str, int]
) -> list[Candidate]:
    """The candidates but for those of which a mesh would split groups, as far as that is known.

    Raises:
      ValueError: there is none.
    """
    from quantspec_jax.sharding import abstract_mesh, check_draft, draft_fits

    mesh = abstract_mesh(sizes)
    # What names layers may name another model's.
    known = [each.config for each in candidates if each.config and not each.config.formats]
    split = [config for config in known if not draft_fits(model, config, mesh)]
    found = [each for each in candidates if each.config not in split]
    if not found:
        check_draft(model, split[0], mesh)
    return found


def meeting_microseconds(args: argparse.Namespace) -> dict[str, float]:
    """What was given, or 0 where the measured speed counts it; nothing where it is unknown."""
    from quantspec_jax.planning.recorded import measured_mesh

    if args.meeting_microseconds is not None:
        return {"meeting_microseconds": args.meeting_microseconds}
    counted = args.speed is not None and args.mesh and measured_mesh(args.speed) == args.mesh
    return {"meeting_microseconds": 0.0} if counted else {}


def candidates_and_source(
    acceptance: float | None = None,
    measured: str | None = None,
    stored: DraftConfig | None = None,
    *,
    sampled: bool = False,
) -> tuple[list[Candidate], str]:
    """The drafts to choose from, and where their acceptance comes from.

    Args:
      acceptance: of the stored draft, else of `DraftConfig()`.
      measured: path of what `quantspec eval acceptance` wrote.
      stored: the draft of the checkpoint.
      sampled: take the acceptance at temperature 1.
    """
    from quantspec_jax.planning import report
    from quantspec_jax.planning.candidates import default_candidates, scaled_candidates
    from quantspec_jax.planning.recorded import measured_candidates
    from quantspec_jax.weights.formats import DraftConfig

    if measured is not None:
        return measured_candidates(measured, sampled), measured
    if acceptance is None:
        return default_candidates(sampled), report.MEASURED_ELSEWHERE
    draft = stored or DraftConfig()
    scaled = scaled_candidates(acceptance, draft, sampled)
    return scaled, report.given_acceptance(acceptance, draft, scaled)


def planned_device(args: argparse.Namespace) -> tuple[Device, str, Efficiency]:
    """The device, its name, and the efficiencies."""
    from quantspec_jax.planning.devices import DEVICES, Device, Efficiency
    from quantspec_jax.planning.recorded import measured_speed

    known = ", ".join(DEVICES)
    require(args.device in (None, *DEVICES), "--device", args.device, known)
    bandwidth, efficiency = args.bandwidth, Efficiency()
    if args.speed is not None:
        measured, efficiency = measured_speed(args.speed, args.context)
        bandwidth = measured if bandwidth is None else bandwidth
    efficiency = _with(efficiency, **{n: getattr(args, f"{n}_efficiency") for n in PASSES})
    if args.device is None:
        require(bandwidth is not None, "--device", None, f"{known}, or --bandwidth in GB/s")
        return Device(args.memory, bandwidth), "the device", efficiency
    device = _with(DEVICES[args.device], bandwidth=bandwidth, memory=args.memory)
    return device, args.device, efficiency


def _with(record: Any, **changes: Any) -> Any:
    """The record with what is not None changed."""
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(record, **given)
