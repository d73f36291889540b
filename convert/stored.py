"""The converted checkpoint on disk, written and read.

config.json        format, versions, the ModelConfig, the weights' dtype, the draft's config
weights/           Orbax: the tree of `parameter_shapes`
draft/             Orbax, where a draft is stored: its quantized kernels, in the same tree
tokenizer.json …   the tokenizer, and generation_config.json where the source has one
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from convert.weights import DTYPES
from pallas_kernels.layout import LAYOUT_VERSION, QuantizedWeight
from quantspec_jax.config import DraftConfig, ModelConfig, require
from quantspec_jax.models.parameters import flatten, nest, parameter_shapes

FORMAT = "quantspec"
VERSION = 1

# Arrays are cut into chunks of this size on disk, so that none is held twice in memory.
_CHUNK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Header:
    """What config.json says. `draft_kernels`: dotted paths of the quantized kernels."""

    config: ModelConfig
    dtype: str
    draft: DraftConfig | None = None
    draft_kernels: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. `model_type` and `transformers_version` let transformers' AutoTokenizer
        open the directory."""
        draft = None
        if self.draft is not None:
            draft = {**dataclasses.asdict(self.draft), "kernels": list(self.draft_kernels)}
        return {
            "format": FORMAT,
            "version": VERSION,
            "layout_version": LAYOUT_VERSION,
            "model_type": self.config.family,
            "transformers_version": importlib.metadata.version("transformers"),
            "dtype": self.dtype,
            "draft": draft,
            "model": self.config.to_dict(),
        }


def parse_header(values: dict[str, Any], where: Path) -> Header:
    """Inverse of `Header.to_dict`; ValueError for a damaged file or another version."""
    require(values.get("version") == VERSION, f"version in {where}", values.get("version"), "1")
    try:
        config = ModelConfig.from_dict(values["model"])
        dtype = values["dtype"]
        stored_draft = values["draft"]
        draft, kernels = None, ()
        if stored_draft is not None:
            fields = {field.name for field in dataclasses.fields(DraftConfig)}
            draft = DraftConfig(**{k: v for k, v in stored_draft.items() if k in fields})
            kernels = tuple(stored_draft["kernels"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is damaged: {type(error).__name__} {error}") from error
    require(dtype in DTYPES, f"dtype in {where}", dtype, ", ".join(DTYPES))
    if draft is not None:
        version = values.get("layout_version")
        require(
            version == LAYOUT_VERSION,
            f"layout_version in {where}",
            version,
            f"{LAYOUT_VERSION} (the stored draft has another packing: convert the source again)",
        )
    return Header(config, dtype, draft, kernels)


def save_tree(directory: Path, tree: dict[str, Any]) -> None:
    """Writes one Orbax checkpoint."""
    import orbax.checkpoint as ocp

    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    with _quiet(), _checkpointer(tree) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=save_args))


def _restore_tree(directory: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Reads one Orbax checkpoint into the shapes, dtypes and shardings of `tree`."""
    import orbax.checkpoint as ocp

    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
    if not directory.is_dir():
        raise ValueError(f"{directory} does not exist: the checkpoint is damaged")
    try:
        with _quiet(), _checkpointer(tree) as checkpointer:
            return checkpointer.restore(
                directory, args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args)
            )
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"{directory} is damaged: {reason[:300]}") from error


def _checkpointer(tree: dict[str, Any]) -> Any:
    """zarr3 without OCDBT or compression, few bytes in flight: nothing is held twice."""
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
        )
    )


class _quiet:
    """Hides Orbax's warnings about its own internals."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("absl").setLevel(self._level)


def check_weights(directory: Path, config: ModelConfig) -> None:
    """Raises ValueError where a parameter's array is not there."""
    missing = [path for path in parameter_shapes(config) if not _is_stored(directory, path)]
    if missing:
        raise ValueError(f"{directory / 'weights'} is damaged: missing {', '.join(missing[:5])}")


def _is_stored(directory: Path, path: str) -> bool:
    return (directory / "weights" / path / "zarr.json").exists()


def load_weights(
    directory: Path, config: ModelConfig, dtype: str, device: jax.Device | None
) -> dict[str, Any]:
    """The parameters in `dtype`."""
    require(dtype in DTYPES, "dtype", dtype, ", ".join(DTYPES))
    check_weights(directory, config)
    sharding = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    shapes = {
        path: jax.ShapeDtypeStruct(spec.shape, DTYPES[dtype], sharding=sharding)
        for path, spec in parameter_shapes(config).items()
    }
    return _restore_tree(directory / "weights", nest(shapes))


def draft_to_arrays(draft_tree: dict[str, Any]) -> dict[str, Any]:
    """The quantized kernels of a draft tree as a tree of arrays: {packed, scale, minimum?}."""
    flat = {}
    for path, leaf in flatten(draft_tree).items():
        if isinstance(leaf, QuantizedWeight):
            flat[path] = {k: v for k, v in leaf._asdict().items() if v is not None}
    return nest(flat)


def draft_kernels(draft_tree: dict[str, Any]) -> tuple[str, ...]:
    """Dotted paths of a draft tree's quantized kernels."""
    flat = flatten(draft_tree)
    return tuple(path for path, leaf in flat.items() if isinstance(leaf, QuantizedWeight))


def _quantized_shapes(
    shape: tuple[int, ...], draft: DraftConfig, sharding: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a kernel [Kin, N], packed as QuantizedWeight says."""
    groups = -(-shape[0] // draft.group_size)
    numbers = (groups, shape[1])
    shapes = {
        "packed": jax.ShapeDtypeStruct(
            (groups, draft.group_size // 2, shape[1]), jnp.uint8, sharding=sharding
        ),
        "scale": jax.ShapeDtypeStruct(numbers, jnp.bfloat16, sharding=sharding),
    }
    if not draft.symmetric:
        shapes["minimum"] = jax.ShapeDtypeStruct(numbers, jnp.bfloat16, sharding=sharding)
    return shapes


def draft_bytes(config: ModelConfig, draft: DraftConfig) -> int:
    """Bytes of the quantized kernels."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    names = ("gate", "up", "down") if draft.layers == "mlp" else None
    total = 0
    for path, spec in parameter_shapes(config).items():
        parts = path.split(".")
        if parts[0] != "layers" or parts[-1] != "kernel" or (names and parts[2] not in names):
            continue
        arrays = _quantized_shapes(spec.shape, draft, sharding).values()
        total += sum(array.size * array.dtype.itemsize for array in arrays)
    return total


def load_draft(directory: Path, header: Header, device: jax.Device | None = None) -> dict[str, Any]:
    """The stored draft: the parameter tree's quantized kernels alone."""
    assert header.draft is not None
    specs = parameter_shapes(header.config)
    unknown = [path for path in header.draft_kernels if path not in specs]
    if unknown:
        raise ValueError(f"{directory / 'config.json'} is damaged: unknown kernel {unknown[0]}")
    sharding = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    shapes = {
        path: _quantized_shapes(specs[path].shape, header.draft, sharding)
        for path in header.draft_kernels
    }
    restored = flatten(_restore_tree(directory / "draft", nest(shapes)))
    return nest(
        {
            path: QuantizedWeight(
                restored[f"{path}.packed"],
                restored[f"{path}.scale"],
                restored.get(f"{path}.minimum"),
            )
            for path in header.draft_kernels
        }
    )
