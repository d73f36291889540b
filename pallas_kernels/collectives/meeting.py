"""A block's meeting with its counterparts on the other devices of a group, inside a kernel."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels import ptx
from pallas_kernels.collectives.mailboxes import COUNT_BYTES, MOST_BLOCKS, SLOT_BYTES, SLOTS
from pallas_kernels.ptx import V, i32


class Meeting:
    """What a thread needs to send and receive; it is asked for when this is made, after the
    launches before have ended. Between that and `leave` all threads of the block meet once."""

    def __init__(self, table: V, devices: int):
        """table: address of `mailboxes.addresses`, of so many devices."""
        self.devices, self.rank = devices, ptx.load(table)[0]
        self.boxes = [ptx.load_address(table + 8 * (i + 1)) for i in range(devices)]
        block = ptx.special("ctaid.x")
        self.count = self.boxes[0] + (block * 4).to_i64()
        self.mark = ptx.load(self.count)[0] + 1
        self.first = ((self.mark & 1) * MOST_BLOCKS + block) * devices

    def send(self, slot: V, numbers: Sequence[V]) -> None:
        """To all devices, this one too. An even number of floats."""
        at = self._place(self.rank, slot)
        for box in [*self.boxes[1:], self.boxes[0]]:
            ptx.send(box + at, numbers, self.mark)

    def received(self, slot: V, count: int) -> list[list[V]]:
        """So many numbers of each device, in one order everywhere, once they are there."""
        places = [self._place(i32(device), slot) for device in range(self.devices)]
        return [ptx.receive(self.boxes[0] + at, self.mark, count) for at in places]

    def leave(self, thread: V) -> None:
        """What comes next is another meeting."""
        ptx.when(thread.equals(0), lambda: ptx.store(self.count, [self.mark]))

    def _place(self, device: V, slot: V) -> V:
        return (((self.first + device) * SLOTS + slot) * SLOT_BYTES + COUNT_BYTES).to_i64()


def total(parts: Sequence[Sequence[V]]) -> list[V]:
    """The sum of what devices have sent, in their order."""
    first, *others = parts
    out = list(first)
    for other in others:
        out = [a + b for a, b in zip(out, other, strict=True)]
    return out
