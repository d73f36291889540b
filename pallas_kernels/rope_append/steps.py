"""Thread-level code that every kernel has which writes heads into the buffer."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.ptx import V


def slot_of(start: V, token: V, slots: int, half: int) -> tuple[V, V]:
    """Where a pass's token goes whose first one has the position `start`, in a ring of so many
    slots; and whether it is written: a pass's rows stay in the half that it begins in."""
    begin = start % slots
    slot = begin + token
    return slot, slot < (begin // half + 1) * half


def rotated(
    first: Sequence[V], second: Sequence[V], cosines: Sequence[V], sines: Sequence[V]
) -> tuple[list[V], list[V]]:
    """Channels of a head's first half, and those of its second that they rotate with."""
    angles = list(zip(first, second, cosines, sines, strict=True))
    return [a * c - b * s for a, b, c, s in angles], [b * c + a * s for a, b, c, s in angles]
