"""What each sequence of a batch wants, as arrays: nothing of it compiles anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from quantspec_jax.checks import require
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.sampling import Sampling

EOS_SLOTS = 16


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sampling", "keys", "eos_ids", "limit"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Requests:
    """One row a sequence.

    sampling  the warpers' parameters
    keys      [B] typed PRNG keys
    eos_ids   [B, E] int32, tokens that end the sequence; −1 as padding
    limit     [B] int32, tokens to make
    """

    sampling: Sampling
    keys: jax.Array
    eos_ids: jax.Array
    limit: jax.Array


def requests(
    config: GenerateConfig, keys: jax.Array | None, end_ids: Sequence[int], batch: int
) -> Requests:
    """The same wish for each of `batch` sequences, but a key each (`sequence_keys`). `end_ids`:
    `GenerateConfig.end_ids`."""
    slots = max(EOS_SLOTS, len(end_ids))
    row = np.array([*end_ids, *[-1] * (slots - len(end_ids))], np.int32)
    return Requests(
        sampling_arrays(config, batch),
        sequence_keys(keys, batch),
        jnp.asarray(np.tile(row, (batch, 1))),
        jnp.full(batch, config.max_new_tokens, jnp.int32),
    )


def sampling_arrays(config: GenerateConfig, batch: int) -> Sampling:
    """The same parameters for each of `batch` sequences."""
    largest = np.iinfo(np.int32).max

    def full(value: float, dtype: type) -> jax.Array:
        return jnp.asarray(np.full(batch, value, dtype))

    return Sampling(
        full(config.temperature, np.float32),
        full(min(config.top_k, largest), np.int32),
        full(config.top_p, np.float32),
        full(config.min_p, np.float32),
        full(config.repetition_penalty, np.float32),
    )


def sequence_keys(key: jax.Array | None, batch: int) -> jax.Array:
    """[B] typed keys: `key` itself if it has one a sequence, else folded with each index."""
    if key is None:
        key = jax.random.key(0)
    require(
        isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key),
        "key",
        key,
        "a typed key, jax.random.key(seed), or an array of one a sequence",
    )
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    require(key.shape == (batch,), "key shape", key.shape, f"() or ({batch},)")
    return key


def is_end(tokens: jax.Array, eos_ids: jax.Array) -> jax.Array:
    """[B, S] tokens → [B, S] bool: those that end their sequence, by eos_ids [B, E]."""
    return (tokens[:, :, None] == eos_ids[:, None, :]).any(-1)
