"""A codec of the cache to store with a checkpoint: it learns from a text, on its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.sources import Checkpoint, Weights
from quantspec_jax.checks import require
from quantspec_jax.methods.method import channels
from quantspec_jax.methods.stored import check_model, to_arrays
from quantspec_jax.stored_kv import StoredKV


@dataclasses.dataclass(frozen=True)
class KVSource:
    """What is stored, and what it learns from."""

    kv: StoredKV
    tokens: np.ndarray
    finished: Path

    def num_bytes(self, checkpoint: Checkpoint) -> int:
        """On the disk, about: the predictors, and what is kept between layers."""
        n, layers = channels(checkpoint.config), checkpoint.config.num_layers
        between = self.tokens.size * (2 * checkpoint.config.hidden_size + 2 * n)
        return 6 * layers * 3 * n * n + 4 * between

    def make(self, weights: Weights, progress: bool) -> dict[str, Any]:
        """The arrays to store. Computed in float32 where the weights are not bfloat16 (float16 is
        a type of storage)."""
        import jax.numpy as jnp

        from quantspec_jax.evaluate.learned import calibrated
        from quantspec_jax.methods import METHODS

        def placed(x: jax.Array) -> jax.Array:
            held = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
            return jax.device_put(held, jax.devices()[0])

        model, params = weights.checkpoint.config, weights.by_block(placed)
        learned = calibrated(
            *(model, params, METHODS[self.kv.name], self.tokens),
            resume=self.finished,
            progress=progress,
        )
        return to_arrays(learned)


def prepare(
    checkpoint: Checkpoint, kv: StoredKV | None, text: str | None, finished: Path
) -> KVSource | None:
    """What `convert` was asked for; a ValueError for all that is wrong without reading weights.

    Args:
      text: to learn from; None: one that comes with Python.
      finished: directory for what is done between layers.
    """
    require(kv is not None or text is None, "kv_text", "given", "with kv, which reads it")
    if kv is None:
        return None
    from quantspec_jax.weights.calibrate.text import LENGTH, calibration_tokens

    check_model(checkpoint.config)
    has_tokenizer = checkpoint.tokenizer is not None
    require(has_tokenizer, "source", checkpoint.source, "one with a tokenizer: kv reads a text")
    length = min(LENGTH, checkpoint.config.max_context)
    tokens = calibration_tokens(checkpoint.tokenizer, text, length=length)
    return KVSource(kv, tokens, finished)
