"""Configurations of kernels, tried in the step that they are a part of (`quantspec bench decode
--tune`).

Alone a kernel has the multiprocessors to itself. In a step those before and after it share their
memory and registers with it, and order weights meanwhile: what is best alone (`quantspec bench
kernels --tune`) need not be best there. So some layers of the model decode with one configuration
after the other: first with different ones of each kernel, then with those next to the best.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

from pallas_kernels import dispatch, tuned

LAYERS = 6
SECONDS, MOST_ROUNDS = 0.08, 1000  # of a timed call
REPEATS = 7
GAIN = 0.996  # of a step: what saves less is noise
MOST_NEAR = 10
Config = dict[str, Any]
Found = dict[tuple[str, str], Config]  # by kernel and key
Seconds = Callable[[int], float]  # that a call of so many rounds takes


class Step(NamedTuple):
    """What is tuned.

    lower  traces and lowers it anew, with the configurations that are chosen then
    timed  its executable → what calls it
    """

    lower: Callable[[], Any]
    timed: Callable[[Any], Seconds]


def tune(step: Step) -> Found:
    """The configurations that the step takes least with, of kernels where they are not those that
    are known."""
    (seconds,), shapes = _timed(step, [{}])
    best: Found = {}
    for near in (False, True):
        for name, shape in shapes.items():
            now = best.get(name) or _numbers(_configs(name[0]).choose(shape))
            others = _near(name[0], shape, now) if near else _configs(name[0]).diverse(shape)
            tries = [x for x in map(_numbers, others) if x != now]
            runs, _ = _timed(step, [{**best, name: config} for config in tries])
            number, share = _fastest([seconds, *runs])
            print(f"{' '.join(name)}: {len(tries)} tried, {share:.3f}", file=sys.stderr, flush=True)
            if share < GAIN:
                seconds, best[name] = runs[number - 1], tries[number - 1]
                print(f"  {best[name]}", file=sys.stderr, flush=True)
    return best


def keep(found: Found) -> None:
    """For this device, in the package's folder."""
    for (kernel, key), config in found.items():
        tuned.save(dispatch.target().name, kernel, {key: config})


def _timed(step: Step, tries: Sequence[Found]) -> tuple[list[Seconds], dict[tuple[str, str], Any]]:
    """The step with each of these, compiled side by side; and the shapes that it has. With what
    cannot be compiled it takes for ever."""
    lowered, shapes = [], {}
    for found in tries:
        with tuned.trying(found) as asked:
            lowered.append(step.lower())
        for (kernel, _), shape in asked.items():
            shapes[kernel, _configs(kernel).key(shape)] = shape
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(x.compile) for x in lowered]
    timed: list[Seconds] = []
    for found, each in zip(tries, made, strict=True):
        never = bool(found) and each.exception() is not None
        timed.append(_for_ever if never else step.timed(each.result()))
    return timed, shapes


def _numbers(config: Any) -> Config:
    return dataclasses.asdict(config)


def _for_ever(rounds: int) -> float:
    return float("inf") * rounds


def _fastest(every: Sequence[Seconds]) -> tuple[int, float]:
    """The number of the one that takes least, and its share of what the first one takes."""
    first = every[0]
    first(2)
    one = max(first(12) - first(2), 1e-6) / 10
    rounds = 2 + min(MOST_ROUNDS, max(1, round(SECONDS / one)))
    times: list[list[float]] = [[] for _ in every]
    for _ in range(REPEATS):
        for seconds, each in zip(times, every, strict=True):
            long, short = each(rounds), each(2)  # a call takes milliseconds beside its rounds
            seconds.append(long if short == long else long - short)
    medians = [statistics.median(x) for x in times]
    least = min(medians)
    return medians.index(least), least / medians[0]


def _configs(kernel: str) -> ModuleType:
    """Where a kernel's are."""
    from pallas_kernels.bf16_matmul import configs as bf16
    from pallas_kernels.int4_matmul import configs as int4
    from pallas_kernels.kv_attention import configs as attention

    return {module.KERNEL: module for module in (bf16, int4, attention)}[kernel]


def _near(kernel: str, shape: Any, now: Config) -> list[Any]:
    """Those that differ from what is best now in one number, by as little as there is."""
    configs = _configs(kernel)
    every = list(map(_numbers, configs.candidates(shape)))
    found: list[Config] = []
    for name, value in now.items():
        same = [x for x in every if all(x[k] == v for k, v in now.items() if k != name)]
        found += sorted((x for x in same if x[name] > value), key=lambda x: x[name])[:2]
        found += sorted((x for x in same if x[name] < value), key=lambda x: -x[name])[:2]
    return [configs.Config(**config) for config in found[:MOST_NEAR]]
