"""Configurations of the attention kernel: measured ones by device and shape, and a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from pallas_kernels import dispatch, tuned
from pallas_kernels.kv_attention.mosaic_gpu import Config, Plan, Shape

KERNEL = "kv_attention"
OWN_BYTES = 4096  # left free
LONG = 1 << 16  # tokens: fewer are short, where few and small stages fill sooner


def key(shape: Shape) -> str:
    """What a measured configuration is filed under."""
    return (
        f"view={shape.view} kv_heads={shape.kv_heads} rows={shape.rows} "
        f"head_dim={shape.head_dim} group_size={shape.group_size}"
        f"{' short' if max(shape.tiles * shape.group_size, shape.buffer_length) < LONG else ''}"
    )


def _by_warpgroups(shape: Shape) -> bool:
    """Whether four warps that exchange probabilities can share a tile, as a warpgroup."""
    fits = shape.group_size % (32 * 4) == 0 and shape.head_dim % (16 * 4) == 0
    return fits and dispatch.target().generation.wgmma


def _layouts(shape: Shape) -> Iterator[tuple[int, bool, bool]]:
    """(column blocks, queries, and probabilities, in shared memory): how many blocks of 8 rows meet
    what a warp converts."""
    needed = -(-shape.rows // 8)
    if shape.head_dim <= 128 and needed > 1:
        if shape.planes:
            # As many as the registers hold, and no more than the rows need.
            held = 6 if _by_warpgroups(shape) else 4
            most, exchanged = (-(-needed // -(-needed // n)) for n in (4, held))
            if shape.value_groups == 1:
                yield exchanged, True, True
            yield from dict.fromkeys([(most, True, False), (2, True, False), (2, False, False)])
        else:
            yield 2, False, False
    yield 1, False, False


def candidates(shape: Shape) -> Iterator[Config]:
    """Configurations that the kernel can run on the shape, best guess first; last those with fewer
    stages than there is room for."""
    yield from _deepest(shape)
    for config in _deepest(shape):
        for stages in range(config.stages - 1, 1, -1):
            yield dataclasses.replace(config, stages=stages)


def _deepest(shape: Shape) -> Iterator[Config]:
    """With as many stages as there is room for."""
    for column_blocks, shared, exchange in _layouts(shape):
        # 12 warps leave 168 registers a thread; two blocks of rows or a wide head need more.
        few = column_blocks > 1 or shape.head_dim > 128
        token_warps_first = (4, 2, 1) if exchange or column_blocks > 2 else (2, 4, 1)
        # On an H100 and 30,000 to 33,000 tokens, drafts took 20% less time with two warpgroups than
        # with three.
        two_first = few or shape.view == "int4"
        for warpgroups in (2, 3, 1) if shared else (2, 3, 4, 1) if two_first else (3, 2, 4, 1):
            for token_warps in (1,) if shape.view == "full" else token_warps_first:
                if shape.view != "full" and shape.group_size % (32 * token_warps):
                    continue
                if exchange and shape.head_dim % (16 * token_warps):
                    continue
                one = Config(warpgroups, token_warps, column_blocks, 1, shared, exchange)
                plan = Plan(shape, one, 1)
                if plan.team_warps > 4 * warpgroups or 4 * warpgroups % plan.team_warps:
                    continue
                own = plan.query_bytes + plan.exchange_bytes
                room = dispatch.target().usable_bytes - OWN_BYTES - plan.teams * own
                # More than two stages brought nothing where a team's warps wait for each other in
                # each tile: on an H200 up to 1.6% less time, and up to 13% more.
                stages = min(room // (plan.teams * plan.stage_bytes), 2 if exchange else 8)
                if stages >= 2:
                    yield dataclasses.replace(one, stages=stages)


def diverse(shape: Shape) -> list[Config]:
    """Of each layout and number of warpgroups."""

    def kind(config: Config) -> tuple[int, bool, bool, int]:
        return config.column_blocks, config.shared, config.exchange, config.warpgroups

    return tuned.diverse(candidates(shape), kind, 12)


def choose(shape: Shape) -> Config | None:
    """The configuration measured on the device, else on an H200, where it fits; else the first that
    does; None where none does."""
    device, here = dispatch.target(), key(shape)
    keys = dict.fromkeys((here, here.removesuffix(" short")))  # long ones' serve short ones, too
    for found in (
        found for each in keys for found in tuned.nearest(device.name, KERNEL, each, shape)
    ):
        config = Config(**found)
        if Plan(shape, config, 1).shared_bytes + OWN_BYTES <= device.usable_bytes:
            return config
    return next(candidates(shape), None)
