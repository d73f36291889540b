"""Finished blocks of a calibration on disk, so that an interruption loses none of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import LAYOUT_VERSION, QuantizedWeight
from quantspec_jax.files import read_json, whole, write_json
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import Params, flatten, nest
from quantspec_jax.weights.formats import DraftConfig, WeightFormat

METHOD = 1  # changes with what the calibration computes
SAMPLE = 1024  # numbers of each weight that the signature looks at


class Finished:
    """The directory `resume`, or nothing where it is None.

    signature.json   of the model, the tokens, the draft and the method
    formats.json     the formats of mixed precision, once they are chosen
    block-<i>.npz    the entries of block i: <layer>.<part>.{packed,scale,minimum}
    """

    def __init__(
        self,
        directory: Path | None,
        config: ModelConfig,
        params: Params,
        tokens: jax.Array,
        draft: DraftConfig,
    ):
        self.directory = None if directory is None else Path(directory)
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "signature.json"
        ours = _signature(config, params, tokens, draft)
        if not path.exists():
            write_json(path, ours)
        elif _read(path) != ours:
            raise ValueError(
                f"{self.directory} holds another calibration (other weights, text, options or "
                "version); delete it to start anew"
            )

    def formats(self, choose: Callable[[], dict[str, WeightFormat]]) -> dict[str, WeightFormat]:
        """The formats kept, else those that `choose` gives, kept."""
        if self.directory is None:
            return choose()
        path = self.directory / "formats.json"
        if path.exists():
            return {name: WeightFormat(**given) for name, given in _read(path).items()}
        formats = choose()
        write_json(path, {name: dataclasses.asdict(f) for name, f in formats.items()})
        return formats

    def load(self, i: int) -> dict[str, Any] | None:
        """The entries of block i, or None where it is not finished."""
        path = None if self.directory is None else self.directory / f"block-{i}.npz"
        if path is None or not path.exists():
            return None
        with np.load(path) as arrays:
            found = nest({name: jnp.asarray(arrays[name]) for name in arrays.files})
        return {
            name: {part: _weight(numbers) for part, numbers in parts.items()}
            for name, parts in found.items()
        }

    def save(self, i: int, entries: dict[str, Any]) -> None:
        """Keep the entries of block i."""
        if self.directory is None:
            return
        arrays = {
            f"{name}.{field}": _as_saved(value)
            for name, weight in flatten(entries).items()
            for field, value in weight._asdict().items()
            if value is not None
        }
        with whole(self.directory / f"block-{i}.npz") as partial:
            np.savez(partial, allow_pickle=False, **arrays)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged; delete {path.parent} to start anew") from error


def _as_saved(x: jax.Array) -> np.ndarray:
    """npz files have no bf16: its bits."""
    return np.asarray(x.view(jnp.uint16) if x.dtype == jnp.bfloat16 else x)


def _weight(numbers: dict[str, jax.Array]) -> QuantizedWeight:
    scale = numbers["scale"].view(jnp.bfloat16)
    minimum = numbers["minimum"].view(jnp.bfloat16) if "minimum" in numbers else None
    return QuantizedWeight(numbers["packed"], scale, minimum)


def _signature(
    config: ModelConfig, params: Params, tokens: jax.Array, draft: DraftConfig
) -> dict[str, Any]:
    digest = hashlib.sha256(np.asarray(tokens).tobytes())
    for name, x in sorted(flatten(params).items()):
        sample = np.asarray(x.reshape(-1)[:: max(1, x.size // SAMPLE)].astype(jnp.float32))
        digest.update(name.encode() + sample.tobytes())
    return {
        "method": METHOD,
        "layout": LAYOUT_VERSION,
        "model": json.loads(json.dumps(config.to_dict())),
        "draft": json.loads(json.dumps(draft.to_dict())),
        "tokens": list(tokens.shape),
        "digest": digest.hexdigest(),
    }
