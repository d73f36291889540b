"""What a model can be loaded from: `open_source` and the checkpoints it returns."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from convert.files import converted, hub
from convert.files.deferred import Deferred
from convert.files.gguf import GgufFile, read_gguf
from convert.files.safetensors import read_directory, weight_files_exist
from convert.files.tensors import FLOATS
from convert.gguf_config import parse_gguf_config
from convert.hf_config import parse_hf_config
from convert.weights import (
    Parameter,
    derivable,
    gguf_parameters,
    hf_parameters,
    load_parameter,
    load_parameters,
)
from quantspec_jax.checks import require, within
from quantspec_jax.dtypes import BFLOAT16, FLOAT32, STORED, float_type
from quantspec_jax.files import exists, open_file, read_json
from quantspec_jax.models.config import ModelConfig, RopeScaling
from quantspec_jax.models.parameters import (
    InTurn,
    Spec,
    nest,
    parameter_count,
    parameter_shapes,
)
from quantspec_jax.stored_kv import StoredKV
from quantspec_jax.text.tokenizer import gguf_tokenizer, pretrained_tokenizer, saved_tokenizer
from quantspec_jax.weights.formats import DraftConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES = (
    ".gguf",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".json",
    ".txt",
    ".msgpack",
    ".h5",
)


class Checkpoint(ABC):
    """A model at rest. Opening one reads its configuration and file headers, no weights.

    Attributes:
      source: what was given to `open_source`.
      config: the model's.
    """

    def __init__(self, source: str, config: ModelConfig):
        self.source = source
        self.config = config

    @property
    def parameter_count(self) -> int:
        """Elements of all parameters; a tied embedding counts once."""
        return parameter_count(self.config)

    @property
    def draft_config(self) -> DraftConfig | None:
        """Of the draft stored with a converted checkpoint."""
        return None

    @property
    @abstractmethod
    def source_dtype(self) -> np.dtype:
        """The float type that `convert` keeps."""

    @property
    def storage(self) -> str:
        """How the weights are stored, for people: the source's own types."""
        return self.source_dtype.name

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        """A transformers tokenizer with its chat template; None where the source has none."""
        return self._load_tokenizer()

    @abstractmethod
    def _load_tokenizer(self) -> Any | None: ...

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError where the tensors do not fit the configuration, by their headers."""

    def load(
        self, dtype: DTypeLike, *, device: Any = None, progress: bool = False
    ) -> dict[str, Any]:
        """The parameters in `dtype`: the nested tree of `parameter_shapes`, jax arrays."""
        return self._load(float_type(dtype, allowed=STORED), device, progress)

    @abstractmethod
    def _load(self, dtype: np.dtype, device: Any, progress: bool) -> dict[str, Any]: ...

    def read(self, path: str, dtype: np.dtype) -> jax.Array:
        """One parameter (`layers.3.down.kernel`), on the host's CPU."""
        return self._read(path, dtype, jax.local_devices(backend="cpu")[0])

    @abstractmethod
    def _read(self, path: str, dtype: np.dtype, device: jax.Device) -> jax.Array: ...

    def read_below(self, prefix: str, dtype: np.dtype) -> Any:
        """The node of the tree at a path, such as `layers.3` or `embedding`: its parameters, on the
        host's CPU."""
        paths = [p for p in parameter_shapes(self.config) if f"{p}.".startswith(f"{prefix}.")]
        node = nest(self._read_several(paths, dtype))
        for name in prefix.split("."):
            node = node[name]
        return node

    def _read_several(self, paths: list[str], dtype: np.dtype) -> dict[str, jax.Array]:
        return {path: self.read(path, dtype) for path in paths}

    def load_draft(self, device: Any = None) -> tuple[DraftConfig, dict[str, Any]] | None:
        """The stored draft: its configuration and, in the same tree, its quantized kernels; on a
        device, or a mesh whose devices read their parts."""
        return None

    def load_kv(self) -> tuple[StoredKV, list[Any]] | None:
        """The stored codec of the cache, and what it has learned of each layer."""
        return None


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint's weights, in one float type, on their way to the disk: read when they are
    asked for, and not held.

    progress  a bar on standard error
    """

    checkpoint: Checkpoint
    dtype: np.dtype
    progress: bool = False

    @property
    def shapes(self) -> dict[str, Any]:
        """The tree, of shapes."""
        specs = parameter_shapes(self.checkpoint.config)
        return nest(
            {path: jax.ShapeDtypeStruct(spec.shape, self.dtype) for path, spec in specs.items()}
        )

    def kernel(self, layer: str) -> jax.Array:
        """Of a linear layer, or of lm_head, tied or not."""
        if layer == "lm_head" and self.checkpoint.config.tie_embeddings:
            return self.checkpoint.read("embedding", self.dtype).T
        return self.checkpoint.read(f"{layer}.kernel", self.dtype)

    def by_block(self, placed: Callable[[jax.Array], jax.Array] = lambda x: x) -> InTurn:
        """The tree, each block and each array outside of them `placed` when it is asked for. The
        last two blocks are kept, as a walk through the model asks for one and its neighbour."""
        config = self.checkpoint.config

        def node(prefix: str) -> Any:
            return jax.tree.map(placed, self.checkpoint.read_below(prefix, self.dtype))

        block = functools.lru_cache(2)(lambda i: node(f"layers.{i}"))
        blocks = {str(i): functools.partial(block, i) for i in range(config.num_layers)}
        outside = {path.split(".")[0] for path in parameter_shapes(config)} - {"layers"}
        made = {name: functools.partial(node, name) for name in outside}
        return InTurn({**made, "layers": lambda: InTurn(blocks)})

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[dict[str, Any]]:
        """The tree, each array read when it is written."""
        specs = parameter_shapes(self.checkpoint.config)
        total = sum(spec.size for spec in specs.values()) * self.dtype.itemsize
        with tqdm(
            total=total, desc="reading", unit="B", unit_scale=True, disable=not self.progress
        ) as bar:

            def deferred(path: str, spec: Spec) -> Deferred:
                def make() -> jax.Array:
                    array = self.checkpoint.read(path, self.dtype)
                    bar.update(array.nbytes)
                    return array

                return Deferred(spec.shape, self.dtype, make)

            yield nest({path: deferred(path, spec) for path, spec in specs.items()})


class HuggingFaceCheckpoint(Checkpoint):
    """A directory with config.json and safetensors, single or sharded.

    `fetch` brings the weights into the directory where it does not hold them yet.
    """

    def __init__(self, source: str, directory: Path, fetch: Callable[[], Path] | None = None):
        self.directory = directory
        self._fetch = fetch
        values = self._values = read_json(directory / "config.json")
        generation = directory / "generation_config.json"
        stated: Any = values.get("dtype") or values.get("torch_dtype")
        self._stated_dtype = next((d for d in STORED if stated == d.name), FLOAT32)
        super().__init__(
            source,
            parse_hf_config(
                values,
                read_json(generation) if generation.exists() else None,
                where=str(directory / "config.json"),
            ),
        )

    @property
    def source_dtype(self) -> np.dtype:
        """The type of most elements; the stated one while the weights are not downloaded."""
        if self._fetch and not weight_files_exist(self.directory):
            return self._stated_dtype
        elements: collections.Counter[np.dtype] = collections.Counter()
        for parameter in self._parameters:
            elements[FLOATS[parameter.tensor.kind]] += parameter.spec.size
        return elements.most_common(1)[0][0]

    @functools.cached_property
    def _parameters(self) -> list[Parameter]:
        directory = self._fetch() if self._fetch else self.directory
        with within(directory):
            return hf_parameters(self.config, read_directory(directory, derivable(self.config)))

    def check(self) -> None:
        _ = self._parameters

    def _load(self, dtype: np.dtype, device: Any, progress: bool) -> dict[str, Any]:
        return load_parameters(self._parameters, dtype, device=device, progress=progress)

    def _read(self, path: str, dtype: np.dtype, device: jax.Device) -> jax.Array:
        return load_parameter(self._parameters, path, dtype, device)

    def _load_tokenizer(self) -> Any | None:
        return pretrained_tokenizer(self.directory, self._values)


class GgufCheckpoint(Checkpoint):
    """One GGUF file."""

    def __init__(self, source: str, path: Path):
        self._file: GgufFile = read_gguf(path)
        super().__init__(source, parse_gguf_config(self._file))

    @property
    def source_dtype(self) -> np.dtype:
        return BFLOAT16

    @property
    def storage(self) -> str:
        """Tensor types by their share of the elements, the largest first."""
        elements: collections.Counter[str] = collections.Counter()
        for parameter in self._parameters:
            elements[parameter.tensor.kind] += parameter.spec.size
        return ", ".join(kind for kind, _ in elements.most_common())

    @functools.cached_property
    def _parameters(self) -> list[Parameter]:
        with within(self._file.path):
            return gguf_parameters(self.config, self._file.tensors)

    def check(self) -> None:
        _ = self._parameters

    def _load(self, dtype: np.dtype, device: Any, progress: bool) -> dict[str, Any]:
        return load_parameters(self._parameters, dtype, device=device, progress=progress)

    def _read(self, path: str, dtype: np.dtype, device: jax.Device) -> jax.Array:
        return load_parameter(self._parameters, path, dtype, device)

    def _load_tokenizer(self) -> Any | None:
        return gguf_tokenizer(self._file.metadata, str(self._file.path))


class ConvertedCheckpoint(Checkpoint):
    """A directory that `convert` wrote."""

    def __init__(self, source: str, directory: Path, values: dict[str, Any]):
        self.directory = directory
        self._header = converted.parse_header(values, directory / "config.json")
        converted.check_layer_count(directory, self._header.config)
        super().__init__(source, self._header.config)

    @property
    def draft_config(self) -> DraftConfig | None:
        return self._header.draft

    @property
    def source_dtype(self) -> np.dtype:
        return self._header.dtype

    def check(self) -> None:
        converted.check_weights(self.directory, self._header)

    def _load(self, dtype: np.dtype, device: Any, progress: bool) -> dict[str, Any]:
        sums = self._header.checksums
        return converted.load_weights(self.directory, self.config, dtype, device, sums)

    def _read(self, path: str, dtype: np.dtype, device: jax.Device) -> jax.Array:
        return converted.load_some(self.directory, self._header, [path], dtype, device)[path]

    def _read_several(self, paths: list[str], dtype: np.dtype) -> dict[str, jax.Array]:
        cpu = jax.local_devices(backend="cpu")[0]
        return converted.load_some(self.directory, self._header, paths, dtype, cpu)

    def load_draft(self, device: Any = None) -> tuple[DraftConfig, dict[str, Any]] | None:
        if self._header.draft is None:
            return None
        return self._header.draft, converted.load_draft(self.directory, self._header, device)

    def load_kv(self) -> tuple[StoredKV, list[Any]] | None:
        if self._header.kv is None:
            return None
        return self._header.kv, converted.load_kv(self.directory, self._header)

    def _load_tokenizer(self) -> Any | None:
        return saved_tokenizer(self.directory)


def open_source(source: str | Path, rope: RopeScaling | None = None) -> Checkpoint:
    """A converted checkpoint, a Hugging Face directory, a .gguf file or a hub id → Checkpoint.

    `rope`: a RoPE scaling in place of the source's; None: the source's.

    What exists on disk is opened there. A hub id is `owner/name`; whatever looks like a path, and
    does not exist, is an error and is not looked for on the hub. Raises ValueError for a source
    that is missing, damaged or not supported.
    """
    checkpoint = _open(str(source))
    checkpoint.config = checkpoint.config.scaled(rope)
    return checkpoint


def _open(source: str) -> Checkpoint:
    require(bool(source.strip()), "source", source, "a path or a hub id")
    path = user_path(source, "source")
    if exists(path):
        return _open_directory(source, path) if path.is_dir() else _open_file(source, path)
    if not looks_like_hub_id(source):
        raise ValueError(
            f"source is {source!r}, which does not exist; allowed: a converted checkpoint, a "
            "Hugging Face directory, a .gguf file, or a hub id (owner/name)"
        )
    directory = hub.fetch_small_files(source)
    return HuggingFaceCheckpoint(source, directory, lambda: hub.fetch_weights(source))


def user_path(source: str, argument: str) -> Path:
    """A path that may begin with ~."""
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{argument} is {source!r}: {error}") from error


def looks_like_hub_id(source: str) -> bool:
    """`owner/name`, unless it is a file's name or `owner` is a directory here."""
    return (
        _HUB_ID.fullmatch(source) is not None
        and not source.lower().endswith(_FILE_SUFFIXES)
        and ".." not in source
        and not _is_directory(Path(source).parent)
    )


def _is_directory(path: Path) -> bool:
    return exists(path) and path.is_dir()


def _open_directory(source: str, path: Path) -> Checkpoint:
    config = path / "config.json"
    if not config.exists():
        found = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; it holds {', '.join(found)}: name the file" if found else ""
        raise ValueError(f"source is {source!r}, a directory without config.json{hint}")
    values = read_json(config)
    if values.get("format") == converted.FORMAT:
        return ConvertedCheckpoint(source, path, values)
    return HuggingFaceCheckpoint(source, path)


def _open_file(source: str, path: Path) -> Checkpoint:
    with open_file(path) as stream:
        is_gguf = stream.read(4) == b"GGUF"
    if is_gguf or path.suffix.lower() == ".gguf":
        return GgufCheckpoint(source, path)
    raise ValueError(
        f"source is {source!r}, a file that is not GGUF; allowed files: .gguf (for safetensors "
        "name the directory)"
    )
