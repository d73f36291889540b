"""Configurations of the 4-bit product: measured ones by device and shape, and a rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from pallas_kernels import dispatch, tuned
from pallas_kernels.int4_matmul.mosaic_gpu import Config, Plan, Shape

KERNEL = "int4_matmul"


def key(shape: Shape) -> str:
    """What a measured configuration is filed under."""
    outputs = "+".join(map(str, shape.outputs))
    rows = shape.rows if shape.rows == 1 else 8 * shape.column_blocks
    return (
        f"rows={rows} inputs={shape.groups * shape.group_size} "
        f"outputs={outputs} group={shape.group_size} symmetric={shape.symmetric}"
    )


def _cost(shape: Shape, config: Config) -> float:
    """Time of a configuration, roughly, in units of what the bytes alone would take."""
    return _cluster_cost(shape, config) if config.cluster else _split_cost(shape, config)


def _split_cost(shape: Shape, config: Config) -> float:
    """Where XLA adds up the splits.

    The slowest warp's groups, waves of blocks counted, and partial sums written and read: these
    are small, and take 2.5 times what their bytes would. That and the tenth are measured.
    """
    plan = Plan(shape, config)
    # Two blocks of one warpgroup take a multiprocessor's registers; a larger block fills it.
    resident = dispatch.multiprocessors() * (2 if config.warpgroups == 1 else 1)
    waves = -(-plan.blocks // resident)
    deepest = -(-shape.groups // (config.splits * plan.sharing)) * plan.sharing
    slots = waves * resident * config.warpgroups * deepest
    work = sum(shape.outputs) / plan.outputs * shape.groups
    partial = 8 * config.splits * shape.rows if config.splits > 1 else 0
    traffic = 2.5 * partial / (shape.groups * shape.group_size / 2)
    return (1.0 if config.beside == 4 else 1.1) * slots / work + traffic


def _resident(shape: Shape, config: Config) -> int:
    """Blocks that run at once: by registers, shared memory, and how clusters fit in 16."""
    registers = 128 if shape.rows == 1 else 160 if shape.column_blocks == 1 else 240
    registers = min(registers, 512 // config.warpgroups)
    each = min(
        512 // (config.warpgroups * registers),
        dispatch.SHARED_BYTES // (Plan(shape, config).shared_bytes + 512),
    )
    if config.cluster == 1:
        return dispatch.multiprocessors() * each
    return dispatch.multiprocessors() // 16 * (16 * each // config.cluster) * config.cluster


def _cluster_cost(shape: Shape, config: Config) -> float:
    """Where blocks add up: the mean of two bounds, memory's and the busiest multiprocessor's.

    Memory is shared evenly by the blocks that run; it needs some 8 MB asked for at a time.
    """
    plan = Plan(shape, config)
    resident = _resident(shape, config)
    if not resident:
        return float("inf")
    parts = shape.parts if config.whole else 1
    block = config.beside * -(-plan.units // config.cluster) * parts
    total = sum(-(-n // 128) for n in shape.outputs) * shape.groups * shape.parts
    waves, running = -(-plan.blocks // resident), min(plan.blocks, resident)
    memory = waves * running * block / total
    busiest = -(-plan.blocks // dispatch.multiprocessors()) * dispatch.multiprocessors()
    ahead = min(config.stages, -(-plan.units // (config.cluster * plan.sharing)) * parts)
    asked = running * config.warpgroups * 4 * ahead * shape.stage_bytes
    # Scales are read, and sums scaled, for each part; few registers spill with many rows.
    more = 1.0 if config.whole or shape.parts == 1 else 1.03
    more *= 1.5 if config.warpgroups > 2 and shape.column_blocks > 1 else 1.0
    # What a wave begins with and ends with is not hidden by the other blocks.
    starved = 0.5 * max(0.0, 1 - asked / 8e6) + 0.05 * (waves - 1)
    return more * (memory + busiest * block / total) / 2 + starved + 0.01 * config.cluster


def candidates(shape: Shape) -> list[Config]:
    """Configurations that the kernel can run on the shape, best guess first."""

    def all_of_them() -> Iterator[Config]:
        for splits in range(1, min(shape.groups, 32) + 1):
            for warpgroups, stages in ((1, 3), (1, 4), (4, 2), (4, 3)):
                for beside in (4, 1):
                    yield Config(warpgroups, stages, splits, beside)
        sizes = ((1, 3), (1, 4), (2, 3), (4, 2), (4, 3))
        whole = (False, True) if shape.parts > 1 else (True,)
        for size, cluster, beside, unit in itertools.product(sizes, range(1, 9), (1, 2, 4), whole):
            yield Config(*size, splits=1, beside=beside, cluster=cluster, whole=unit)

    fitting = [c for c in all_of_them() if Plan(shape, c).shared_bytes <= dispatch.SHARED_BYTES]
    return sorted(fitting, key=lambda config: _cost(shape, config))


def diverse(shape: Shape) -> list[Config]:
    """A few configurations worth measuring: the best guesses for each size of block."""
    found = []
    ordered = candidates(shape)
    for warpgroups, stages, beside in ((1, 3, 4), (1, 4, 4), (4, 2, 4), (1, 3, 1), (1, 4, 1)):
        same = [
            c
            for c in ordered
            if not c.cluster and (c.warpgroups, c.stages, c.beside) == (warpgroups, stages, beside)
        ]
        found += same[: 2 if warpgroups == 1 else 1]
    for warpgroups, beside in itertools.product((1, 2, 4), (1, 2)):
        same = [
            c for c in ordered if c.cluster and (c.warpgroups, c.beside) == (warpgroups, beside)
        ]
        found += same[:1]
    return found


def choose(shape: Shape) -> Config:
    """The measured configuration, else the rule's."""
    found: Any = tuned.find(dispatch.device_name(), KERNEL, key(shape))
    if found is not None:
        return Config(**found)
    return next(c for c in candidates(shape) if not c.cluster)
