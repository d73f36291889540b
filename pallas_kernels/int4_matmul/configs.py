"""Configurations of the 4-bit product: measured ones by device and shape, and a rule."""

from __future__ import annotations

from collections.abc import Iterator

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
    """Time of a configuration, roughly, in units of what the bytes alone would take.

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


def candidates(shape: Shape) -> list[Config]:
    """Configurations that the kernel can run on the shape, best guess first."""

    def all_of_them() -> Iterator[Config]:
        for splits in range(1, min(shape.groups, 32) + 1):
            for warpgroups, stages in ((1, 3), (1, 4), (4, 2), (4, 3)):
                for beside in (4, 1):
                    config = Config(warpgroups, stages, splits, beside)
                    if Plan(shape, config).shared_bytes <= dispatch.SHARED_BYTES:
                        yield config

    return sorted(all_of_them(), key=lambda config: _cost(shape, config))


def diverse(shape: Shape) -> list[Config]:
    """A few configurations worth measuring: the best guesses for each size of block."""
    found = []
    for warpgroups, stages, beside in ((1, 3, 4), (1, 4, 4), (4, 2, 4), (1, 3, 1), (1, 4, 1)):
        same = [
            c
            for c in candidates(shape)
            if (c.warpgroups, c.stages, c.beside) == (warpgroups, stages, beside)
        ]
        found += same[: 2 if warpgroups == 1 else 1]
    return found


def choose(shape: Shape) -> Config:
    """The measured configuration, else the rule's."""
    found = tuned.find(dispatch.device_name(), KERNEL, key(shape))
    return Config(**found) if found is not None else candidates(shape)[0]
