"""Headers of safetensors files, checked in full before a byte of a tensor is read.

A file is eight bytes (the header's length), the header (JSON: name → dtype, shape, offsets) and
the tensors, which cover the rest without gap or overlap.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.files.tensors import FLOATS, INTS, StoredTensor, stored_bytes
from quantspec_jax.files import read_json

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


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files_exist(directory: Path) -> bool:
    return (directory / _SINGLE).exists() or any(directory.glob("model-*.safetensors"))


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
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    needed = {name: shard for name, shard in where.items() if not derivable(name)}
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(where.values())):
        shard = directory / name
        if Path(name).name != name or not shard.exists():
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
