"""The converted checkpoint on disk, written and read.

config.json        format, versions, the ModelConfig, the weights' dtype, the draft's config,
                   a checksum for each array
weights/           Orbax: the tree of `parameter_shapes`
draft/             Orbax, where a draft is stored: its own entries of the tree, which are quantized
                   kernels and sometimes other arrays; the header lists these
kv/                Orbax, where a codec of the cache is stored: what it has learned, by layer
tokenizer.json …   the tokenizer, and generation_config.json where the source has one
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import gc
import importlib.metadata
import io
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from convert.files.checksums import verified
from convert.files.deferred import SourceError, registry
from pallas_kernels.layout import LAYOUT_VERSION, QuantizedWeight
from quantspec_jax.checks import is_int, require, within
from quantspec_jax.dtypes import STORED, float_type
from quantspec_jax.files import check_regular, read_json
from quantspec_jax.interrupts import held
from quantspec_jax.methods import stored
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import flatten, linear_layers, nest, parameter_shapes
from quantspec_jax.notices import notice
from quantspec_jax.settings import Settings
from quantspec_jax.sharding import one_device, parameter_axes, shardings
from quantspec_jax.stored_kv import StoredKV
from quantspec_jax.weights.entries import quantize_params
from quantspec_jax.weights.formats import DraftConfig

FORMAT = "quantspec"
VERSION = 1

# Arrays are cut into chunks of this size on disk, so that none is held twice in memory.
_CHUNK_BYTES = 64 << 20
_MOST_BYTES = 1 << 50  # of a file
_WAIT_SECONDS, _MOST_WAITS = 0.5, 40

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Header:
    """What config.json says. `draft_arrays`: shape and dtype of each array of the draft's tree that
    is not a quantized kernel, by path. `checksums`: `convert.files.checksums` of the directory;
    none in one of an earlier version."""

    config: ModelConfig
    dtype: np.dtype
    draft: DraftConfig | None = None
    draft_arrays: Mapping[str, tuple[tuple[int, ...], str]] = dataclasses.field(
        default_factory=dict
    )
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kv: StoredKV | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. `model_type` and `transformers_version` let transformers' AutoTokenizer
        open the directory."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "layout_version": LAYOUT_VERSION,
            "model_type": self.config.family,
            "transformers_version": importlib.metadata.version("transformers"),
            "dtype": self.dtype.name,
            "draft": self.draft.to_dict() if self.draft else None,
            "draft_arrays": dict(self.draft_arrays),
            "model": self.config.to_dict(),
            "checksums": dict(self.checksums),
            "kv": self.kv.to_dict() if self.kv else None,
        }


def parse_header(values: dict[str, Any], where: Path) -> Header:
    """Inverse of `Header.to_dict`; ValueError for a damaged file or another version."""
    version = values.get("version")
    require(is_int(version) and version == VERSION, f"version in {where}", version, "1")
    keys = Settings(values, where.name)
    with within(f"{where} is damaged"):
        config = ModelConfig.from_dict(keys.entries("model"))
        stored_draft = keys.entries("draft", None)
        draft = None if stored_draft is None else DraftConfig.from_dict(stored_draft)
        dtype = float_type(keys.choice("dtype", _NAMES), allowed=STORED)
        arrays = _parse_draft_arrays(Settings(keys.entries("draft_arrays", {}), where.name), config)
        if draft is not None:
            _check_draft(draft, config)
        given = Settings(keys.entries("checksums", {}), where.name)
        sums = {path: given.text(path) for path in given.values}
        stored_kv = keys.entries("kv", None)
        kv = None if stored_kv is None else StoredKV.from_dict(stored_kv)
    if draft is not None:
        layout = keys.get("layout_version", None)
        require(
            is_int(layout) and layout == LAYOUT_VERSION,
            f"layout_version in {where}",
            layout,
            f"{LAYOUT_VERSION} (the stored draft has another packing: convert the source again)",
        )
    return Header(config, dtype, draft, arrays, sums, kv)


_NAMES = tuple(dtype.name for dtype in STORED)


def _check_draft(draft: DraftConfig, config: ModelConfig) -> None:
    """Its layers are the model's."""
    unknown = sorted({name for name, _ in draft.formats} - set(linear_layers(config)))
    require(not unknown, "draft formats", unknown, "linear layers of the model's blocks")


def _parse_draft_arrays(
    keys: Settings, config: ModelConfig
) -> dict[str, tuple[tuple[int, ...], str]]:
    """A draft's arrays beside its kernels are the model's own, scaled, and orders of channels."""
    shapes = {path: spec.shape for path, spec in parameter_shapes(config).items()}
    allowed = {path: shape for path, shape in shapes.items() if not path.endswith(".kernel")}
    orders = {f"{layer}.order": shapes[f"{layer}.kernel"][:1] for layer in linear_layers(config)}
    arrays = {}
    for path in keys.values:
        given = keys.get(path)
        pair = isinstance(given, list | tuple) and len(given) == 2
        keys.require(path, pair, given, "a shape and a type")
        shape, kind = given
        expected = orders.get(path, allowed.get(path))
        keys.require(path, expected is not None, given, "norms, biases and orders of the model")
        fits = isinstance(shape, list | tuple) and tuple(shape) == expected
        keys.require(path, fits, shape, str(list(expected or ())))
        kinds = ("int32",) if path in orders else _NAMES
        keys.require(path, isinstance(kind, str) and kind in kinds, kind, ", ".join(kinds))
        arrays[path] = (tuple(shape), kind)
    return arrays


def check_layer_count(directory: Path, config: ModelConfig) -> None:
    """A layer has arrays: names are not made for more layers than there are arrays."""
    weights = directory / "weights"
    arrays = sum(1 for _ in weights.iterdir()) if weights.is_dir() else 0
    most = f"at most {arrays}, the entries of {weights}"
    require(config.num_layers <= arrays, f"num_layers in {directory}", config.num_layers, most)


def save_tree(directory: Path, tree: dict[str, Any]) -> None:
    """Writes one Orbax checkpoint of arrays and `Deferred` ones, which are made in turn."""
    import orbax.checkpoint as ocp

    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    stop = threading.Event()

    def write() -> None:
        with _checkpointer(tree, stop) as checkpointer:
            checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=save_args))

    def save() -> None:
        _quietly(write)

    # Ctrl-C must not strike inside Orbax, whose writers would go on without it: it strikes here,
    # and taking their files away ends them.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            with held():  # not between the beginning and its name
                saved = pool.submit(save)
            saved.result()
        except SourceError as error:
            raise error.__cause__ or error from None
        except KeyboardInterrupt:
            stop.set()
            with contextlib.redirect_stderr(io.StringIO()):
                _take_away(directory, saved)
            raise


def _take_away(directory: Path, saved: concurrent.futures.Future[None]) -> None:
    """Remove what is written until nobody writes. One array's error ends the save, while others'
    files may still be on their way in TensorStore, which makes directories that are missing: so
    the last of it has been gone for half a second."""
    gone = 0
    while gone < 5:
        found = list(directory.parent.glob(f"{directory.name}*"))
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        gone = gone + 1 if saved.done() and not found else 0
        time.sleep(0.1)


def _restore_tree(directory: Path, tree: dict[str, Any], sums: Mapping[str, str]) -> dict[str, Any]:
    """Reads one Orbax checkpoint, or a part of it, into the shapes, dtypes and shardings of
    `tree`."""
    import orbax.checkpoint as ocp

    _check_files(directory, tree)
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)

    def read() -> dict[str, Any]:
        with _checkpointer(tree) as checkpointer:
            return checkpointer.restore(
                directory,
                args=ocp.args.PyTreeRestore(
                    item=tree, restore_args=restore_args, partial_restore=True
                ),
            )

    with verified(_expected(directory, tree, sums)):
        try:
            return _quietly(read)
        except OrbaxError as error:
            where = re.search(rf"{re.escape(str(directory))}/([\w.]+)", str(error))
            reason = f"{where[1]}: " if where else ""
            reason += (str(error).strip() or "unreadable").splitlines()[0]
            raise ValueError(
                f"{directory} is damaged: {reason[:200]}; convert the source again"
            ) from error


def _expected(directory: Path, tree: dict[str, Any], sums: Mapping[str, str]) -> dict[Path, str]:
    """Checksums of the arrays of `tree`, by their directories; none where none were stored."""
    if not sums:
        return {}
    return {directory / path: sums.get(f"{directory.name}/{path}", "") for path in flatten(tree)}


def _check_files(directory: Path, tree: dict[str, Any]) -> None:
    """Each array is there, of its shape, and its files, uncompressed, are as large as they must be.

    Orbax would find out too, but in the middle of reading.
    """
    check_regular((path for path in directory.rglob("*") if not path.is_dir()), _MOST_BYTES)
    for path, leaf in flatten(tree).items():
        try:
            stored = read_json(directory / path / "zarr.json")
            shape, item_bytes = tuple(stored["shape"]), jnp.dtype(stored["data_type"]).itemsize
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{directory} is damaged: {path} is missing; convert the source again"
            ) from error
        files = [f for f in (directory / path / "c").rglob("*") if f.is_file()]
        complete = sum(f.stat().st_size for f in files) >= leaf.size * item_bytes
        if shape != leaf.shape or not complete:
            what = f"has shape {list(shape)}" if shape != leaf.shape else "is cut off"
            raise ValueError(f"{directory} is damaged: {path} {what}; convert the source again")


def _checkpointer(tree: dict[str, Any], stop: threading.Event | None = None) -> Any:
    """zarr3 without OCDBT or compression, few bytes in flight: nothing is held twice. `stop`: of
    `deferred.registry`."""
    import orbax.checkpoint as ocp

    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    # Orbax refuses an array of more bytes than may be in flight.
    gigabytes = 1 + largest // 10**9
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,
            use_zarr3=True,
            use_compression=False,
            save_concurrent_gb=gigabytes,
            restore_concurrent_gb=gigabytes,
            type_handler_registry=registry(stop or threading.Event()),
        )
    )


class OrbaxError(Exception):
    """What an exception of Orbax's said."""


def _quietly(work: Callable[[], Result]) -> Result:
    """Does something with Orbax, without its warnings about its own internals.

    When one array fails, Orbax leaves the others' operations running without their event loop, and
    each prints a traceback as it ends, or as the exception goes that holds it: let go of it here,
    wait for them, and let the one error speak.

    Raises:
      OrbaxError: in place of any exception of Orbax's.
      SourceError: a deferred array could not be made.
    """
    with contextlib.ExitStack() as stack:
        for name in ("absl", "asyncio"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            try:
                result, said = work(), None
            except SourceError:
                raise
            except Exception as error:  # Orbax raises plain Exception, too
                result, said = None, str(error) or repr(error)
            if said is not None:
                _wait_for_silence(printed)
    if said is not None:
        raise OrbaxError(said)
    sys.stderr.write(printed.getvalue())  # of others, meanwhile
    return cast(Result, result)


def _wait_for_silence(printed: io.StringIO) -> None:
    """Until nothing was printed for a while."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        before = -1
        for _ in range(_MOST_WAITS):
            if before == (before := printed.tell()):
                break
            gc.collect()
            time.sleep(_WAIT_SECONDS)
    finally:
        sys.unraisablehook = hook
    if not isinstance(sys.unraisablehook, _WithoutOrbax):
        sys.unraisablehook = _WithoutOrbax(sys.unraisablehook)


class _WithoutOrbax:
    """A hook that prints nothing of exceptions which Orbax's coroutines are left with: one that
    ends later than was waited for would speak in the middle of something else."""

    def __init__(self, hook: Callable[[Any], None]):
        self.hook = hook

    def __call__(self, unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if "orbax" not in Path(getattr(code, "co_filename", "")).parts:
            self.hook(unraisable)


def check_weights(directory: Path, header: Header) -> None:
    """Raises ValueError where a parameter's array is missing or not whole."""
    _check_files(directory / "weights", _weight_shapes(header.config, header.dtype))


def load_weights(
    directory: Path,
    config: ModelConfig,
    dtype: np.dtype,
    device: jax.Device | Mesh | None,
    sums: Mapping[str, str],
) -> dict[str, Any]:
    """The parameters in `dtype`; `sums`: `Header.checksums`."""
    if not sums:
        notice(
            f"{directory} has no checksums, as earlier versions wrote it: damage may go unnoticed "
            "(convert again to have them)"
        )
    shapes = _on(device, config, _weight_shapes(config, dtype))
    return _restore_tree(directory / "weights", shapes, sums)


def load_some(
    directory: Path, header: Header, paths: Sequence[str], dtype: np.dtype, device: jax.Device
) -> dict[str, jax.Array]:
    """The parameters of these paths, in `dtype`."""
    shapes = parameter_shapes(header.config)
    where = jax.sharding.SingleDeviceSharding(device)
    tree = {p: jax.ShapeDtypeStruct(shapes[p].shape, dtype, sharding=where) for p in paths}
    return flatten(_restore_tree(directory / "weights", nest(tree), header.checksums))


def _weight_shapes(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    shapes = parameter_shapes(config)
    return nest({path: jax.ShapeDtypeStruct(s.shape, dtype) for path, s in shapes.items()})


def _on(
    device: jax.Device | Mesh | None, config: ModelConfig, shapes: dict[str, Any]
) -> dict[str, Any]:
    where = shardings(shapes, parameter_axes(config, shapes), one_device(device))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, where
    )


def save_kv(directory: Path, arrays: dict[str, Any]) -> None:
    """Writes what a codec of the cache has learned (`quantspec_jax.methods.stored`)."""
    save_tree(directory / "kv", arrays)


def load_kv(directory: Path, header: Header) -> list[Any]:
    """What the stored codec has learned, a layer after the other."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        stored.shapes(header.config),
    )
    arrays = _restore_tree(directory / "kv", tree, header.checksums)
    return stored.from_arrays(arrays, header.config)


def save_draft(directory: Path, tree: dict[str, Any]) -> None:
    """Writes a draft's own entries of the tree: `QuantizedWeight`s and arrays."""
    save_tree(directory / "draft", _as_dicts(tree))


def plain_arrays(tree: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """`Header.draft_arrays` of a draft's own entries."""
    return {
        path: (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in flatten(tree).items()
        if not isinstance(leaf, QuantizedWeight)
    }


def load_draft(
    directory: Path, header: Header, device: jax.Device | Mesh | None = None
) -> dict[str, Any]:
    """The stored draft, as `save_draft` was given it; each device of a mesh reads its part."""
    draft = header.draft
    assert draft is not None
    shapes = flatten(
        jax.eval_shape(
            lambda params: quantize_params(params, draft),
            _weight_shapes(header.config, header.dtype),
        )
    )
    for path, (shape, dtype) in header.draft_arrays.items():
        shapes[path] = jax.ShapeDtypeStruct(shape, dtype)
    there = _as_dicts(_on(device, header.config, nest(shapes)))
    flat = flatten(_restore_tree(directory / "draft", there, header.checksums))
    return nest({path: _restored(flat, path, leaf) for path, leaf in shapes.items()})


def _restored(flat: dict[str, Any], path: str, leaf: Any) -> Any:
    """An array, or the QuantizedWeight of the arrays below `path`."""
    if not isinstance(leaf, QuantizedWeight):
        return flat[path]
    packed, scale = flat[f"{path}.packed"], flat[f"{path}.scale"]
    return QuantizedWeight(packed, scale, flat.get(f"{path}.minimum"))


def _as_dicts(tree: dict[str, Any]) -> dict[str, Any]:
    """Each QuantizedWeight as {packed, scale, minimum}, or without minimum where it is None."""
    flat: dict[str, Any] = {}
    for path, leaf in flatten(tree).items():
        parts = leaf._asdict() if isinstance(leaf, QuantizedWeight) else {}
        flat |= {f"{path}.{name}": array for name, array in parts.items() if array is not None}
        if not parts:
            flat[path] = leaf
    return nest(flat)
