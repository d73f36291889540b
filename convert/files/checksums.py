"""Checksums of stored arrays, over the bytes of an array's files as they lie on the disk.

An array is a directory of Orbax's, `zarr.json` and chunks below `c`, which end with an index:

    zarr.json   { shape, type, chunks }                    frame
    c/0/0       [ numbers ................ | index, 20 B ]  numbers: data; name, size, end: frame

Its checksum is two CRC-32, of the frame and of the data. The frames, which are small, are compared
before Orbax reads: what it cannot make sense of makes it fail in many threads at once. The data is
read beside Orbax, by threads of our own, while the system holds what one of the two has fetched for
the other: nothing is read from the disk twice, and a second core does it for nothing.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

_BUFFER_BYTES = 1 << 20
_MOST_THREADS = 8
_INDEX_BYTES = 64  # or more than the index


def checksums(directory: Path) -> dict[str, str]:
    """Of each array below `directory`, by its path there; 16 hexadecimal digits."""
    arrays = sorted(path.parent for path in directory.glob("*/*/zarr.json"))
    with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
        names = [array.relative_to(directory).as_posix() for array in arrays]
        data = pool.map(_data, arrays)
        return {n: _frame(a) + d for n, a, d in zip(names, arrays, data, strict=True)}


@contextlib.contextmanager
def verified(arrays: Mapping[Path, str]) -> Iterator[None]:
    """What is done meanwhile reads these directories; their checksums are compared by then.

    Raises:
      ValueError: an array is not what was written, whatever else became of it. Names it.
    """
    for array, expected in arrays.items():
        _compare(array, _frame(array), expected[:8])
    pool = concurrent.futures.ThreadPoolExecutor(_threads())
    try:
        found = {array: pool.submit(_data, array) for array in arrays}
        yield
        for array, expected in arrays.items():
            _compare(array, found[array].result(), expected[8:])
    finally:
        pool.shutdown(cancel_futures=True)


def _compare(array: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{array.parent} is damaged: {array.name} is not what was written (its checksum "
            "differs); convert the source again"
        )


def _threads() -> int:
    return min(_MOST_THREADS, os.cpu_count() or 1)


def _chunks(array: Path) -> list[Path]:
    return sorted(path for path in (array / "c").rglob("*") if path.is_file())


def _frame(array: Path) -> str:
    total = zlib.crc32((array / "zarr.json").read_bytes())
    for path in _chunks(array):
        with path.open("rb", buffering=0) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _INDEX_BYTES))
            name = f"{path.relative_to(array).as_posix()} {size} "
            total = zlib.crc32(name.encode() + stream.read(), total)
    return f"{total:08x}"


def _data(array: Path) -> str:
    total, buffer = 0, memoryview(bytearray(_BUFFER_BYTES))
    for path in _chunks(array):
        with path.open("rb", buffering=0) as stream:
            while size := stream.readinto(buffer):
                total = zlib.crc32(buffer[:size], total)
    return f"{total:08x}"
