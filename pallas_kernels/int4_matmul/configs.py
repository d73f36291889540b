"""Configurations of the 4-bit product: measured ones by device and shape, and a rule."""

from __future__ import annotations

import functools
import itertools

from pallas_kernels import devices, dispatch, tuned
from pallas_kernels.collectives import mailboxes
from pallas_kernels.int4_matmul.mosaic_gpu import Config, Plan, Shape
from pallas_kernels.layout import STRIP
from pallas_kernels.products.around import PLAIN

KERNEL = "int4_matmul"
RATE = 4.4e6  # bytes a microsecond that an H200 reads
SIZES = (
    *((1, 2), (1, 3), (1, 4), (1, 6), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2), (3, 3)),
    *((4, 1), (4, 2), (4, 3)),
)  # warp groups and stages


def key(shape: Shape) -> str:
    """What a measured configuration is filed under. What is added or normed does not count."""
    outputs = "+".join(map(str, shape.outputs))
    rows = shape.rows if shape.rows == 1 else 8 * shape.column_blocks
    return (
        f"rows={rows} inputs={shape.groups * shape.group_size} "
        f"outputs={outputs} group={shape.group_size} symmetric={shape.symmetric}"
        f"{' gated=True' if shape.form.gated else ''}"
        f"{f' head_dim={shape.form.append.channels}' if shape.form.append else ''}"
    )


def _registers(shape: Shape, strips: int) -> int:
    """A thread's, at most."""
    around = 12 + strips if shape.form != PLAIN else 0
    around += 6 + 2 * shape.form.devices if shape.form.devices > 1 else 0
    if shape.rows == 1:
        return 72 + 2 * strips + around
    return around + (72 + 6 * strips if shape.column_blocks == 1 else 104 + 10 * strips)


def _resident(shape: Shape, config: Config) -> int:
    """Blocks that a multiprocessor runs at once."""
    device, threads, plan = dispatch.target(), 128 * config.warpgroups, Plan(shape, config)
    return min(
        devices.REGISTERS // (threads * _registers(shape, plan.strips)),
        device.usable_bytes // (plan.shared_bytes + 1024),
        device.generation.threads // threads,
    )


def possible(shape: Shape, config: Config) -> bool:
    """Whether the device can run it; where devices meet, all of its blocks at once."""
    resident, plan = _resident(shape, config), Plan(shape, config)
    if shape.form.devices > 1:
        at_once = resident * dispatch.target().multiprocessors
        return mailboxes.possible(plan.blocks, config.cluster, plan.sums.share, at_once)
    return resident > 0


def _microseconds(shape: Shape, config: Config) -> float:
    """What a configuration may take, launch left out."""
    plan, processors = Plan(shape, config), dispatch.target().multiprocessors
    resident = _resident(shape, config)
    slots = processors * resident
    if config.cluster > 2:  # of multiprocessors that are neighbours: some are left over
        slots = slots * 3 // 4
    if not slots or (config.cluster > 2 and plan.blocks > slots):
        return float("inf")
    share = -(-shape.groups // config.cluster)
    # Memory is dealt evenly to what runs; a multiprocessor with more to do than others is slower.
    even = sum(shape.outputs) / STRIP * shape.groups * shape.strip_bytes / RATE
    busiest = float(-(-plan.blocks // processors) * processors)
    busiest *= plan.strips * share * shape.strip_bytes / RATE
    # Each block reads the activations of its groups, from L2; all of them where it norms them.
    channels = (shape.groups if shape.form.norm else share) * shape.group_size
    activations = plan.blocks * shape.rows * channels * 2 / (7 * RATE)
    # Too little in flight, and memory waits; too much, and activations wait behind the weights.
    block_bytes = min(config.stages, -(-share // plan.warps)) * plan.warps * plan.stage_bytes
    ahead = block_bytes * min(plan.blocks, slots) / processors
    starved = max(0.0, 1 - ahead / 64e3)
    flooded = 0.0 if shape.form.norm else min(1.0, max(0.0, ahead / 90e3 - 1) * 6)
    waves = -(-plan.blocks // slots)
    edges = 0.5 * (waves - 1) + (0.6 + 0.05 * config.cluster) * (config.cluster > 1)
    edges += (config.cluster > 2) + 0.45 * (config.warpgroups > 2)  # sums of many, and their waits
    # A warp takes some 0.06 for a strip of a group; beside others' loads, but for its last piece.
    strips = -(-plan.blocks // processors) * plan.strips * share
    together = min(12, plan.warps * -(-min(plan.blocks, slots) // processors))
    products = 0.06 * (plan.strips + 0.3 * strips / together)
    memory = (even + busiest) / 2 + activations + 0.5 * starved * even + flooded
    return memory + products + edges + 0.01 * plan.blocks * share / processors


def candidates(shape: Shape) -> tuple[Config, ...]:
    """Configurations that the kernel can run on the shape, best guess first."""
    return _sorted(shape, dispatch.target())


@functools.cache
def _sorted(shape: Shape, device: devices.Device) -> tuple[Config, ...]:
    assert device == dispatch.target()
    found = []
    most = -(-max(shape.outputs) // STRIP)
    if shape.form.append:
        most = Plan(shape, Config(1, 1, 1)).half_strips
    clusters = range(1, 9 if device.generation.clusters else 2)
    widths = range(1, 16 // shape.form.parts + 1)
    for (warpgroups, stages), strips, cluster in itertools.product(SIZES, widths, clusters):
        config = Config(warpgroups, stages, strips, cluster)
        share = -(-shape.groups // cluster)
        useful = strips <= most and (stages - 1) * 4 * warpgroups < share and cluster <= share
        if useful and possible(shape, config):
            found.append(config)
    return tuple(sorted(found, key=lambda config: _microseconds(shape, config)))


def diverse(shape: Shape) -> list[Config]:
    """Of each number of warpgroups, with and without clusters, alone on a multiprocessor or not."""

    def kind(config: Config) -> tuple[int, int, bool]:
        return config.warpgroups, min(config.cluster, 3), _resident(shape, config) == 1

    return tuned.diverse(candidates(shape), kind, 9)


def choose(shape: Shape) -> Config:
    """The configuration measured on the device, else the one measured on an H200, where the device
    and the shape's form leave room for it; else the rule's. (With copies by threads the rule's took
    20 to 28% longer for gate and up of Llama-3.1-8B than with bulk copies, the measured one 3 to
    6%.)"""
    device = dispatch.target()
    for found in tuned.nearest(device.name, KERNEL, key(shape), shape):
        config = Config(**found)
        if possible(shape, config) and (config.cluster == 1 or device.generation.clusters):
            return config
    return candidates(shape)[0]
