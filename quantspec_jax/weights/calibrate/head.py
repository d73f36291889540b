"""The draft's own lm_head in 4 bits, rounded for the hidden states that the draft will have.

    both streams after the last block ── final norm ── moments ── W* ── codes of part 0, part 1, ...

Once H is there, output channels know nothing of each other: the vocabulary is rounded a part at a
time, each read from the target's lm_head or tied embedding as it lies, so that no float32 copy of
the whole is made. Parts are equally wide; the last one begins early enough to be so.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import Params
from quantspec_jax.weights.calibrate import gptq, streams
from quantspec_jax.weights.calibrate.programs import program
from quantspec_jax.weights.calibrate.resume import Finished
from quantspec_jax.weights.calibrate.streams import Pair
from quantspec_jax.weights.formats import DraftConfig, WeightFormat
from quantspec_jax.weights.sizes import lm_head_format

PART = 1 << 24  # weights that are rounded at a time, about
Entry = dict[str, Any]


def kept_parts(config: ModelConfig, draft: DraftConfig, finished: Finished) -> list[Entry | None]:
    """The parts of lm_head, those that are not finished None; no parts where the draft has the
    target's."""
    if draft.lm_head_bits == 16:
        return []
    count = -(-config.vocab_size * config.hidden_size // PART)
    return [finished.load(f"lm_head-{i}") for i in range(count)]


def quantize_parts(
    config: ModelConfig,
    params: Params,
    hidden: Pair,
    draft: DraftConfig,
    parts: list[Entry | None],
    finished: Finished,
    progress: bool,
) -> list[Entry]:
    """All parts, those that are None calibrated on the streams after the last block.

    Raises:
      ValueError: activations are not finite.
    """
    sums = streams.input_moments(config, params["final_norm"], hidden)
    if not bool(gptq.finite(sums)):
        raise ValueError("lm_head: the activations are not finite (NaN or infinity)")
    shared = gptq.correction(sums), sums.gram, gptq.factorize(sums.gram)
    tied = "lm_head" not in params
    weight = params["embedding"] if tied else params["lm_head"]["kernel"]
    options = {"columns": _columns(config, len(parts)), "tied": tied}
    made = []
    title = "calibrating lm_head"
    for i, part in enumerate(tqdm(parts, desc=title, unit=" parts", disable=not progress)):
        if part is None:
            begin = jnp.int32(i * options["columns"])
            part = {"lm_head": _part(weight, begin, *shared, lm_head_format(draft), **options)}
            finished.save(f"lm_head-{i}", part)
        made.append(part)
    return made


def joined(config: ModelConfig, parts: list[Entry]) -> Entry:
    """The draft's own entries of the tree: {"lm_head": {"kernel": 4-bit groups}}, or {}."""
    if not parts:
        return {}
    twice = len(parts) * _columns(config, len(parts)) - config.vocab_size
    return jax.tree.map(lambda *x: jnp.concatenate([*x[:-1], x[-1][..., twice:]], -1), *parts)


def _columns(config: ModelConfig, parts: int) -> int:
    return -(-config.vocab_size // parts)


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
