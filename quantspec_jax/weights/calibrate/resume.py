"""Finished blocks of a calibration on disk, so that an interruption loses none of them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.layout import LAYOUT_VERSION, QuantizedWeight
from quantspec_jax.claim import claim
from quantspec_jax.files import read_json, whole, write_json
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import flatten, leaves, nest, parameter_shapes
from quantspec_jax.notices import notice
from quantspec_jax.weights.formats import DraftConfig, WeightFormat

METHOD = 1  # changes with what the calibration computes
SAMPLE = 1024  # numbers of each weight that the signature looks at


@contextlib.contextmanager
def finished_blocks(
    directory: Path | None,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: jax.Array,
    draft: DraftConfig,
    *,
    progress: bool = False,
) -> Iterator[Finished]:
    """The directory, for this calibration and this process alone; None: in memory.

    Raises:
      ValueError: it holds another calibration, or another process is at it.
    """
    if directory is None:
        yield Finished(None)
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with claim(directory / "claim", "calibration directory", directory):
        for half in directory.glob(".*.partial.*"):  # `whole` was killed
            half.unlink()
        _check_signature(directory, _signature(config, params, tokens, draft, progress))
        yield Finished(directory)


def _check_signature(directory: Path, ours: dict[str, Any]) -> None:
    path = directory / "signature.json"
    kept = _read(path, "all layers are calibrated again") if path.exists() else None
    if kept is None:  # nobody can say whose the blocks are
        for kept_file in (*directory.glob("*.npz"), directory / "formats.json"):
            kept_file.unlink(missing_ok=True)
        _write(path, ours)
    elif kept != ours:
        raise ValueError(
            f"{directory} holds another calibration (other weights, text, options or "
            "version); delete it to start anew"
        )


class Finished:
    """What a directory keeps of a calibration, or memory where it is None. A file that is damaged
    is named, and as good as none.

    signature.json   of the model, the tokens, the draft and the method
    formats.json     the formats of mixed precision, once they are chosen
    block-<i>.npz    the entries of block i: <layer>.<part>.{packed,scale,minimum}; the format has a
                     checksum for each array, which NumPy verifies as it reads
    lm_head-<i>.npz  a part of lm_head, alike
    """

    def __init__(self, directory: Path | None):
        self.directory = directory
        self._held: dict[str, dict[str, Any]] = {}

    def formats(self, choose: Callable[[], dict[str, WeightFormat]]) -> dict[str, WeightFormat]:
        """The formats kept, else those that `choose` gives, kept."""
        if self.directory is None:
            return choose()
        path = self.directory / "formats.json"
        kept = _read(path, "the formats are chosen again") if path.exists() else None
        if kept is not None:
            return {name: WeightFormat(**given) for name, given in kept.items()}
        formats = choose()
        _write(path, {name: dataclasses.asdict(f) for name, f in formats.items()})
        return formats

    def load(self, name: str) -> dict[str, Any] | None:
        """The entries of `block-<i>` or `lm_head-<i>`, or None where they are not finished."""
        if self.directory is None:
            return self._held.get(name)
        path = self.directory / f"{name}.npz"
        if not path.exists():
            return None
        try:
            return _load_block(path)
        except OSError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy have a dozen kinds
            again = f"{name.replace('-', ' ')} is calibrated again"
            notice(f"{path} is damaged ({type(error).__name__}): {again}")
            return None

    def entries(self, name: str) -> dict[str, Any]:
        """Those of what is finished.

        Raises:
          ValueError: their file was lost or damaged since.
        """
        found = self.load(name)
        if found is None:
            raise ValueError(f"{self.directory}: {name} was lost; the same command makes it again")
        return found

    def save(self, name: str, entries: dict[str, Any]) -> None:
        """Keep the entries of `name`, as `load` gives them."""
        if self.directory is None:
            self._held[name] = entries
            return
        arrays = {
            f"{name}.{field}": _as_saved(value)
            for name, weight in flatten(entries).items()
            for field, value in weight._asdict().items()
            if value is not None
        }
        with whole(self.directory / f"{name}.npz") as partial:
            np.savez(partial, allow_pickle=False, **arrays)


def _load_block(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream, np.load(stream) as arrays:
        found = nest({name: jnp.asarray(arrays[name]) for name in arrays.files})
    return {
        name: {part: _weight(numbers) for part, numbers in parts.items()}
        for name, parts in found.items()
    }


def _checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _write(path: Path, values: dict[str, Any]) -> None:
    write_json(path, {"crc32": _checksum(values), "content": values})


def _read(path: Path, consequence: str) -> dict[str, Any] | None:
    """What `_write` was given; None, with a notice, where it is damaged."""
    with contextlib.suppress(ValueError):
        kept = read_json(path)
        content = kept.get("content")
        if isinstance(content, dict) and kept.get("crc32") == _checksum(content):
            return content
    notice(f"{path} is damaged: {consequence}")
    return None


def _as_saved(x: jax.Array) -> np.ndarray:
    """npz files have no bf16: its bits."""
    return np.asarray(x.view(jnp.uint16) if x.dtype == jnp.bfloat16 else x)


def _weight(numbers: dict[str, jax.Array]) -> QuantizedWeight:
    scale = numbers["scale"].view(jnp.bfloat16)
    minimum = numbers["minimum"].view(jnp.bfloat16) if "minimum" in numbers else None
    return QuantizedWeight(numbers["packed"], scale, minimum)


def _signature(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: jax.Array,
    draft: DraftConfig,
    progress: bool,
) -> dict[str, Any]:
    digest = hashlib.sha256(np.asarray(tokens).tobytes())
    arrays = len(parameter_shapes(config))
    bar = tqdm(desc="comparing", total=arrays, unit=" arrays", disable=not progress)
    for name, x in leaves(params):
        sample = np.asarray(x.reshape(-1)[:: max(1, x.size // SAMPLE)].astype(jnp.float32))
        digest.update(name.encode() + sample.tobytes())
        bar.update()
    bar.close()
    return {
        "method": METHOD,
        "layout": LAYOUT_VERSION,
        "model": json.loads(json.dumps(config.to_dict())),
        "draft": json.loads(json.dumps(draft.to_dict())),
        "tokens": list(tokens.shape),
        "digest": digest.hexdigest(),
    }
