"""Tensors of a source → the parameter tree: names, the check that each is used once, streaming."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from tqdm import tqdm

from convert.files.tensors import FLOATS, QUANTIZED, StoredTensor
from quantspec_jax.dtypes import BFLOAT16, FLOAT16, FLOAT32
from quantspec_jax.files import open_file
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import Spec, nest, parameter_shapes
from quantspec_jax.sharding import one_device, shardings

# Elements decoded at a time. Decoding a block of quantized rows takes a few float32 copies of it;
# transposing is fastest on few rows.
_CHUNK = 1 << 20

_HF_LAYER = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_HF_TOP = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
_HF_DERIVABLE = re.compile(
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"
)
_HF_PREFIX = "model."
_HF_PREFIXED = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")

_GGUF_LAYER = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    **{name: f"attn_{name}" for name in "qkv"},
    "o": "attn_output",
    **{name: f"ffn_{name}" for name in ("gate", "up", "down")},
}
_GGUF_TOP = {"embedding": "token_embd", "final_norm": "output_norm", "lm_head": "output"}
_GGUF_IGNORED = re.compile(r"rope_freqs\.weight")  # read with the metadata


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter and the tensor it comes from.

    `interleaved_heads`: number of heads whose rows llama.cpp stored in interleaved order, or 0.
    """

    path: str
    spec: Spec
    tensor: StoredTensor
    interleaved_heads: int = 0

    @property
    def transposed(self) -> bool:
        """Kernels are [out, in] in files, [in, out] here."""
        return self.path.endswith(".kernel")


def hf_name(path: str) -> str:
    """Dotted path of a parameter → the tensor's name in a Hugging Face checkpoint."""
    return _name(path, _HF_TOP, _HF_LAYER, "model.layers")


def gguf_name(path: str) -> str:
    """Dotted path of a parameter → the tensor's name in a GGUF file."""
    return _name(path, _GGUF_TOP, _GGUF_LAYER, "blk")


def _name(path: str, top: Mapping[str, str], layer: Mapping[str, str], layers: str) -> str:
    suffix = ".bias" if path.endswith(".bias") else ".weight"
    path = path.removesuffix(".bias").removesuffix(".kernel")
    if not path.startswith("layers."):
        return top[path] + suffix
    _, index, name = path.split(".")
    return f"{layers}.{index}.{layer[name]}{suffix}"


def derivable(config: ModelConfig) -> Callable[[str], bool]:
    """Whether the tensor of a name says nothing that the configuration and the others do not:
    RoPE's buffers, and the head of a model whose embedding is its head."""

    def holds(name: str) -> bool:
        tied_head = config.tie_embeddings and name == "lm_head.weight"
        return tied_head or _HF_DERIVABLE.fullmatch(name) is not None

    return holds


def with_prefix(tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The tensors of a base model, stored without the prefix `model.`, by their names with it."""
    if any(name.startswith(_HF_PREFIX) for name in tensors):
        return tensors
    return {
        _HF_PREFIX + name if name.startswith(_HF_PREFIXED) else name: tensor
        for name, tensor in tensors.items()
    }


def hf_parameters(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> list[Parameter]:
    """Pairs the model's parameters with the tensors of a Hugging Face checkpoint."""
    tensors = with_prefix(tensors)
    if config.tie_embeddings:
        _check_tied(tensors)
    ignored = set(filter(derivable(config), tensors))
    return _pair(config, tensors, hf_name, ignored)


def _check_tied(tensors: Mapping[str, StoredTensor]) -> None:
    """A tied checkpoint may store the embedding twice, if both are the same."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    same = (head.kind, head.shape) == (embedding.kind, embedding.shape)
    with open_file(embedding.file) as one, open_file(head.file) as other:
        one.seek(embedding.offset)
        other.seek(head.offset)
        left = embedding.num_bytes if same else 0
        while left and same:
            count = min(left, 1 << 24)
            same = one.read(count) == other.read(count)
            left -= count
    if not same:
        raise ValueError(
            f"{head.file}: tie_word_embeddings is true, but tensor lm_head.weight differs from "
            "model.embed_tokens.weight"
        )


def gguf_parameters(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> list[Parameter]:
    """Pairs the model's parameters with the tensors of a GGUF file."""
    ignored = {name for name in tensors if _GGUF_IGNORED.fullmatch(name)}
    parameters = _pair(config, tensors, gguf_name, ignored)
    if config.family != "llama":
        return parameters
    heads = {"q": config.num_heads, "k": config.num_kv_heads}

    def interleaved(parameter: Parameter) -> Parameter:
        name = parameter.path.split(".")[-2:][0]  # "q" of layers.0.q.kernel
        return dataclasses.replace(parameter, interleaved_heads=heads.get(name, 0))

    return [interleaved(parameter) for parameter in parameters]


def _pair(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    name_of: Callable[[str], str],
    ignored: set[str],
) -> list[Parameter]:
    """Every parameter has its tensor, of its shape, and every tensor its parameter; or ValueError.

    Names are one to one, so each tensor is used exactly once.
    """
    if config.num_layers > len(tensors):  # a damaged number would make for millions of names
        raise ValueError(
            f"tensors do not fit the model: {len(tensors)} tensors for {config.num_layers} layers"
        )
    specs = {name_of(path): (path, spec) for path, spec in parameter_shapes(config).items()}
    problems = []
    if missing := [name for name in specs if name not in tensors]:
        problems.append(f"missing {_listed(missing)}")
    if unknown := [name for name in tensors if name not in specs and name not in ignored]:
        problems.append(f"unknown {_listed(unknown)}")
    parameters = []
    for name, (path, spec) in specs.items():
        if name not in tensors:
            continue
        shape = spec.shape[::-1] if path.endswith(".kernel") else spec.shape
        if tensors[name].kind not in (*FLOATS, *QUANTIZED):
            problems.append(f"{name} has dtype {tensors[name].kind} (allowed: {', '.join(FLOATS)})")
        elif tensors[name].shape != shape:
            problems.append(
                f"misshapen {name} {list(tensors[name].shape)} (expected {list(shape)})"
            )
        parameters.append(Parameter(path, spec, tensors[name]))
    if problems:
        raise ValueError(f"tensors do not fit the model: {_listed(problems, 4, '; ')}")
    return parameters


def _listed(items: list[str], most: int = 5, separator: str = ", ") -> str:
    rest = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + rest


def load_parameters(
    parameters: Iterable[Parameter],
    dtype: np.dtype,
    *,
    device: jax.Device | Mesh | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Streams each tensor to the device: the nested tree of `parameter_shapes`, in `dtype`.

    On the host there is never more than one tensor that is not yet part of the result; on a mesh,
    of that what its devices hold.
    """
    parameters = list(parameters)
    mesh = one_device(device)
    shapes = {p.path: jax.ShapeDtypeStruct(p.spec.shape, dtype) for p in parameters}
    where = shardings(shapes, {p.path: p.spec.axes for p in parameters}, mesh)
    flat = {}
    with contextlib.ExitStack() as stack:
        files = _Files(stack)
        bar = tqdm(
            total=sum(p.tensor.num_bytes for p in parameters),
            desc="reading",
            unit="B",
            unit_scale=True,
            disable=not progress,
        )
        stack.enter_context(bar)
        for parameter in parameters:
            flat[parameter.path] = _placed(
                parameter, files[parameter.tensor.file], dtype, where[parameter.path]
            )
            bar.update(parameter.tensor.num_bytes)
    return nest(flat)


def load_parameter(
    parameters: Iterable[Parameter], path: str, dtype: np.dtype, device: jax.Device
) -> jax.Array:
    """The one of this path."""
    (parameter,) = (p for p in parameters if p.path == path)
    with open_file(parameter.tensor.file) as stream:
        return _placed(parameter, stream, dtype, SingleDeviceSharding(device))


def _placed(parameter: Parameter, stream: BinaryIO, dtype: np.dtype, where: Sharding) -> jax.Array:
    """One parameter where it is to lie: of one that is split, each device's part is read by itself,
    and what lies with several devices once."""
    if isinstance(where, NamedSharding):
        parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            sizes = zip(index or (), parameter.spec.shape, strict=True)
            key = tuple(one.indices(size)[:2] for one, size in sizes)
            if key not in parts:
                parts[key] = read_parameter(parameter, stream, dtype, key)
            return parts[key]

        return jax.make_array_from_callback(parameter.spec.shape, where, part).block_until_ready()
    # On the CPU the array takes over the aligned buffer; elsewhere wait until it is copied.
    array = jax.device_put(read_parameter(parameter, stream, dtype), where)
    (there,) = array.devices()
    if there.platform != "cpu":
        array.block_until_ready()
    return array


class _Files(dict[Path, BinaryIO]):
    """Open files by path, closed with the stack."""

    def __init__(self, stack: contextlib.ExitStack):
        self._stack = stack

    def __missing__(self, path: Path) -> BinaryIO:
        self[path] = self._stack.enter_context(open_file(path))
        return self[path]


def read_parameter(
    parameter: Parameter,
    stream: BinaryIO,
    dtype: np.dtype,
    part: tuple[tuple[int, int], ...] | None = None,
) -> np.ndarray:
    """One parameter as an array of its spec's shape, or of a part of it from (begin, end) of each
    dimension; decoded chunk by chunk."""
    tensor = parameter.tensor
    rows, columns = tensor.matrix_shape
    heads, is_vector = parameter.interleaved_heads, len(tensor.shape) == 1
    part = part or tuple((0, size) for size in parameter.spec.shape)
    array = _aligned_empty(tuple(end - begin for begin, end in part), dtype)
    target = array.reshape(1, -1) if is_vector else array.T if parameter.transposed else array
    of_rows, of_columns = ((0, 1), *part)[-2:] if is_vector else part
    if parameter.transposed and not is_vector:
        of_rows, of_columns = of_columns, of_rows
    begin, end = of_rows
    step = max(1, _CHUNK // columns)
    if heads and not is_vector:
        head_rows = rows // heads
        step = max(step // head_rows, 1) * head_rows  # whole heads
        begin -= begin % head_rows
    for start in range(begin, end, step):
        stop = min(start + step, rows)
        if not heads:
            stop = min(stop, end)
        chunk = tensor.read_rows(stream, start, stop)
        if heads and is_vector:
            chunk = deinterleave(chunk.reshape(-1, 1), heads).reshape(1, -1)
        elif heads:
            chunk = deinterleave(chunk, (stop - start) // head_rows)
        first, last = max(start, of_rows[0]), min(stop, end)
        found = chunk[first - start : last - start, slice(*of_columns)]
        target[first - of_rows[0] : last - of_rows[0]] = _cast(found, dtype, tensor)
    return array


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows (2i, 2i+1) of a head; here i goes with i + D/2."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _cast(chunk: np.ndarray, dtype: np.dtype, tensor: StoredTensor) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = chunk.astype(dtype, copy=False)
    if not _all_below(cast):
        what = "a NaN or infinite value"
        if _all_below(chunk):
            what = f"a value too large for {dtype.name}"
        elif np.isfinite(chunk).all():
            largest = np.abs(chunk.astype(np.float32)).max()
            what = f"a value of {largest:.3g}; allowed: less than {_MOST:g}, as of all models"
        raise ValueError(f"{tensor.file}: tensor {tensor.name} has {what}")
    return cast


# Beyond the range of float16. Damage makes numbers of all sizes; with such ones a product of a few
# weights overflows, and logits are NaN.
_MOST = 2.0**20


def _all_below(values: np.ndarray) -> bool:
    """Whether all are finite and below `_MOST`: integer work, several times faster than isfinite in
    bf16. In float16 what is finite is below."""
    unsigned, most = {
        FLOAT32: (np.uint32, (127 + 20) << 23),
        FLOAT16: (np.uint16, 0x7C00),
        BFLOAT16: (np.uint16, (127 + 20) << 7),
    }[values.dtype]
    magnitude = unsigned((1 << (8 * values.dtype.itemsize - 1)) - 1)
    bits = np.ascontiguousarray(values).view(unsigned) & magnitude
    return bits.size == 0 or int(bits.max()) < most


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised, on a 64-byte boundary: jax takes such a buffer over on the CPU, uncopied."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)
