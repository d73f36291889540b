"""The header of a GGUF file (metadata and the list of tensors), every read checked for bounds.

    magic "GGUF", version u32, tensor count u64, metadata count u64
    metadata   key (string), type u32, value          string: length u64, UTF-8 bytes
    tensors    name, dimension count u32, dimensions u64 (fastest first), type u32, offset u64
    padding to `general.alignment`, then the data, to whose start the offsets refer

The gguf package's reader makes an object of each metadata element and believes every count, so a
damaged file sends it looping; and it takes seconds on a large vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert.files.tensors import FLOATS, QUANTIZED, StoredTensor, stored_bytes
from quantspec_jax.checks import is_int, require
from quantspec_jax.files import exists, open_file
from quantspec_jax.settings import Settings

_STRING, _ARRAY, _BOOL = 8, 9, 7
_MOST_ELEMENTS = 1 << 22  # of a vocabulary or a list of merges
_MOST_PARTS = 99_999  # five digits in a name
_MOST_ALIGNMENT = 1 << 20
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """Metadata by key (scalars, strings, lists) and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Cursor:
    """A position in the mapped file; reading past the end is an error that names the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ValueError(f"{self.path} is truncated or corrupt: its header runs past the end")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("<Q")).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is corrupt: a string is not UTF-8 ({error})") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ValueError(f"{self.path} is corrupt: metadata type {kind} does not exist")
        return self.scalars(kind, 1)[0]

    def array(self) -> list[Any]:
        kind, count = self.number("<I"), self.number("<Q")
        self.check_count(count)
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"{self.path} is corrupt: an array has element type {kind}")
        return self.scalars(kind, count)

    def check_count(self, count: int) -> None:
        """A damaged count must not send a reader through gigabytes of weights."""
        if count > _MOST_ELEMENTS:
            raise ValueError(f"{self.path} is corrupt: it claims a list of {count} elements")

    def scalars(self, kind: int, count: int) -> list[Any]:
        form = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(count * form.itemsize), form).tolist()
        return [bool(v) for v in values] if kind == _BOOL else values


def read_gguf(path: Path) -> GgufFile:
    """Reads the header, no tensor; of a file in several parts, the headers of all.

    Raises ValueError for a damaged or unsupported file.
    """
    first = _read_header(path)
    keys = Settings(first.metadata, str(path))
    count = keys.integer("split.count", 1, least=0, most=_MOST_PARTS)
    return _read_parts(first, count) if count > 1 else first


def _read_parts(first: GgufFile, count: int) -> GgufFile:
    """All parts' tensors under the first part's metadata. Parts are named as llama.cpp names them:
    `name-00001-of-00003.gguf`."""
    path, tensors = first.path, dict(first.tensors)
    names = _part_names(path, count)
    if path.name != names[0] or first.metadata.get("split.no", 0) != 0:
        raise ValueError(
            f"{path} is part of a split GGUF (split.count = {count}): name its first part, "
            f"{names[0]}"
        )
    for number, name in enumerate(names[1:], start=1):
        part = path.with_name(name)
        if not exists(part):
            raise ValueError(f"{path} is one of {count} parts, and {name} does not exist beside it")
        read = _read_header(part)
        for key, expected in (("split.no", number), ("split.count", count)):
            value = read.metadata.get(key)
            require(value == expected, f"{key} in {part}", value, f"{expected}, as in its name")
        if twice := sorted(set(tensors) & set(read.tensors)):
            raise ValueError(f"{part} is corrupt: tensor {twice[0]} is in another part, too")
        tensors |= read.tensors
    total = first.metadata.get("split.tensors.count", len(tensors))
    require(total == len(tensors), f"split.tensors.count in {path}", total, str(len(tensors)))
    return GgufFile(path, first.metadata, tensors)


def _part_names(path: Path, count: int) -> list[str]:
    found = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", path.name)
    stem = found[1] if found else path.name.removesuffix(".gguf")
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _read_header(path: Path) -> GgufFile:
    """Of one file."""
    with open_file(path) as stream, _mapped(path, stream) as data:
        cursor = _Cursor(path, data)
        if cursor.take(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF")
        version = cursor.number("<I")
        if version not in (2, 3):
            raise ValueError(f"{path} has GGUF version {version}; allowed: 2, 3 (little-endian)")
        num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
        for count in (num_tensors, num_keys):
            cursor.check_count(count)
        metadata = _read_metadata(cursor, num_keys)
        alignment = metadata.get("general.alignment", 32)
        tensors = _read_tensors(cursor, num_tensors, alignment, len(data))
    return GgufFile(path, metadata, tensors)


def _mapped(path: Path, stream: BinaryIO) -> mmap.mmap:
    size = os.fstat(stream.fileno()).st_size
    if size < 24:
        raise ValueError(f"{path} is truncated: {size} bytes are no GGUF file")
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"{cursor.path} is corrupt: duplicate metadata key {key}")
        metadata[key] = cursor.value(cursor.number("<I"))
    return metadata


def _read_tensors(
    cursor: _Cursor, count: int, alignment: Any, size: int
) -> dict[str, StoredTensor]:
    path = cursor.path
    power = is_int(alignment) and 1 <= alignment <= _MOST_ALIGNMENT
    power = power and alignment & (alignment - 1) == 0
    require(power, f"general.alignment in {path}, which is corrupt,", alignment, "a power of 2")
    entries = []
    for _ in range(count):
        name, dimensions = cursor.string(), cursor.number("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{path} is corrupt: tensor {name} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))[::-1]
        entries.append((name, shape, cursor.number("<I"), cursor.number("<Q")))
    base = _aligned(cursor.position, alignment)
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"{path} is corrupt: duplicate tensor {name}")
        if offset % alignment:
            raise ValueError(f"{path} is corrupt: tensor {name} is not aligned")
        tensors[name] = _tensor(path, name, shape, kind, base + offset)
    end = _check_extents(path, list(tensors.values()), base, alignment)
    if end > size and tensors:
        raise ValueError(f"{path} is truncated: {size} bytes of {end}")
    if size > _aligned(end, alignment):
        raise ValueError(f"{path} is corrupt: {size - end} bytes after the last tensor")
    return tensors


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


@functools.cache
def _kinds() -> dict[int, str]:
    """Names of the types of tensors by number."""
    from gguf import GGMLQuantizationType

    return {member.value: member.name for member in GGMLQuantizationType}


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, start: int) -> StoredTensor:
    kind_name = _kinds().get(kind, f"number {kind}")
    if kind_name not in FLOATS and kind_name not in QUANTIZED:
        allowed = ", ".join([*FLOATS, *QUANTIZED])
        raise ValueError(f"{path}: tensor {name} has type {kind_name}; allowed: {allowed}")
    num_bytes = stored_bytes(kind_name, shape)
    if num_bytes is None or num_bytes == 0:
        raise ValueError(
            f"{path} is corrupt: tensor {name} of type {kind_name} has shape {list(shape)}"
        )
    return StoredTensor(name, kind_name, shape, path, start, num_bytes)


def _check_extents(path: Path, tensors: list[StoredTensor], base: int, alignment: int) -> int:
    """The tensors lie one after another from `base` on, with nothing between them but what aligns
    the next. Returns where the last one ends."""
    end = base
    for tensor in sorted(tensors, key=lambda t: t.offset):
        start = _aligned(end, alignment)
        if tensor.offset < start:
            raise ValueError(f"{path} is corrupt: tensor {tensor.name} overlaps another")
        if tensor.offset > start:
            gap = f"{tensor.offset - start} bytes before tensor {tensor.name} belong to none"
            raise ValueError(f"{path} is corrupt: {gap}")
        end = tensor.offset + tensor.num_bytes
    return end
