"""What the kernel is specialized to, how it is laid on the chip, and what follows from both."""

from __future__ import annotations

import dataclasses

PIECES = 8  # in which a unit's full-precision keys, and its values, are copied


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is laid on the chip.

    warpgroups     of 128 threads a block; one block a multiprocessor
    token_warps    warps that share a tile, each with its part of the tokens
    column_blocks  of 8 query rows that a warp multiplies with what it has converted
    stages         tiles a team of warps has in shared memory, read or in flight
    shared         the scaled queries of a tile lie in shared memory: each warp of the team makes a
                   part for all, and none holds them in registers
    exchange       so do the probabilities: a warp computes those of its part of the tokens, and
                   multiplies all of them with its part of the values' channels
    """

    warpgroups: int
    token_warps: int
    column_blocks: int
    stages: int
    shared: bool = False
    exchange: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernel is specialized to. R = rows: query tokens × query heads of a group."""

    batch: int
    kv_heads: int
    group: int
    tokens: int
    head_dim: int
    group_size: int
    tiles: int
    buffer_length: int
    view: str
    strict: bool
    sm_scale: float
    exact_tiles: int = 0
    places: int | None = None  # of a list of pages for each head; None: there is none
    counted: bool = False  # whether a count says how many tiles are read, as each list has one
    page_log_sums: bool = False

    @property
    def rows(self) -> int:
        return self.group * self.tokens

    @property
    def value_width(self) -> int:
        return min(self.group_size, self.head_dim)

    @property
    def value_groups(self) -> int:
        return -(-self.head_dim // self.value_width)

    @property
    def planes(self) -> int:
        return {"full": 0, "int4": 1, "int8": 2}[self.view]

    @property
    def listed(self) -> bool:
        """Whether a list says which tiles are read."""
        return self.places is not None

    @property
    def unit(self) -> float:
        """What 1 is in the sums: a step of the upper plane in the bits of a float16 subnormal."""
        return {0: 1.0, 1: 2.0**-24, 2: 2.0**-20}[self.planes]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Byte offsets and counts that follow from a shape and a configuration.

    bulk   whether the device copies in bulk (`ptx.copies`)
    wgmma  whether it has products of a warpgroup (`ptx.warpgroups`)
    ahead  whether lengths are read, and tiles ordered, before the launches between have ended
    """

    shape: Shape
    config: Config
    blocks: int
    bulk: bool = True
    wgmma: bool = True
    ahead: bool = False

    @property
    def by_warpgroups(self) -> bool:
        """Whether four warps multiply together: those that exchange probabilities do."""
        return self.wgmma and self.config.exchange and self.config.token_warps == 4

    @property
    def column_groups(self) -> int:
        """Warps that share a tile, each with other query rows (some may have none)."""
        needed = -(-self.shape.rows // (8 * self.config.column_blocks))
        warps = 4 * self.config.warpgroups // self.config.token_warps
        return next((n for n in range(needed, warps + 1) if warps % n == 0), needed)

    @property
    def team_warps(self) -> int:
        return self.config.token_warps * self.column_groups

    @property
    def team_threads(self) -> int:
        return 32 * self.team_warps

    @property
    def teams(self) -> int:
        """Teams a block."""
        return 4 * self.config.warpgroups // self.team_warps

    @property
    def row_warps(self) -> int:
        """Warps of a team that read full-precision tokens, 16 each, from a stage of tile size."""
        share = 16 * 2 * 2 * self.shape.head_dim
        fitting = max(1, min(self.config.token_warps, sum(self.sections) // share))
        return 1 << (fitting.bit_length() - 1)

    @property
    def unit_rows(self) -> int:
        """Full-precision tokens that take the place of a tile in the pipeline."""
        return 16 * (self.row_warps if self.shape.planes else self.config.token_warps)

    @property
    def piece_rows(self) -> int:
        """Full-precision rows of a unit that are copied at once (`full_precision`)."""
        return self.unit_rows // PIECES

    @property
    def piece_bytes(self) -> int:
        """From a piece to the next in shared memory: each begins 16 bytes further in the banks."""
        return self.piece_rows * 2 * self.shape.head_dim + 16

    @property
    def code_bytes(self) -> int:
        return self.shape.group_size * self.shape.head_dim // 2

    @property
    def sections(self) -> list[int]:
        """Bytes of a tile's parts: keys upper, lower, scale, minimum, then those of the values."""
        s = self.shape
        codes = [self.code_bytes] * s.planes
        key_numbers = [2 * s.head_dim] * 2
        value_numbers = [2 * s.value_groups * s.group_size] * 2
        return [*codes, *key_numbers, *codes, *value_numbers] if s.planes else []

    @property
    def section_starts(self) -> list[int]:
        """Where they begin in a stage."""
        sizes = self.sections
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @property
    def stage_bytes(self) -> int:
        full_precision = 2 * PIECES * self.piece_bytes
        return -(-max(sum(self.sections), full_precision) // 128) * 128

    @property
    def barrier_bytes(self) -> int:
        return -(-2 * 8 * self.teams * self.config.stages // 128) * 128

    @property
    def ring_bytes(self) -> int:
        return self.barrier_bytes + self.teams * self.config.stages * self.stage_bytes

    @property
    def query_blocks(self) -> int:
        """Blocks of 8 query rows that a team works on."""
        return self.column_groups * self.config.column_blocks

    @property
    def query_bytes(self) -> int:
        """A team's scaled queries in shared memory, and a float32 number a row."""
        block = 8 * (2 * self.shape.head_dim + 4)
        return -(-self.query_blocks * block // 128) * 128 if self.config.shared else 0

    @property
    def exchange_bytes(self) -> int:
        """A team's probabilities in shared memory: 512 bytes a warp and block."""
        blocks = self.team_warps * self.config.column_blocks
        return 512 * blocks if self.config.exchange else 0

    @property
    def channel_blocks(self) -> int:
        """Of 16 channels of the values, that a warp sums up."""
        parts = self.config.token_warps if self.config.exchange else 1
        return self.shape.head_dim // (16 * parts)

    @property
    def shared_bytes(self) -> int:
        return self.ring_bytes + self.teams * (self.query_bytes + self.exchange_bytes)

    @property
    def writers(self) -> int:
        """Partial results of a team and head: each for other tokens."""
        return 1 if self.config.exchange else self.config.token_warps

    @property
    def partials(self) -> int:
        """Partial results: one a writer of a team and key-value head that the team touches."""
        slots = self.blocks * self.teams + self.shape.batch * self.shape.kv_heads
        return slots * self.writers
