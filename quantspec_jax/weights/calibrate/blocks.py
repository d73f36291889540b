"""The draft's weights, block by block: each layer is rounded for the inputs that it will have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from quantspec_jax.checks import require
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.linear import unpacked
from quantspec_jax.models.parameters import LINEAR_LAYERS, InTurn, flatten, nest
from quantspec_jax.weights.calibrate import gptq, head, mixed_precision, streams
from quantspec_jax.weights.calibrate.gptq import Moments
from quantspec_jax.weights.calibrate.programs import program
from quantspec_jax.weights.calibrate.resume import Finished, finished_blocks
from quantspec_jax.weights.calibrate.streams import Block, Pair
from quantspec_jax.weights.formats import DraftConfig, WeightFormat
from quantspec_jax.weights.sizes import layer_formats

SENSITIVITY_TOKENS = 2048
Entry = dict[str, Any]


def calibrate(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: Any,
    draft: DraftConfig,
    *,
    progress: bool = False,
    resume: Path | None = None,
) -> tuple[DraftConfig, dict[str, Any]]:
    """Quantize the draft's weights so that on a text's tokens it does as the target does.

    Args:
      config, params: the target; `params` may be made in turn (`InTurn`), a block at a time.
      tokens: [chunks, length] int32, such as `calibration_tokens` gives.
      draft: the formats. With `average_bits` the layers of 8 bits are chosen here.
      progress: show a bar on standard error.
      resume: a directory where finished blocks are kept, so that a calibration that was interrupted
        goes on with the block it was at.

    Returns:
      `draft` with the formats that were chosen, and the draft's own entries of the tree, as
      `quantspec_jax.weights.entries.quantize_params` returns them.

    Raises:
      ValueError: an argument is wrong, `resume` holds another calibration or one that another
        process is at, or activations are not finite; says in which layer.
    """
    draft, entries = calibrate_in_turn(
        config, params, tokens, draft, progress=progress, resume=resume
    )
    return draft, nest(flatten(entries))


def calibrate_in_turn(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: Any,
    draft: DraftConfig,
    *,
    progress: bool = False,
    resume: Path | None = None,
) -> tuple[DraftConfig, Mapping[str, Any]]:
    """As `calibrate`, with entries that are read from `resume` when they are asked for, a block at
    a time: nobody holds all of them."""
    tokens = _checked(config, tokens)
    formats = layer_formats(config, draft)
    with finished_blocks(resume, config, params, tokens, draft, progress=progress) as finished:
        chosen = draft
        if draft.average_bits is not None:
            formats = finished.formats(lambda: _mixed(config, params, tokens, formats, draft))
            chosen = _with_formats(draft, formats)
        _finish(config, params, tokens, draft, formats, finished, progress)
    return chosen, _entries(config, draft, finished)


def _finish(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: jax.Array,
    draft: DraftConfig,
    formats: mixed_precision.Formats,
    finished: Finished,
    progress: bool,
) -> None:
    """Calibrate what `finished` has not yet."""
    blocks, parts = _blocks(config), head.parts(config, draft)
    missing = [name for name in (*blocks, *parts) if finished.load(name) is None]
    if not missing:
        return

    def through(i: int, name: str, block: Block, hidden: Pair) -> Pair:
        if name not in missing:
            kept = functools.partial(_kept, finished.entries(name))
            return _through(config, block, hidden, kept)[1]
        here = {name: formats[f"layers.{i}.{name}"] for name in LINEAR_LAYERS}
        make = functools.partial(_quantize, f"layers.{i}", block, here)
        entry, hidden = _through(config, block, hidden, make)
        finished.save(name, entry)
        return hidden

    hidden = _embedded(params["embedding"], tokens)
    bar = tqdm(blocks, desc="calibrating", unit=" blocks", disable=not progress)
    for i, name in enumerate(bar):
        hidden = through(i, name, params["layers"][str(i)], hidden)
    if any(name in missing for name in parts):
        head.finish(config, params, hidden, draft, missing, finished, progress)


def _blocks(config: ModelConfig) -> list[str]:
    """The names that finished blocks are kept by."""
    return [f"block-{i}" for i in range(config.num_layers)]


def _entries(config: ModelConfig, draft: DraftConfig, finished: Finished) -> InTurn:
    """The draft's own entries of the tree."""
    blocks = enumerate(_blocks(config))
    layers = InTurn({str(i): functools.partial(finished.entries, name) for i, name in blocks})
    made: dict[str, Callable[[], Any]] = {"layers": lambda: layers}
    if draft.lm_head_bits != 16:
        made["lm_head"] = functools.partial(head.joined, config, draft, finished)
    return InTurn(made)


def _checked(config: ModelConfig, tokens: Any) -> jax.Array:
    tokens = np.asarray(tokens)
    shaped = tokens.ndim == 2 and tokens.size > 0
    require(shaped, "calibration tokens", tokens.shape, "an array of shape [chunks, length]")
    require(np.issubdtype(tokens.dtype, np.integer), "calibration tokens", tokens.dtype, "integers")
    inside = tokens.min() >= 0 and tokens.max() < config.vocab_size
    given = f"ids from {tokens.min()} to {tokens.max()}"
    require(inside, "calibration tokens", given, f"0 to {config.vocab_size - 1}")
    limit = config.max_context
    require(tokens.shape[1] <= limit, "calibration length", tokens.shape[1], f"up to {limit}")
    return jnp.asarray(tokens, jnp.int32)


def _mixed(config, params, tokens, formats, draft) -> mixed_precision.Formats:
    chunks = -(-SENSITIVITY_TOKENS // tokens.shape[1])
    cost = mixed_precision.costs(config, params, tokens[:chunks], formats)
    return mixed_precision.choose(config, params, formats, cost, draft.average_bits)


def _with_formats(draft: DraftConfig, formats: mixed_precision.Formats) -> DraftConfig:
    """`draft` with the formats that differ from what it says itself."""
    plain = dataclasses.replace(draft, formats=())
    special = tuple(item for item in formats.items() if plain.format_of(item[0]) != item[1])
    return dataclasses.replace(draft, formats=special)


# (names of layers with the same inputs, their moments when asked for) → their entries
Make = Callable[[tuple[str, ...], Callable[[], Moments]], Entry]

_attend = program("config")(streams.attend)
_gate = program("config")(streams.gate)
_add = program()(streams.add)


@program()
def _embedded(embedding: jax.Array, tokens: jax.Array) -> Pair:
    x = embedding[tokens].astype(jnp.float32)
    return Pair(x, x)


def _through(config: ModelConfig, block: Block, hidden: Pair, make: Make) -> tuple[Entry, Pair]:
    """Both streams through a block, its layers made as soon as their inputs are known: what was
    made, and the streams after it."""
    entries: Entry = {}
    own = {name: x for name, x in block.items() if name not in LINEAR_LAYERS}

    def layers(names: tuple[str, ...], moments: Callable[[], Moments]) -> None:
        made = make(names, moments)
        entries.update(made)
        for name in names:
            kernel = block[name]["kernel"]
            restored = {"kernel": _restored(made[name], inputs=len(kernel))} if name in made else {}
            own[name] = block[name] | restored

    def output(name: str, inputs: Pair) -> Pair:
        layers((name,), lambda: streams.output_moments(block[name], hidden, inputs))
        return _add(block[name], own[name], hidden, inputs)

    def input_moments(norm: str) -> Callable[[], Moments]:
        return lambda: streams.input_moments(config, block[norm], hidden)

    layers(("q", "k", "v"), input_moments("attention_norm"))
    hidden = output("o", _attend(config, block, own, hidden))
    layers(("gate", "up"), input_moments("mlp_norm"))
    hidden = output("down", _gate(config, block, own, hidden))
    return entries, hidden


_restored = program("inputs")(unpacked)


def _quantize(
    prefix: str,
    block: Block,
    formats: dict[str, WeightFormat],
    names: tuple[str, ...],
    moments: Callable[[], Moments],
) -> Entry:
    """Calibrate the layers of these names, which have the same inputs."""
    names = tuple(name for name in names if formats[name].bits != 16)
    if not names:
        return {}
    sums = moments()
    if not bool(gptq.finite(sums)):
        layers = ", ".join(f"{prefix}.{name}" for name in names)
        raise ValueError(f"{layers}: the activations are not finite (NaN or infinity)")
    factor, change = gptq.factorize(sums.gram), gptq.correction(sums)
    shared = names[0] not in ("o", "down")
    made: Entry = {}
    for alike in _by_format(names, formats):
        kernels = [block[name]["kernel"] for name in alike]
        stored = formats[alike[0]]
        found = gptq.quantize_layers(kernels, change, sums.gram, factor, stored, shared)
        made |= dict(zip(alike, found, strict=True))
    return made


def _by_format(names: tuple[str, ...], formats: dict[str, WeightFormat]) -> list[tuple[str, ...]]:
    """Layers to round at once: all of them where their formats are the same, else each alone, so
    that there are few shapes to compile for."""
    same = len({formats[name] for name in names}) == 1
    return [names] if same else [(name,) for name in names]


def _kept(entry: Entry, names: tuple[str, ...], _: Callable[[], Moments]) -> Entry:
    return {name: entry[name] for name in names if name in entry}
