"""Mailboxes: memory of a device that the others of its group write into, as kernels read it.

A mailbox, of words of 32 bits, zeros in the beginning:

    counts   [MOST_BLOCKS]                             of the block's meetings
    numbers  [2, MOST_BLOCKS, devices, SLOTS, PLACES]  and a mark beside each (`ptx.packets`)

A block's mark is how many meetings it has had a part in. Its slots are taken in turn, two of each:
a device writes its part of one meeting after it has seen all parts of the one before, which the
others wrote when they had done with the one before that.

Blocks wait for their counterparts on other devices, so that all blocks of a launch have to run at
once (`possible`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pallas_kernels.ptx.packets import NUMBER_BYTES

MOST_BLOCKS = 512
SLOTS = 256  # of a block
PLACES = 6  # numbers of a slot
COUNT_BYTES = 4 * MOST_BLOCKS
SLOT_BYTES = NUMBER_BYTES * PLACES


def words(devices: int) -> int:
    """Of each device's mailbox."""
    return (COUNT_BYTES + 2 * MOST_BLOCKS * devices * SLOTS * SLOT_BYTES) // 4


def addresses(rank: int, mailboxes: Sequence[int]) -> np.ndarray:
    """What the kernels of device `rank` of a group are told: [2 + 2 D] uint32, from where the
    mailbox of each of its D devices lies. 8 bytes each: the rank, and the addresses from its own
    on, those before it in the end."""
    return np.array([rank, *mailboxes[rank:], *mailboxes[:rank]], np.uint64).view(np.uint32)


def devices_of(words: int) -> int:
    """How many devices a table of so many words has addresses of."""
    return words // 2 - 1


def possible(blocks: int, cluster: int, slots: int, at_once: int) -> bool:
    """Whether the blocks of a launch, in clusters of so many, can meet others.

    Args:
      slots: that a block takes.
      at_once: how many blocks a device runs; of clusters, where multiprocessors are left over,
        three quarters at least.
    """
    at_once = at_once if cluster == 1 else at_once * 3 // 4
    return blocks <= min(MOST_BLOCKS, at_once) and slots <= SLOTS
