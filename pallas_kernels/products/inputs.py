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
from collections.abc import Callable, Iterator

from pallas_kernels import ptx
from pallas_kernels.ptx import V, f32, i32

PIECE = 8  # channels: 16 bytes
APART = 8  # pieces between those that neighbouring blocks begin with
AT_ONCE = 8  # pieces that a thread asks for before it waits for one


def nothing() -> None:
    """To do meanwhile."""


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
    """8 channels of a row: which of the block's, and from where on in memory."""

    row: V
    column: V
    channel: V


class Inputs:
    """The activations of a block, x [rows, given] in memory, from channel `first` on."""

    def __init__(self, staged: Staged, shared: V, x: V, first: V, thread: V):
        self.staged, self.shared, self.x, self.first = staged, shared, x, first
        self.thread, self.threads = thread, 32 * staged.warps
        self.pieces = staged.channels // PIECE
        # Blocks begin at different channels: all would else ask one place of L2 at a time.
        self.turned = ptx.special("ctaid.x") * APART % self.pieces

    def bring(self, norm: V | None, eps: float, meanwhile: Callable[[], None] = nothing) -> None:
        """Wait for the launches before, and bring them: as they are, or normed with the weights
        [given] at `norm`, which no launch writes, so that they are asked for before the wait.
        `meanwhile` is done once the first activations have been asked for."""
        if norm is None:
            ptx.wait_for_launches()
            self._stage(meanwhile)
        else:
            weights = [self._load_at(norm, piece) for piece, _ in self._columns()]
            ptx.wait_for_launches()
            self._stage_normed(weights, eps, meanwhile)

    def _stage(self, meanwhile: Callable[[], None]) -> None:
        every = self.staged.rows * self.pieces
        indices = [self.thread + i for i in range(0, every, self.threads)]
        held = [ptx.minimum(index, every - 1) for index in indices]
        pieces = [self._piece(x // self.pieces, x % self.pieces) for x in held]
        for piece, words in self._loaded(pieces, meanwhile):
            self._store(piece, words)
        ptx.sync_threads(i32(1), self.threads)

    def _stage_normed(
        self, weights: list[list[V]], eps: float, meanwhile: Callable[[], None]
    ) -> None:
        """Each thread norms what it has brought. weights: of its columns."""
        s, columns = self.staged, self._columns()
        rows = [
            [(dataclasses.replace(piece, row=i32(row)), inside) for piece, inside in columns]
            for row in range(s.rows)
        ]
        brought = self._loaded([piece for row in rows for piece, _ in row], meanwhile)
        squares = []
        for row in rows:
            square = f32(0.0)
            for (_, inside), (piece, words) in zip(row, brought, strict=False):
                added = f32(0.0)
                for number in ptx.unpack_bf16s(words):
                    added = ptx.fma(number, number, added)
                square = square + ptx.select(inside, added, 0.0)
                self._store(piece, words)
            squares.append(square)
        for distance in (16, 8, 4, 2, 1):
            squares = [x + ptx.shuffle_xor(x, distance) for x in squares]
        sums, warp = self.shared + s.sums, self.thread >> 5

        def leave() -> None:
            for row, square in enumerate(squares):
                ptx.store(sums + warp * 4 + 4 * s.warps * row, [square])

        ptx.when((self.thread & 31).equals(0), leave)
        ptx.sync_threads(i32(1), self.threads)
        for i, row in enumerate(rows):
            factor = self._factor(sums + 4 * s.warps * i, eps)
            for (piece, inside), weight in zip(row, weights, strict=True):
                x = ptx.unpack_bf16s(ptx.load(self._place(piece), 4))
                numbers = [a * factor * w for a, w in zip(x, ptx.unpack_bf16s(weight), strict=True)]
                words = ptx.pack_bf16s(numbers)
                ptx.when(inside, functools.partial(self._store, piece, words))
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

    def _loaded(
        self, pieces: list[_Piece], meanwhile: Callable[[], None]
    ) -> Iterator[tuple[_Piece, list[V]]]:
        """Each with its words, a few asked for at a time; `meanwhile` once the first are."""
        for first in range(0, len(pieces), AT_ONCE):
            here = pieces[first : first + AT_ONCE]
            loaded = [self._load(piece) for piece in here]
            if not first:
                meanwhile()
            yield from zip(here, loaded, strict=True)

    def _columns(self) -> list[tuple[_Piece, V]]:
        """The thread's pieces of a row, and whether each is one: those past the end repeat the
        last."""
        indices = [self.thread + first for first in range(0, self.pieces, self.threads)]
        held = [ptx.minimum(x, self.pieces - 1) for x in indices]
        return [
            (self._piece(i32(0), x), index < self.pieces)
            for index, x in zip(indices, held, strict=True)
        ]

    def _piece(self, row: V, index: V) -> _Piece:
        column = (index + self.turned) % self.pieces
        return _Piece(row, column, self.first + column * PIECE)

    def _load(self, piece: _Piece) -> list[V]:
        """Words of a piece of x; 0 beyond its channels."""
        given = piece.channel < self.staged.given
        return [ptx.select(given, x, 0) for x in self._load_at(self.x, piece)]

    def _load_at(self, source: V, piece: _Piece) -> list[V]:
        held = ptx.minimum(piece.channel, self.staged.given - PIECE)
        return ptx.load(source + (piece.row * self.staged.given + held).to_i64() * 2, 4)

    def _place(self, piece: _Piece) -> V:
        return self.shared + piece.row * self.staged.row_bytes + piece.column * (2 * PIECE)

    def _store(self, piece: _Piece, words: list[V]) -> None:
        ptx.store(self._place(piece), words)


def unsupported(staged: Staged, most_bytes: int) -> str | None:
    """Why activations cannot be staged in so many bytes, or None."""
    if staged.given % PIECE:
        return f"there are {staged.given} input channels; it takes multiples of {PIECE}"
    if staged.num_bytes > most_bytes:
        return f"{staged.rows} rows of {staged.channels} channels do not fit beside the weights"
    return None
