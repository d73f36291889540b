"""Mailboxes: memory of a device that the others of its group write into, as kernels read it.

A mailbox, of words of 32 bits, zeros in the beginning:

    counts   [MOST_BLOCKS]                               of the block's meetings
    numbers  [2, MOST_BLOCKS, devices, THREADS, PLACES]  and a mark beside each (`ptx.packets`)

A block's mark is how many meetings it has had a part in. Places are taken in turn, two of each
block: a device writes its part of one meeting after it has seen all parts of the one before, which
the others wrote when they had done with the one before that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pallas_kernels.ptx.packets import NUMBER_BYTES

THREADS = 128
PLACES = 6  # numbers that a thread may send
MOST_BLOCKS = 256
COUNT_BYTES = 4 * MOST_BLOCKS
PLACE_BYTES = NUMBER_BYTES * PLACES


def words(devices: int) -> int:
    """Of each device's mailbox."""
    return (COUNT_BYTES + 2 * MOST_BLOCKS * devices * THREADS * PLACE_BYTES) // 4


def addresses(rank: int, mailboxes: Sequence[int]) -> np.ndarray:
    """What the kernels of device `rank` of a group are told: [2 + 2 D] uint32, from where the
    mailbox of each of its D devices lies. 8 bytes each: the rank, and the addresses."""
    return np.array([rank, *mailboxes], np.uint64).view(np.uint32)
