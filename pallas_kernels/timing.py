"""Time on the device, from the profiler: the kernels alone, without launches and the host."""

from __future__ import annotations

import glob
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax


def _kernels(folder: str) -> list[float]:
    """Durations of all kernels of a trace in nanoseconds, in order of their start."""
    (file,) = glob.glob(folder + "/**/*.xplane.pb", recursive=True)
    events = []
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                events += [(event.start_ns, event.duration_ns) for event in line.events]
    return [duration for _, duration in sorted(events)]


def device_seconds(
    fn: Callable[..., Any], calls: Sequence[tuple[Any, ...]], turns: int = 3
) -> float:
    """Median time of the kernels of one call of a jitted function.

    Args:
      fn: jitted; every call runs the same kernels.
      calls: arguments of one call each, taken in turn, so that a cache cannot hold them all.
      turns: how often the calls are repeated.
    """
    jax.block_until_ready([fn(*args) for args in calls])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(turns):
                for args in calls:
                    out = fn(*args)
                jax.block_until_ready(out)
        durations = _kernels(folder)
    count = turns * len(calls)
    if not durations or len(durations) % count:
        raise RuntimeError(f"the profiler saw {len(durations)} kernels of {count} calls")
    each = len(durations) // count
    return (
        statistics.median(sum(durations[i : i + each]) for i in range(0, len(durations), each))
        / 1e9
    )
