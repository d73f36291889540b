"""Time on the device, from the profiler: the kernels alone, without launches and the host."""

from __future__ import annotations

import glob
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """What ran on the device, in nanoseconds: a kernel, a copy or a fill."""

    start: float
    duration: float
    name: str


def _kernels(folder: str) -> list[Kernel]:
    """All kernels of the first device in a trace, in order of their start."""
    (file,) = glob.glob(folder + "/**/*.xplane.pb", recursive=True)
    planes = jax.profiler.ProfileData.from_file(file).planes
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    return sorted(
        Kernel(event.start_ns, event.duration_ns, event.name)
        for plane in sorted(devices, key=lambda plane: plane.name)[:1]
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )


def traced(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels that `run` launches, in order of their start; it is run once, to the end."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        return _kernels(folder)


def device_seconds(
    fn: Callable[..., Any], calls: Sequence[tuple[Any, ...]], turns: int = 3, named: str = ""
) -> float:
    """Median time of the kernels of one call of a jitted function.

    Args:
      fn: jitted; every call runs the same kernels.
      calls: arguments of one call each, taken in turn, so that a cache cannot hold them all.
      turns: how often the calls are repeated.
      named: count those alone whose name has this in it.
    """
    jax.block_until_ready([fn(*args) for args in calls])

    def run() -> Any:
        for _ in range(turns):
            for args in calls:
                out = fn(*args)
            jax.block_until_ready(out)
        return out

    durations = [kernel.duration for kernel in traced(run) if named in kernel.name]
    count = turns * len(calls)
    if not durations or len(durations) % count:
        raise RuntimeError(f"the profiler saw {len(durations)} kernels of {count} calls")
    each = len(durations) // count
    return (
        statistics.median(sum(durations[i : i + each]) for i in range(0, len(durations), each))
        / 1e9
    )
