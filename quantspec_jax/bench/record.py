"""Recorded runs: one JSON a run, with what it takes to judge and to repeat it."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
from pathlib import Path
from typing import Any

import jax

from quantspec_jax.files import write_json
from quantspec_jax.versions import versions


def device_name() -> str:
    """The default device: a GPU's name, or the CPU's model and the cores this process may use."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


NOT_OPTIONS = ("command", "bench", "measure", "run", "json", "debug")
MODELS = ("model", "draft_from")  # files, directories or hub ids
FILES = (
    *MODELS,
    "text",
    "kv_text",
    "output",
    "plot",
    "cache",
    "keep",
    "draft_of",
    "draft_text",
    "data",
)
REPEATED = ("draft_of",)  # options that are given once a value


def command(start: str, args: argparse.Namespace) -> str:
    """What to type to repeat a run: `start`, and all options that it lacks, the defaults too.

    Of a file its name is kept, not where it lies.
    """
    there, parts = set(start.split()), [start]
    for name, value in vars(args).items():
        option = "--" + name.replace("_", "-")
        if name in NOT_OPTIONS or option in there or value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        if isinstance(value, dict):  # sizes of a mesh
            values = [",".join(f"{axis}={size}" for axis, size in value.items())]
        if name in FILES:
            values = [each if is_hub_id(name, each) else Path(each).name for each in values]
        if name in REPEATED:
            parts += [shlex.join((option, str(each))) for each in values]
        elif value != []:
            parts.append(shlex.join(map(str, (option, *values))))
    return " ".join(parts)


def is_hub_id(option: str, value: str | Path) -> bool:
    return option in MODELS and str(value).count("/") == 1 and not os.path.exists(value)


def model_name(source: str) -> str:
    """What a model is called in a record: the last part of where it is, a GGUF file without its
    ending."""
    return Path(source).name.removesuffix(".gguf")


def write(path: Path, command: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a recorded run, whole or not at all.

    Args:
      path: `benchmarks/<what>-<device>-<date>.json`.
      command: what to type to repeat it.
      rows: the results.
      more: further keys beside `what`, `command`, `versions`, `device`, `date` and `rows`.
    """
    what = path.stem
    record = {
        "what": what,
        "command": command,
        "versions": versions(),
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        **more,
        "rows": rows,
    }
    write_json(path, record, indent=1)
