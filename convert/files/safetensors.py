"""Headers of safetensors files, checked in full before a byte of a tensor is read.

A file is eight bytes (the header's length), the header (JSON: name → dtype, shape, offsets) and
the tensors, which cover the rest without gap or overlap.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.files.tensors import FLOATS, INTS, StoredTensor, stored_bytes
from quantspec_jax.checks import is_int, within
from quantspec_jax.files import exists, open_file, read_json
from quantspec_jax.settings import Settings

_MAX_HEADER = 100 << 20
_MOST_DIMENSIONS = 8


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name. Raises ValueError for a damaged file."""
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
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
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"{path} is corrupt: duplicate tensor {name}")
            values[name] = value
        return values

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(f"{path} is corrupt: its header is nested too deep") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is corrupt: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is corrupt: its header is no JSON object")
    return header


def _tensor(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    keys = Settings(entry if isinstance(entry, dict) else {}, f"{path}: tensor {name}")
    with within(f"{path} is corrupt: bad header entry of tensor {name}"):
        kind, shape = keys.text("dtype"), keys.get("shape")
        keys.require("shape", _are_counts(shape, _MOST_DIMENSIONS), shape, "a few dimensions")
        offsets = keys.get("data_offsets")
        ordered = _are_counts(offsets, 2) and len(offsets) == 2 and offsets[0] <= offsets[1]
        keys.require("data_offsets", ordered, offsets, "[begin, end]")
    begin, end = offsets
    if kind in (*FLOATS, *INTS) and end - begin != stored_bytes(kind, tuple(shape)):
        raise ValueError(
            f"{path} is corrupt: tensor {name} of shape {list(shape)} and dtype {kind} has "
            f"{end - begin} bytes"
        )
    return StoredTensor(name, kind, tuple(shape), path, base + begin, end - begin)


def _are_counts(values: Any, most: int) -> bool:
    """A list of at most so many whole numbers that a file can have bytes."""
    few = isinstance(values, list) and len(values) <= most
    return few and all(is_int(n) and 0 <= n < 1 << 63 for n in values)


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


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files_exist(directory: Path) -> bool:
    return exists(directory / _SINGLE) or any(directory.glob("model-*.safetensors"))


def read_directory(directory: Path, derivable: Callable[[str], bool]) -> dict[str, StoredTensor]:
    """The tensors of a directory by name, from one file or from the shards its index names.

    `derivable`: whether a tensor's name says that nobody needs it; on such ones index and shards
    need not agree.
    """
    if (directory / _SINGLE).exists():
        return read_safetensors(directory / _SINGLE)
    if not (directory / _INDEX).exists():
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        hint = f"; {', '.join(others[:3])}: pickled weights are not read" if others else ""
        raise ValueError(f"{directory} has neither {_SINGLE} nor {_INDEX}{hint}")
    return _read_shards(directory, derivable)


def _read_shards(directory: Path, derivable: Callable[[str], bool]) -> dict[str, StoredTensor]:
    index = directory / _INDEX
    where = Settings(read_json(index), str(index)).entries("weight_map")
    if not all(isinstance(f, str) for f in where.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    needed = {name: shard for name, shard in where.items() if not derivable(name)}
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(where.values())):
        shard = directory / name
        if Path(name).name != name or not exists(shard):
            if Path(name).name == name and name not in needed.values():
                continue
            raise ValueError(f"{index} names {name}, which does not exist beside it")
        for tensor in read_safetensors(shard).values():
            if derivable(tensor.name):
                tensors.setdefault(tensor.name, tensor)
                continue
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise ValueError(f"duplicate tensor {tensor.name}: in {other} and {name}")
            if where.get(tensor.name) != name:
                raise ValueError(f"{shard} holds {tensor.name}, which {index.name} does not place")
            tensors[tensor.name] = tensor
    missing = sorted(set(needed) - set(tensors))
    if missing:
        raise ValueError(f"missing tensor {missing[0]}: {where[missing[0]]} does not hold it")
    return tensors
