"""Configurations of the bfloat16 product: measured ones by device and shape, and a rule."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from pallas_kernels import devices, dispatch, tuned
from pallas_kernels.bf16_matmul.mosaic_gpu import OUTPUTS, Config, Plan, Shape
from pallas_kernels.collectives import mailboxes

KERNEL = "bf16_matmul"
RATE = 4.4e6  # bytes a microsecond that an H200 reads
OWN_RATE = 55e3  # and one of its multiprocessors, at least
ENOUGH = 72e3  # bytes under way to a multiprocessor: with fewer, if there are more, memory waits
MOST_RESIDENT = 4
# One row times up to so many weights is no product to XLA: it writes each weight times its input,
# and adds that up in another launch.
NO_PRODUCT = 10_000_000
# Of more weights than these, and several rows, XLA's product is faster by some 3%: of a lm_head.
WIDEST = 100_000_000


def key(shape: Shape) -> str:
    """What a measured configuration is filed under. What is added or normed does not count."""
    outputs = "+".join(map(str, shape.outputs))
    rows = shape.rows if shape.rows == 1 else 8 * shape.column_blocks
    return (
        f"rows={rows} inputs={shape.inputs} outputs={outputs} "
        f"transposed={shape.transposed} gated={shape.form.gated}"
        f"{f' head_dim={shape.form.append.channels}' if shape.form.append else ''}"
    )


def _registers(plan: Plan) -> int:
    """A thread's, at most."""
    devices = plan.shape.form.devices
    meeting = 6 + 2 * devices if devices > 1 else 0
    blocks = plan.shape.column_blocks
    append = 16 if plan.shape.form.append else 0
    return 84 + 16 * plan.units * blocks + 8 * blocks + meeting + append


def _resident(plan: Plan) -> int:
    """Blocks that a multiprocessor runs at once."""
    device, threads = dispatch.target(), 32 * plan.warps
    return min(
        devices.REGISTERS // (threads * _registers(plan)),
        device.usable_bytes // (plan.shared_bytes + 1024),
        device.generation.threads // threads,
    )


def _microseconds(plan: Plan) -> float:
    """What a configuration may take, launch left out."""
    s, c, tiles = plan.shape, plan.config, sum(plan.tiles)
    processors = plan.multiprocessors
    share = -(-s.chunks // c.cluster)
    tile_bytes = float(share * plan.stage_bytes)
    even = sum(s.outputs) * s.inputs * 2 / RATE
    each = -(-plan.blocks // processors)  # blocks of the busiest multiprocessor
    of_a_block = 1 if c.cluster > 1 else -(-tiles // plan.blocks)
    busiest = each * of_a_block * tile_bytes / OWN_RATE
    # What is under way: a slot that is being read is not.
    chunks = min(c.stages - 0.4, of_a_block * -(-share // plan.warps))
    slots = processors * min(_resident(plan), MOST_RESIDENT)
    if c.cluster > 2:  # of multiprocessors that are neighbours: some are left over
        slots = slots * 3 // 4
    ahead = chunks * plan.warps * plan.stage_bytes * min(plan.blocks, slots) / processors
    enough = min(ENOUGH, sum(s.outputs) * s.inputs * 2 / processors)
    starved = max(0.0, 1 - ahead / enough)
    # Warps that have a chunk more than others, and ends of tiles that nothing else hides.
    uneven = (-(-share // plan.warps) * plan.warps / share - 1) * (1 - 0.5 * (each > 1))
    ends = 0.35 * of_a_block / each
    clusters = (0.6 + 0.05 * c.cluster) * (c.cluster > 1)
    others = 0.1 * (c.warpgroups != 2)  # all else the same, two warp groups are the best
    staged = each * plan.staged.num_bytes / OWN_RATE / 2
    waves = 1.2 * (-(-plan.blocks // slots) - 1)
    idle = 0.15 * max(0.0, 1 - plan.blocks / processors)
    return max(even * (1 + starved + 0.3 * uneven + idle), busiest) + (
        ends + clusters + others + staged + waves
    )


def possible(plan: Plan) -> bool:
    """Whether the device can run it, and all of its warps have something to do; where devices
    meet, all of its blocks at once."""
    s, c, generation = plan.shape, plan.config, dispatch.target().generation
    share = -(-s.chunks // c.cluster)
    if c.across > plan.warps or plan.rows_of_warps > max(4, share) or c.cluster > s.chunks:
        return False
    if plan.tile_outputs - OUTPUTS >= max(s.outputs) // (2 if s.form.append else 1):
        return False
    if c.stages == 1 and share > plan.rows_of_warps:  # nothing is under way while one is read
        return False
    if c.cluster > 1 and not generation.clusters:
        return False
    if s.form.devices > 1:
        at_once = _resident(plan) * plan.multiprocessors
        return mailboxes.possible(plan.blocks, c.cluster, plan.sums.share, at_once)
    return _resident(plan) > 0


def _all(shape: Shape) -> Iterator[Plan]:
    device = dispatch.target()
    clusters = (1, 2, 3, 4, 6, 8) if device.generation.clusters else (1,)
    for warpgroups, stages, units, cluster in itertools.product(
        (1, 2, 4), (1, 2, 3, 4, 6), (1, 2), clusters
    ):
        plan = Plan(shape, Config(warpgroups, stages, units, cluster), device.multiprocessors)
        if cluster > -(-shape.chunks // cluster) or not possible(plan):
            continue
        resident = min(_resident(plan), MOST_RESIDENT)
        for n in range(1, resident + 1 if cluster == 1 else 2):
            line = 256 if shape.transposed else 0
            config = Config(warpgroups, stages, units, cluster, n, line=line)
            yield Plan(shape, config, device.multiprocessors)


@functools.cache
def _sorted(shape: Shape, device: devices.Device) -> tuple[Config, ...]:
    assert device == dispatch.target()
    return tuple(plan.config for plan in sorted(_all(shape), key=_microseconds))


def candidates(shape: Shape) -> tuple[Config, ...]:
    """Configurations that the kernel can run on the shape, best guess first."""
    return _sorted(shape, dispatch.target())


def diverse(shape: Shape) -> list[Config]:
    """Of each number of warpgroups and units, with and without clusters."""

    def kind(config: Config) -> tuple[int, int, int]:
        return config.warpgroups, min(config.cluster, 3), config.units

    return tuned.diverse(candidates(shape), kind, 12)


def faster(shape: Shape) -> bool:
    """Whether the kernel is faster than XLA: where it was measured on this device and shape, and
    where XLA does not multiply. Else by what eight models' products took on an H200: with up to 8
    rows, but for a lm_head that is the embedding [N, Kin], and the widest with several rows."""
    if tuned.find(dispatch.target().name, KERNEL, key(shape)) is not None:
        return True
    if shape.transposed:
        return shape.rows == 1 and any(shape.inputs * n <= NO_PRODUCT for n in shape.outputs)
    widest = shape.inputs * max(shape.outputs)
    return shape.rows == 1 or (shape.column_blocks == 1 and widest <= WIDEST)


def choose(shape: Shape) -> Config:
    """The configuration measured on the device, else the one measured on an H200, where the device
    and the shape's form leave room for it; else the rule's."""
    device = dispatch.target()
    for found in tuned.nearest(device.name, KERNEL, key(shape), shape):
        config = Config(**found)
        if possible(Plan(shape, config, device.multiprocessors)):
            return config
    return candidates(shape)[0]
