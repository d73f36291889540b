"""Tiles of prompts that were read, kept for prompts that begin alike.

A tile depends on the tokens up to its end alone (`generate.tiles`). So it is kept under a name made
of these, a hash over the hash of the tiles before it and its own tokens, in the host's memory, once
for all requests that share it. Where the memory is wanted, the tile that was used least recently
goes; the tiles before one are used after it, so that ends go before beginnings.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

HostTile = Mapping[str, np.ndarray]


def names(tokens: Sequence[int], group_size: int) -> Iterator[bytes]:
    """The names of the whole tiles of a sequence of tokens."""
    name = b""
    for start in range(0, len(tokens) - group_size + 1, group_size):
        own = np.asarray(tokens[start : start + group_size], "<i4").tobytes()
        name = hashlib.sha256(name + own).digest()
        yield name


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

    def find(self, tokens: Sequence[int], group_size: int, most: int) -> list[HostTile]:
        """The tiles, `most` at most, that the sequence begins with."""
        found = []
        for name in list(names(tokens[: most * group_size], group_size)):
            if name not in self._kept:
                break
            found.append(name)
        for name in reversed(found):
            self._kept.move_to_end(name)
        return [self._kept[name] for name in found]

    def count(self, kept: int, read: int) -> None:
        """Of a prompt: tokens that were kept, and that are read."""
        self.hits += kept
        self.misses += read

    def keep(self, tokens: Sequence[int], group_size: int, tile: HostTile) -> None:
        """Keep the last tile of a sequence of whole tiles, unless it is too large."""
        every = list(names(tokens, group_size))
        size = sum(x.nbytes for x in tile.values())
        if size > self.most_bytes or every[-1] in self._kept:
            return
        self._kept[every[-1]] = tile
        for name in reversed(every):  # those before it are used after it
            if name in self._kept:
                self._kept.move_to_end(name)
        self.bytes += size
        while self.bytes > self.most_bytes:
            _, gone = self._kept.popitem(last=False)
            self.bytes -= sum(x.nbytes for x in gone.values())
