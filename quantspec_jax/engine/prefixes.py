"""Tiles of prompts that were read, kept for prompts that begin alike.

A tile depends on the tokens up to its end alone (`generate.tiles`). So it is kept under a name made
of these, a hash over the hash of the tiles before it and its own tokens, in the host's memory, once
for all requests that share it. Where the memory is wanted, the tile that was used least recently
goes; the tiles before one are used after it, so that ends go before beginnings.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

HostTile = Mapping[str, np.ndarray]


def names(tokens: Sequence[int], group_size: int) -> list[bytes]:
    """The names of the whole tiles of a sequence of tokens."""
    found, name, every = [], b"", np.asarray(tokens, "<i4")
    for start in range(0, len(tokens) - group_size + 1, group_size):
        name = hashlib.sha256(name + every[start : start + group_size].tobytes()).digest()
        found.append(name)
    return found


class Prefixes:
    """Tiles of one model and one form of its cache.

    Args:
      most_bytes: of all tiles together.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes, self.bytes = most_bytes, 0
        self.hits = self.misses = 0  # tokens that were kept, and that were read
        self._kept: collections.OrderedDict[bytes, HostTile] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, names: Sequence[bytes]) -> list[HostTile]:
        """Of the tiles of a sequence the first ones, up to one that is not there."""
        found = list(itertools.takewhile(self._kept.__contains__, names))
        for name in reversed(found):
            self._kept.move_to_end(name)
        return [self._kept[name] for name in found]

    def count(self, kept: int, read: int) -> None:
        """Of a prompt: tokens that were kept, and that are read."""
        self.hits += kept
        self.misses += read

    def keep(self, names: Sequence[bytes], tile: HostTile) -> None:
        """Keep a tile, the last one that is named after those before it, unless it is too large or
        the one before it has gone: nobody would find it."""
        *before, own = names
        size = sum(x.nbytes for x in tile.values())
        alone = bool(before) and before[-1] not in self._kept
        if size > self.most_bytes or alone or own in self._kept:
            return
        self._kept[own] = tile
        for name in reversed(names):  # those before it are used after it
            if name in self._kept:
                self._kept.move_to_end(name)
        self.bytes += size
        while self.bytes > self.most_bytes:
            _, gone = self._kept.popitem(last=False)
            self.bytes -= sum(x.nbytes for x in gone.values())
