"""The draft's weights, block by block: each layer is rounded for the inputs that it will have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.int4_matmul.reference import dequantize
from quantspec_jax.calibrate import gptq, streams
from quantspec_jax.calibrate.streams import Pair
from quantspec_jax.config import DraftConfig, ModelConfig, WeightFormat
from quantspec_jax.draft import layer_formats

Params = dict[str, Any]


def calibrate(
    config: ModelConfig,
    params: Params,
    tokens: Any,
    draft: DraftConfig,
    *,
    progress: bool = False,
    resume: Path | None = None,
) -> tuple[DraftConfig, dict[str, Any]]:
    formats = layer_formats(config, draft)
    embedding = params["embedding"]
    hidden = [Pair(x, x) for x in (embedding[jnp.asarray(row)].astype(jnp.float32) for row in tokens)]
    entries = {}
    for i in tqdm(range(config.num_layers), desc="calibrating", unit=" layers", disable=not progress):
        stored = {
            name.rsplit(".", 1)[1]: f for name, f in formats.items() if name.startswith(f"layers.{i}.")
        }
        entries[str(i)], hidden = calibrate_block(config, params["layers"][str(i)], hidden, stored)
    return draft, {"layers": {i: e for i, e in entries.items() if e}}


def calibrate_block(
    config: ModelConfig, block: Params, hidden: list[Pair], formats: dict[str, WeightFormat]
):
    entries: dict[str, Any] = {}
    own: dict[str, Any] = {}

    def quantize(names, sums) -> None:
        factor = gptq.factorize(sums.gram)
        for name in names:
            weights = block[name]
            own[name] = weights
            if formats[name].bits != 16:
                w = gptq.wanted(weights["kernel"], sums)
                entries[name] = gptq.quantize(w, sums.gram, factor, formats[name])
                own[name] = weights | {"kernel": restored(entries[name], w.shape[0])}

    def total(parts):
        out = None
        for part in parts:
            out = part if out is None else jax.tree.map(jnp.add, out, part)
        return out

    quantize(("q", "k", "v"), total(streams.attention_moments(config, block, x) for x in hidden))
    inputs = [streams.attend(config, block, own, x) for x in hidden]
    quantize(("o",), total(map(streams.output_moments, hidden, inputs)))
    hidden = [streams.add(block["o"], own["o"], *both) for both in zip(hidden, inputs, strict=True)]
    quantize(("gate", "up"), total(streams.mlp_moments(config, block, x) for x in hidden))
    inputs = [streams.gate(config, block, own, x) for x in hidden]
    quantize(("down",), total(map(streams.output_moments, hidden, inputs)))
    hidden = [
        streams.add(block["down"], own["down"], *both) for both in zip(hidden, inputs, strict=True)
    ]
    return entries, hidden


@jax.jit
def _sum(planes):
    return sum(dequantize(plane) for plane in planes)


def restored(entry, kin: int) -> jax.Array:
    """float32 [Kin, N]."""
    return _sum(list(entry.values()))[:kin]
