"""The draft's own lm_head in 4 bits, rounded for the hidden states that the draft will have.

    both streams after the last block ── final norm ── moments ── W* ── codes of part 0, part 1, ...

Once H is there, output channels know nothing of each other: the vocabulary is rounded a part at a
time, each read from the target's lm_head or tied embedding as it lies, so that no float32 copy of
the whole is made. Parts are equally wide; the last one begins early enough to be so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from quantspec_jax.models.config import ModelConfig
from quantspec_jax.weights.calibrate import gptq, streams
from quantspec_jax.weights.calibrate.programs import program
from quantspec_jax.weights.calibrate.resume import Finished
from quantspec_jax.weights.calibrate.streams import Pair
from quantspec_jax.weights.formats import DraftConfig, WeightFormat
from quantspec_jax.weights.sizes import lm_head_format

PART = 1 << 24  # weights that are rounded at a time, about
Entry = dict[str, Any]


def parts(config: ModelConfig, draft: DraftConfig) -> list[str]:
    """The names that finished parts are kept by; none where the draft has the target's lm_head."""
    if draft.lm_head_bits == 16:
        return []
    count = -(-config.vocab_size * config.hidden_size // PART)
    return [f"lm_head-{i}" for i in range(count)]


def finish(
    config: ModelConfig,
    params: Mapping[str, Any],
    hidden: Pair,
    draft: DraftConfig,
    missing: Collection[str],
    finished: Finished,
    progress: bool,
) -> None:
    """Calibrate the parts that are missing, on the streams after the last block.

    Raises:
      ValueError: activations are not finite.
    """
    sums = streams.input_moments(config, params["final_norm"], hidden)
    if not bool(gptq.finite(sums)):
        raise ValueError("lm_head: the activations are not finite (NaN or infinity)")
    shared = gptq.correction(sums), sums.gram, gptq.factorize(sums.gram)
    tied = "lm_head" not in params
    weight = params["embedding"] if tied else params["lm_head"]["kernel"]
    names, columns = parts(config, draft), _columns(config, draft)
    bar = tqdm(names, desc="calibrating lm_head", unit=" parts", disable=not progress)
    for i, name in enumerate(bar):
        if name in missing:
            call = (weight, jnp.int32(i * columns), *shared, lm_head_format(draft))
            finished.save(name, {"lm_head": _part(*call, columns=columns, tied=tied)})


def joined(config: ModelConfig, draft: DraftConfig, finished: Finished) -> Entry:
    """The draft's own lm_head, {"kernel": 4-bit groups}."""
    names = parts(config, draft)
    twice = len(names) * _columns(config, draft) - config.vocab_size
    found = [finished.entries(name)["lm_head"] for name in names]
    return jax.tree.map(lambda *x: jnp.concatenate([*x[:-1], x[-1][..., twice:]], -1), *found)


def _columns(config: ModelConfig, draft: DraftConfig) -> int:
    return -(-config.vocab_size // len(parts(config, draft)))


@program("stored", "columns", "tied")
def _part(
    weight: jax.Array,
    begin: jax.Array,
    change: jax.Array,
    gram: jax.Array,
    factor: gptq.Factor,
    stored: WeightFormat,
    columns: int,
    tied: bool,
) -> Entry:
    """The output channels from `begin` on, or the last ones, of a weight [E, N], tied [N, E]."""
    part = jax.lax.dynamic_slice_in_dim(weight, begin, columns, 0 if tied else 1)
    w = gptq.wanted(part.T if tied else part, change, shared=True)
    return gptq.quantize(w, gram, factor, stored)
