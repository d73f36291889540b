"""A block's activations in shared memory, for products that do not wait for them one by one.

Every block has all rows and the channels that it multiplies with; with a norm it has all channels,
and computes the norm by itself, which takes less than a launch:

    row        channels, 2 bytes each                 | unused: rows begin 64 bytes apart, so that
    0 … R − 1  x, in the end its norm                 | the lanes of two rows read all banks
    sums       Σ x² of each row, of each warp
"""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels import ptx
from pallas_kernels.ptx import V, f32, i32

PIECE = 8  # channels: 16 bytes
APART = 8  # pieces between those that neighbouring blocks begin with
AT_ONCE = 8  # pieces that a thread has asked for before it waits for one


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
        return self.rows * self.row_bytes

    @property
    def num_bytes(self) -> int:
        return self.sums + (4 * self.rows * self.warps if self.norm else 0)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A thread's: which 8 channels of the block's, from `channel` on in memory, and whether it is
    one (those past the end repeat the last)."""

    row: V
    column: V
    channel: V
    inside: V


class Inputs:
    """The activations of a block, x [rows, given] in memory, from channel `first` on."""

    def __init__(self, staged: Staged, shared: V, x: V, first: V, thread: V):
        self.staged, self.shared, self.x, self.first = staged, shared, x, first
        self.thread, self.threads = thread, 32 * staged.warps
        self.pieces = staged.channels // PIECE
        # Blocks begin at different channels: all would else ask one place of L2 at a time.
        self.turned = ptx.special("ctaid.x") * APART % self.pieces

    def stage(self) -> None:
        """Bring them, as they are."""
        every = self.staged.rows * self.pieces

        def batch(start: V, carry: list[V]) -> list[V]:
            indices = [start + self.threads * i for i in range(min(AT_ONCE, turns))]
            held = [ptx.minimum(index, every - 1) for index in indices]
            pieces = [self._piece(x // self.pieces, x % self.pieces) for x in held]
            for piece, words in [(piece, self._load(piece)) for piece in pieces]:
                self._store(piece, words)
            return carry

        turns = -(-every // self.threads)
        ptx.loop(self.thread, i32(every), [], batch, step=self.threads * min(AT_ONCE, turns))
        ptx.sync_threads(i32(1), self.threads)

    def weights(self, weight: V) -> list[list[V]]:
        """Of the norm, [given], for each of the thread's columns: no launch writes them, so they
        may be asked for early."""
        return [self._load_at(weight, i32(0), piece.channel) for piece in self._columns()]

    def stage_normed(self, weights: list[list[V]], eps: float) -> None:
        """Bring them, and norm them: each thread what it has brought."""
        s, columns = self.staged, self._columns()
        rows = [[dataclasses.replace(c, row=i32(row)) for c in columns] for row in range(s.rows)]
        squares, most = [], max(1, AT_ONCE // len(columns))
        for first in range(0, s.rows, most):
            here = rows[first : first + most]
            for pieces, loaded in [(row, [self._load(piece) for piece in row]) for row in here]:
                square = f32(0.0)
                for piece, words in zip(pieces, loaded, strict=True):
                    added = f32(0.0)
                    for number in _floats(words):
                        added = ptx.fma(number, number, added)
                    square = square + ptx.select(piece.inside, added, 0.0)
                    ptx.when(piece.inside, functools.partial(self._store, piece, words))
                squares.append(square)
        for distance in (16, 8, 4, 2, 1):
            squares = [x + ptx.shuffle_xor(x, distance) for x in squares]
        sums, warp = self.shared + s.sums, self.thread >> 5

        def leave() -> None:
            for row, square in enumerate(squares):
                ptx.store(sums + warp * 4 + 4 * s.warps * row, [square])

        ptx.when((self.thread & 31).equals(0), leave)
        ptx.sync_threads(i32(1), self.threads)
        for row, pieces in enumerate(rows):
            factor = self._factor(sums + 4 * s.warps * row, eps)
            for piece, weight in zip(pieces, weights, strict=True):
                x = _floats(ptx.load(self._place(piece), 4))
                numbers = [a * factor * w for a, w in zip(x, _floats(weight), strict=True)]
                words = [ptx.pack_bf16(*numbers[i : i + 2]) for i in range(0, PIECE, 2)]
                ptx.when(piece.inside, functools.partial(self._store, piece, words))
        ptx.sync_threads(i32(1), self.threads)

    def at(self, row: V, channel: V) -> V:
        """Address of a row's channel."""
        return self.shared + row * self.staged.row_bytes + (channel - self.first) * 2

    def _factor(self, sums: V, eps: float) -> V:
        """What a row is multiplied with: its warps' sums added in one order."""
        parts = [
            x for i in range(0, self.staged.warps, 4) for x in ptx.load(sums + 4 * i, 4, "f32")
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return ptx.reciprocal_sqrt(total * (1.0 / self.staged.given) + eps)

    def _columns(self) -> list[_Piece]:
        """The thread's pieces of a row."""
        indices = [self.thread + first for first in range(0, self.pieces, self.threads)]
        held = [ptx.minimum(x, self.pieces - 1) for x in indices]
        return [
            dataclasses.replace(self._piece(i32(0), x), inside=index < self.pieces)
            for index, x in zip(indices, held, strict=True)
        ]

    def _piece(self, row: V, index: V) -> _Piece:
        column = (index + self.turned) % self.pieces
        channel = self.first + column * PIECE
        return _Piece(row, column, channel, channel < self.staged.given)

    def _load(self, piece: _Piece) -> list[V]:
        """Words of a piece of x; 0 beyond its channels."""
        given = piece.channel < self.staged.given
        held = ptx.minimum(piece.channel, self.staged.given - PIECE)
        return [ptx.select(given, x, 0) for x in self._load_at(self.x, piece.row, held)]

    def _load_at(self, source: V, row: V, channel: V) -> list[V]:
        held = ptx.minimum(channel, self.staged.given - PIECE)
        return ptx.load(source + (row * self.staged.given + held).to_i64() * 2, 4)

    def _place(self, piece: _Piece) -> V:
        return self.shared + piece.row * self.staged.row_bytes + piece.column * (2 * PIECE)

    def _store(self, piece: _Piece, words: list[V]) -> None:
        ptx.store(self._place(piece), words)


def _floats(words: list[V]) -> list[V]:
    """8 bf16 as float32."""
    return [half(word) for word in words for half in (ptx.low_bf16, ptx.high_bf16)]


def unsupported(staged: Staged, most_bytes: int) -> str | None:
    """Why activations cannot be staged in so many bytes, or None."""
    if staged.given % PIECE:
        return f"there are {staged.given} input channels; it takes multiples of {PIECE}"
    if staged.num_bytes > most_bytes:
        return f"{staged.rows} rows of {staged.channels} channels do not fit beside the weights"
    return None
