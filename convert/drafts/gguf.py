"""Blocks of GGUF files as a draft's weights.

Q4_0   32 inputs: scale
Q4_1   32 inputs: scale and minimum
Q4_K   256 inputs, eight groups of 32, whose scales and minima have 6 bits
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from convert.drafts.codes import MORE_BITS, Codes, QuantizedCheckpoint, check_finite
from convert.files.gguf import read_gguf
from convert.gguf_config import parse_gguf_config
from convert.weights import Parameter, deinterleave, gguf_parameters
from quantspec_jax.checks import within
from quantspec_jax.files import open_file
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import linear_layers
from quantspec_jax.weights.formats import WeightFormat


class GgufBlocks(QuantizedCheckpoint):
    """A GGUF file with tensors of 4-bit blocks."""

    def __init__(self, source: str, path: Path, config: ModelConfig):
        file = read_gguf(path)
        own = parse_gguf_config(file)
        super().__init__(source, config, own)
        with within(path):
            self._parameters = {p.path: p for p in gguf_parameters(own, file.tensors)}
        kinds = {self._parameters[f"{layer}.kernel"].tensor.kind for layer in linear_layers(config)}
        if not kinds & set(_BLOCKS):
            raise ValueError(
                f"draft_from is {source!r}, whose blocks are {', '.join(sorted(kinds))}; "
                f"allowed: {', '.join(_BLOCKS)} in some layers"
            )

    def format_of(self, layer: str) -> WeightFormat:
        kind = self._parameters[f"{layer}.kernel"].tensor.kind
        return WeightFormat(4, 32, kind == "Q4_0") if kind in _BLOCKS else MORE_BITS

    def read(self, layer: str) -> Codes | None:
        parameter = self._parameters[f"{layer}.kernel"]
        tensor = parameter.tensor
        if tensor.kind not in _BLOCKS:
            return None
        codes, scale, minimum = _BLOCKS[tensor.kind](_rows(parameter))
        check_finite(tensor, *(x for x in (scale, minimum) if x is not None))
        n = len(codes)
        return Codes(
            codes.reshape(n, -1).T,
            scale.reshape(n, -1).T,
            None if minimum is None else minimum.reshape(n, -1).T,
            32,
        )


def _rows(parameter: Parameter) -> np.ndarray:
    """uint8 [N, bytes a row], the rows of q and k in the order of the parameter tree."""
    tensor = parameter.tensor
    with open_file(tensor.file) as stream:
        rows = tensor.read_bytes(stream, 0, tensor.shape[0])
    heads = parameter.interleaved_heads
    return deinterleave(rows, heads) if heads else rows


Blocks = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes [N, .., 32], scale, minimum


def _q4_0(rows: np.ndarray) -> Blocks:
    """fp16 scale, 16 bytes: a byte has inputs i and i + 16."""
    blocks = rows.reshape(len(rows), -1, 18)
    return _nibbles(blocks[..., 2:]), _half(blocks[..., :2]), None


def _q4_1(rows: np.ndarray) -> Blocks:
    """fp16 scale and minimum, 16 bytes as in Q4_0."""
    blocks = rows.reshape(len(rows), -1, 20)
    return _nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _q4_k(rows: np.ndarray) -> Blocks:
    """fp16 scale and minimum of the 6-bit scales s and minima m; these, of eight groups; the codes:
    32 bytes have groups 2i and 2i + 1.

    12 bytes of s and m: bytes 0–3 the low 6 bits s of groups 0–3, 4–7 their m, 8–11 the low 4 bits
    of s (low nibble) and of m (high) of groups 4–7, whose upper 2 bits lie above the first 6.
    """
    blocks = rows.reshape(len(rows), -1, 144)
    first_s, first_m, low = np.split(blocks[..., 4:16], 3, -1)
    s = np.concatenate([first_s & 63, low & 15 | (first_s >> 6) << 4], -1)
    m = np.concatenate([first_m & 63, low >> 4 | (first_m >> 6) << 4], -1)
    codes = _nibbles(blocks[..., 16:].reshape(len(rows), -1, 4, 32))
    return codes, _half(blocks[..., :2]) * s, -_half(blocks[..., 2:4]) * m


_BLOCKS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Low nibbles of the last axis, then high ones."""
    return np.concatenate([data & 15, data >> 4], -1)


def _half(data: np.ndarray) -> np.ndarray:
    """Two bytes on the last axis → float32 [..., 1]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)
