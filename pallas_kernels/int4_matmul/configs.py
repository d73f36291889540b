"""Configurations of the 4-bit product: measured ones by device and shape, and a rule."""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels import dispatch, tuned
from pallas_kernels.int4_matmul.mosaic_gpu import Config, Plan, Shape

KERNEL = "int4_matmul"


def key(shape: Shape) -> str:
    """What a measured configuration is filed under."""
    outputs = "+".join(map(str, shape.outputs))
    return (
        f"rows={8 * shape.column_blocks} inputs={shape.groups * shape.group_size} "
        f"outputs={outputs} group={shape.group_size} symmetric={shape.symmetric}"
    )


def _idle(shape: Shape, config: Config) -> float:
    """Share of the chip that the last wave of blocks leaves idle, and the cost of many splits."""
    plan = Plan(shape, config)
    resident = dispatch.multiprocessors() * max(1, dispatch.SHARED_BYTES // plan.shared_bytes)
    waves = -(-plan.blocks // resident)
    deepest = -(-shape.groups // config.splits)
    balance = plan.blocks * shape.groups / config.splits / (waves * resident * deepest)
    traffic = 8 * config.splits * shape.rows / (shape.groups * shape.group_size / 2)
    return 1 - balance + traffic


def candidates(shape: Shape) -> list[Config]:
    """Configurations that the kernel can run on the shape, best guess first."""

    def all_of_them() -> Iterator[Config]:
        for splits in range(1, min(shape.groups, 16) + 1):
            for stages in (4, 3, 6):
                config = Config(1, stages, splits)
                if Plan(shape, config).shared_bytes <= dispatch.SHARED_BYTES:
                    yield config

    return sorted(all_of_them(), key=lambda config: _idle(shape, config))


def choose(shape: Shape) -> Config:
    """The measured configuration, else the rule's."""
    found = tuned.find(dispatch.device_name(), KERNEL, key(shape))
    return Config(**found) if found is not None else candidates(shape)[0]
