"""Fingerprints of what a saved cache depends on: the target's weights, the tokenizer, and what a
codec of caches has learned."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantspec_jax.loading import LearnedKV, Model
from quantspec_jax.models.parameters import flatten


def of_model(model: Model) -> str:
    """Of the configuration and of every weight of the target: another checkpoint, another rounding
    or another RoPE gives another one. The draft does not count: the cache is the target's."""
    digest = hashlib.sha256(repr((model.config, model.dtype.name)).encode())
    for path, leaf in sorted(flatten(model.params).items()):
        digest.update(f"{path} {leaf.shape} {int(_checksum(leaf))}".encode())
    return digest.hexdigest()


def of_kv(kv: LearnedKV) -> str:
    """Of what a codec has learned: another text, or another number of bits, gives another one."""
    digest = hashlib.sha256(repr(kv.stored).encode())
    for leaf in jax.tree.leaves(kv.learned):
        digest.update(f"{leaf.shape} {int(_checksum(leaf))}".encode())
    return digest.hexdigest()


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Σ bits · (an odd number that depends on the place), modulo 2³²: read where it lies."""
    kind = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    weight = (place * np.uint32(2654435761)) | np.uint32(1)
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def of_tokenizer(tokenizer: Any) -> str:
    """Of what makes ids of text; none for a model without a tokenizer."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab()))
    return hashlib.sha256(text.encode()).hexdigest()
