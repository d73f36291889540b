"""Where the weights of a stored draft come from: rounding, calibration, or another checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from convert.drafts.codes import QuantizedCheckpoint
from convert.drafts.open import open_draft
from convert.files.deferred import Deferred
from convert.sources import Checkpoint, Weights
from pallas_kernels.layout import QuantizedWeight
from quantspec_jax import interrupts
from quantspec_jax.models.parameters import InTurn, flatten, nest, parameter_shapes
from quantspec_jax.weights.entries import quantize_params
from quantspec_jax.weights.formats import DraftConfig, WeightFormat
from quantspec_jax.weights.rounding import quantize_linear
from quantspec_jax.weights.sizes import draft_bytes, layer_formats, lm_head_format

Made = tuple[DraftConfig, dict[str, Any]]  # the draft's configuration and its entries of the tree


@dataclasses.dataclass(frozen=True)
class DraftSource:
    """A draft that can be made: what it takes on the disk, about, and `make(weights, progress)`,
    whose arrays may be deferred."""

    num_bytes: int
    make: Callable[[Weights, bool], Made]


def check_arguments(draft: DraftConfig | None, text: str | None, source: str | Path | None) -> None:
    """ValueError for arguments of `convert` that do not go together."""
    if draft is not None and source is not None:
        raise ValueError(
            f"draft is {draft.describe()!r} and draft_from {str(source)!r}: allowed is one of them"
        )
    if draft is not None and draft.bits is None:
        raise ValueError("draft bits is None (the full weights): there is nothing to store")
    if draft is not None and draft.method == "imported":
        raise ValueError("draft method is 'imported': name the checkpoint as draft_from")
    if text is not None and (draft is None or draft.method != "gptq"):
        raise ValueError("draft_text is given, which only draft method gptq reads")


def prepare(
    checkpoint: Checkpoint,
    draft: DraftConfig | None,
    text: str | None,
    source: str | Path | None,
    finished: Path,
) -> DraftSource | None:
    """What `convert` was asked for; a ValueError for all that is wrong without reading weights.

    Args:
      checkpoint: the target.
      text: to calibrate on; None: the default one.
      source: a quantized checkpoint.
      finished: directory for the layers that a calibration has finished.
    """
    config = checkpoint.config
    if source is not None:
        quantized = open_draft(source, config)
        size = draft_bytes(config, quantized.draft_config())
        return DraftSource(
            size, lambda weights, progress: _imported(quantized, weights.by_block(), progress)
        )
    if draft is None:
        return None
    layer_formats(config, draft)  # refuses names that fit no layer
    if draft.method == "gptq":
        return _calibrated(checkpoint, draft, text, finished)

    return DraftSource(
        draft_bytes(config, draft), lambda weights, progress: (draft, _rounded(weights, draft))
    )


def _rounded(weights: Weights, draft: DraftConfig) -> dict[str, Any]:
    """`quantize_params` of the weights; each layer is read and rounded when its arrays are to be
    written, which come one after the other."""

    @functools.lru_cache(1)
    def rounded(layer: str) -> dict[str, QuantizedWeight]:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return quantize_linear(weights.kernel(layer), format_of(layer))

    def format_of(layer: str) -> WeightFormat:
        return lm_head_format(draft) if layer == "lm_head" else draft.format_of(layer)

    def deferred(path: str, leaf: QuantizedWeight) -> QuantizedWeight:
        layer, _, part = path.rpartition(".")

        def array(field: str) -> Any:
            shape = getattr(leaf, field)
            make = lambda: getattr(rounded(layer)[part], field)  # noqa: E731
            return None if shape is None else Deferred(shape.shape, shape.dtype, make)

        return QuantizedWeight(*map(array, QuantizedWeight._fields))

    shapes = jax.eval_shape(lambda params: quantize_params(params, draft), weights.shapes)
    return nest({path: deferred(path, leaf) for path, leaf in flatten(shapes).items()})


def _imported(quantized: QuantizedCheckpoint, params: Mapping[str, Any], progress: bool) -> Made:
    """Another checkpoint's codes: each block is read and checked at once, and read again when it is
    written."""
    blocks = range(quantized.config.num_layers)

    def entries(i: int) -> dict[str, Any]:
        return nest(quantized.block(i, params["layers"][str(i)]))

    layers = InTurn({str(i): functools.partial(entries, i) for i in blocks})
    found = _deferred({"layers": layers}, "importing the draft" if progress else None)
    return quantized.found_config(flatten(found)), found


def _deferred(tree: Mapping[str, Any], title: str | None = None) -> dict[str, Any]:
    """A draft's entries to be written in turn: each block is made for its shapes, and again when it
    is written. `title`: of a bar on standard error."""

    @functools.lru_cache(1)
    def part(name: str) -> dict[str, Any]:
        node = functools.reduce(lambda node, step: node[step], name.split("."), tree)
        return {f"{name}.{path}": leaf for path, leaf in flatten(node).items()}

    def array(name: str, path: str, field: str | None) -> Any:
        def make() -> jax.Array:
            leaf = part(name)[path]
            return leaf if field is None else getattr(leaf, field)

        made = make()
        return None if made is None else Deferred(made.shape, made.dtype, make)

    def leaf(name: str, path: str) -> Any:
        if not isinstance(part(name)[path], QuantizedWeight):
            return array(name, path, None)
        return QuantizedWeight(*(array(name, path, field) for field in QuantizedWeight._fields))

    blocks = [f"layers.{i}" for i in tree.get("layers", {})]
    names = [*blocks, *(name for name in tree if name != "layers")]
    bar = tqdm(names, desc=title, unit="layer", disable=title is None)
    return nest({path: leaf(name, path) for name in bar for path in part(name)})


def _calibrated(
    checkpoint: Checkpoint, draft: DraftConfig, text: str | None, finished: Path
) -> DraftSource:
    from quantspec_jax.weights.calibrate import calibrate_in_turn, calibration_tokens
    from quantspec_jax.weights.calibrate.mixed_precision import check_budget
    from quantspec_jax.weights.calibrate.text import LENGTH

    config = checkpoint.config
    if checkpoint.tokenizer is None:
        raise ValueError(
            f"source is {checkpoint.source!r}, which has no tokenizer: draft method gptq reads a "
            "text; allowed without one: rtn"
        )
    length = min(LENGTH, config.max_context)
    tokens = calibration_tokens(checkpoint.tokenizer, text, length=length)

    def calibrated(weights: Weights, progress: bool) -> Made:
        resumed = finished.exists()
        device = jax.devices()[0]  # conversion itself works on the host
        there = weights.by_block(lambda x: jax.device_put(x, device))
        try:
            with interrupts.unmasked():
                found, entries = calibrate_in_turn(
                    config, there, tokens, draft, progress=progress, resume=finished
                )
            return found, _deferred(entries)
        except ValueError:  # it would fail again; but what was there before may be of another call
            if not resumed:
                shutil.rmtree(finished, ignore_errors=True)
            raise

    size = draft_bytes(config, draft)
    if draft.average_bits is not None:
        check_budget(config, layer_formats(config, draft), draft.average_bits)
        shapes = parameter_shapes(config)
        weights = sum(shapes[f"{layer}.kernel"].size for layer in layer_formats(config, draft))
        size = int(draft.average_bits * weights / 8)
    return DraftSource(2 * size, calibrated)  # the finished layers lie beside the result
