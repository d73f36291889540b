"""A block's activations in shared memory: copied beside the first weights, and normed there.

Every block has all rows and the channels that it multiplies with; with a norm it has all channels,
and computes the norm by itself, which takes less than a launch, while weights are on their way:

    row        channels, 2 bytes each                 | unused: rows begin 64 bytes apart, so that
    0 … R − 1  x, in the end its norm                 | the lanes of two rows read all banks
    R          the norm's weight
    sums       Σ x² of each row, of each warp
"""

from __future__ import annotations

import dataclasses

from pallas_kernels import ptx
from pallas_kernels.ptx import V, f32, i32

PIECE = 8  # channels: 16 bytes
APART = 8  # pieces between those that neighbouring blocks begin with


@dataclasses.dataclass(frozen=True)
class Staged:
    """Where activations lie in shared memory.

    rows      of activations
    given     channels that they have in memory
    channels  that the block reads, at most; from `given` on they are 0
    norm      whether they are normed: then the block has them all
    warps     of the block
    """

    rows: int
    given: int
    channels: int
    norm: bool
    warps: int

    @property
    def row_bytes(self) -> int:
        return 2 * self.channels + (64 - 2 * self.channels) % 128

    @property
    def sums(self) -> int:
        """Where the rows' sums lie."""
        return (self.rows + self.norm) * self.row_bytes

    @property
    def num_bytes(self) -> int:
        return self.sums + (4 * self.rows * self.warps if self.norm else 0)


class Inputs:
    """The activations of a block, x [rows, given] in memory, from channel `first` on."""

    def __init__(self, staged: Staged, shared: V, x: V, weight: V | None, first: V, thread: V):
        self.staged, self.shared, self.first, self.thread = staged, shared, first, thread
        self.sources = [(x, staged.rows)] + ([] if weight is None else [(weight, 1)])
        self.threads = 32 * staged.warps

    def order(self) -> None:
        """Order the copies: one group of each thread."""
        s, row = self.staged, 0
        for source, rows in self.sources:
            self._order(source, rows, self.shared + row * s.row_bytes)
            row += rows
        ptx.commit_copies()

    def _order(self, source: V, rows: int, target: V) -> None:
        s = self.staged
        pieces = s.channels // PIECE
        # Blocks begin at different channels: all would else ask one place of L2 at a time.
        turned = ptx.special("ctaid.x") * APART % pieces

        def piece(index: V, carry: list[V]) -> list[V]:
            row, column = index // pieces, (index + turned) % pieces
            channel = self.first + column * PIECE
            to = target + row * s.row_bytes + column * (2 * PIECE)
            at = source + (row * s.given + channel).to_i64() * 2
            inside = channel < s.given
            ptx.when(inside, lambda: ptx.unit_copy(to, at))
            ptx.when(channel >= s.given, lambda: ptx.store(to, [i32(0)] * 4))
            return carry

        ptx.loop(self.thread, i32(rows * pieces), [], piece, step=self.threads)

    def finish(self, pending: int, eps: float) -> None:
        """Until all threads' copies are there, and normed; `pending`: groups ordered since."""
        ptx.wait_copies(pending)
        ptx.sync_threads(i32(1), self.threads)
        if self.staged.norm:
            self._norm(eps)
            ptx.sync_threads(i32(1), self.threads)

    def at(self, row: V, channel: V) -> V:
        """Address of a row's channel."""
        return self.shared + row * self.staged.row_bytes + (channel - self.first) * 2

    def _norm(self, eps: float) -> None:
        s = self.staged
        squares = [f32(0.0)] * s.rows
        for column, inside in self._columns():
            for row in range(s.rows):
                here = f32(0.0)
                for number in _wide(self.shared + row * s.row_bytes + column):
                    here = ptx.fma(number, number, here)
                squares[row] = squares[row] + ptx.select(inside, here, 0.0)
        for distance in (16, 8, 4, 2, 1):
            squares = [x + ptx.shuffle_xor(x, distance) for x in squares]
        sums, warp = self.shared + s.sums, self.thread >> 5

        def leave() -> None:
            for row, square in enumerate(squares):
                ptx.store(sums + warp * 4 + 4 * s.warps * row, [square])

        ptx.when((self.thread & 31).equals(0), leave)
        ptx.sync_threads(i32(1), self.threads)
        factors = [self._factor(sums + 4 * s.warps * row, eps) for row in range(s.rows)]
        for column, inside in self._columns():
            weights = _wide(self.shared + s.rows * s.row_bytes + column)
            for row, factor in enumerate(factors):
                at = self.shared + row * s.row_bytes + column
                numbers = [a * factor * w for a, w in zip(_wide(at), weights, strict=True)]
                words = [ptx.pack_bf16(*numbers[i : i + 2]) for i in range(0, PIECE, 2)]
                _store_when(inside, at, words)

    def _columns(self) -> list[tuple[V, V]]:
        """Of each of the thread's pieces of a row: where it begins in the row, and whether it is
        one (those past the end repeat the last)."""
        pieces = self.staged.channels // PIECE
        indices = [self.thread + first for first in range(0, pieces, self.threads)]
        return [(ptx.minimum(x, pieces - 1) * (2 * PIECE), x < pieces) for x in indices]

    def _factor(self, sums: V, eps: float) -> V:
        """What a row is multiplied with: its warps' sums added in one order."""
        parts = [
            x for i in range(0, self.staged.warps, 4) for x in ptx.load(sums + 4 * i, 4, "f32")
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return ptx.reciprocal_sqrt(total * (1.0 / self.staged.given) + eps)


def _store_when(condition: V, where: V, words: list[V]) -> None:
    ptx.when(condition, lambda: ptx.store(where, words))


def _wide(where: V) -> list[V]:
    """8 bf16 as float32."""
    words = ptx.load(where, 4)
    return [half(word) for word in words for half in (ptx.low_bf16, ptx.high_bf16)]


def unsupported(staged: Staged, most_bytes: int) -> str | None:
    """Why activations cannot be staged in so many bytes, or None."""
    if staged.given % PIECE:
        return f"there are {staged.given} input channels; it takes multiples of {PIECE}"
    if staged.num_bytes > most_bytes:
        return f"{staged.rows} rows of {staged.channels} channels do not fit beside the weights"
    return None
