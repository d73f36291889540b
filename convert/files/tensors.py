"""A tensor in a file: where it lies, and how its rows are read as floats."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from quantspec_jax.files import open_file

FLOATS: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

INTS: dict[str, np.dtype] = {"I32": np.dtype("<i4")}  # of packed weights, never of a parameter

# Elements a block, bytes a block.
QUANTIZED: dict[str, tuple[int, int]] = {
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of 1 or 2 dimensions in a file.

    `kind` is a key of FLOATS, INTS or QUANTIZED (another one is never read), `shape` has the
    slowest dimension first, `offset` counts bytes from the start of the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns); a vector is one row."""
        return (self.shape[0], self.shape[1]) if len(self.shape) == 2 else (1, self.shape[0])

    def read_rows(self, stream: BinaryIO, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the matrix in the file's own float type; quantized as float32."""
        data = self.read_bytes(stream, start, stop)
        return data.view(FLOATS[self.kind]) if self.kind in FLOATS else dequantize(data, self.kind)

    def read_bytes(self, stream: BinaryIO, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the matrix as they lie in the file: uint8 [rows, bytes a row].

        Reads, rather than maps, the file: mapped pages would count as resident memory.
        """
        row_bytes = self.num_bytes // self.matrix_shape[0]
        stream.seek(self.offset + start * row_bytes)
        data = stream.read((stop - start) * row_bytes)
        if len(data) != (stop - start) * row_bytes:
            raise ValueError(f"{self.file} is truncated: tensor {self.name} ends past its end")
        return np.frombuffer(data, np.uint8).reshape(stop - start, row_bytes)

    def read(self) -> np.ndarray:
        """The whole tensor of a float or integer type, in its shape and type."""
        with open_file(self.file) as stream:
            data = self.read_bytes(stream, 0, self.matrix_shape[0])
        return data.view({**FLOATS, **INTS}[self.kind]).reshape(self.shape)


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor in a file; None where rows are no whole number of blocks."""
    elements = math.prod(shape)
    plain = {**FLOATS, **INTS}.get(kind)
    if plain is not None:
        return elements * plain.itemsize
    block, block_bytes = QUANTIZED[kind]
    return elements // block * block_bytes if shape[-1] % block == 0 else None


def dequantize(blocks: np.ndarray, kind: str) -> np.ndarray:
    """uint8 [rows, bytes a row] → float32 [rows, columns]."""
    from gguf import GGMLQuantizationType, quants

    # A corrupt scale overflows; that is found, and named, where the values are checked.
    with np.errstate(all="ignore"):
        return quants.dequantize(blocks, GGMLQuantizationType[kind])
