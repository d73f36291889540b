"""The header of a safetensors file, checked in full before a byte of a tensor is read.

The file is eight bytes (the header's length), the header (JSON: name → dtype, shape, offsets) and
the tensors, which cover the rest without gap or overlap.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from convert.files.tensors import FLOATS, INTS, StoredTensor, stored_bytes

_MAX_HEADER = 100 << 20


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name. Raises ValueError for a damaged file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path} is truncated or no safetensors file: its header is cut off")
        header = _parse_header(path, stream.read(length))
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_cover(path, list(tensors.values()), 8 + length, size)
    return tensors


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if _repeats(names) else []
        if twice:
            raise ValueError(f"{path} is corrupt: duplicate tensor {', '.join(twice)}")
        return dict(pairs)

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is corrupt: its header is no JSON object")
    return header


def _repeats(names: list[str]) -> bool:
    return len(set(names)) != len(names)


def _tensor(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is corrupt: bad header entry of tensor {name}") from error
    if not whole or end < begin:
        raise ValueError(f"{path} is corrupt: bad header entry of tensor {name}")
    if kind in (*FLOATS, *INTS) and end - begin != stored_bytes(kind, shape):
        raise ValueError(
            f"{path} is corrupt: tensor {name} of shape {list(shape)} and dtype {kind} has "
            f"{end - begin} bytes"
        )
    return StoredTensor(name, str(kind), shape, path, base + begin, end - begin)


def _check_cover(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """The tensors lie end to end from `start` to the end of the file."""
    position = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset != position:
            raise ValueError(f"{path} is corrupt: gap or overlap before tensor {tensor.name}")
        position += tensor.num_bytes
    if position > size:
        raise ValueError(f"{path} is truncated: {size} bytes of {position}")
    if position < size:
        raise ValueError(f"{path} is corrupt: {size - position} bytes after the last tensor")
