"""In XLA, for any backend. The full-precision buffer is a ring of R slots, position p in slot
p mod R."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.layout import LayerCache
from pallas_kernels.rope_append.heads import Heads
from pallas_kernels.shapes import CacheKV, Each, shaped


def rope_append(
    heads: Heads, cache: LayerCache, start: jax.Array, first: jax.Array | None = None
) -> tuple[jax.Array, LayerCache]:
    """See `pallas_kernels.rope_append.api.rope_append`."""
    # The buffers are written outside of what layers share: there XLA's CPU backend fuses less.
    q, k, v = dispatch.shared(_finished, ())(heads, start, first)
    return q, append(cache, k.swapaxes(1, 2), v.swapaxes(1, 2), start)


def _finished(
    heads: Heads, start: jax.Array, first: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Heads.finished`, with those rows of its tables that are the pass's."""
    if first is not None:
        rows = (start - first)[:, None] + jnp.arange(heads.q.shape[1])[None]
        cos, sin = (jnp.take_along_axis(x, rows[..., None, None], 1) for x in heads.rope)
        heads = dataclasses.replace(heads, rope=(cos, sin))
    return heads.finished()


@shaped
def append(layer: LayerCache, keys: CacheKV, values: CacheKV, start: Each) -> LayerCache:
    """Write a pass's keys and values [B, K, S, D] for positions start [B] … start + S − 1.

    Rows beyond the end of the half of the ring that `start` lies in do not count (no pass that
    counts crosses a flush boundary) and are dropped: their slots still hold F1.
    """
    slots = layer.key_buffer.shape[2]
    half, slot = layer.half, start % slots
    write = _write_one if keys.shape[0] == 1 else _write_batch
    return dataclasses.replace(
        layer,
        key_buffer=write(layer.key_buffer, keys, slot, half),
        value_buffer=write(layer.value_buffer, values, slot, half),
    )


def narrowed(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x in the buffer's type. Types of 8 bits have no infinity and a small range: there values
    beyond it become its ends."""
    if jnp.dtype(dtype).itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)


def _write_one(buffer: jax.Array, new: jax.Array, slot: jax.Array, half: int) -> jax.Array:
    """Rows of one sequence, as a slice: the last window of S slots inside the half that reaches
    `slot`, in which what precedes it is kept."""
    rows = new.shape[2]
    first = jnp.minimum(slot, (slot // half + 1) * half - rows)[0]
    skip = slot[0] - first
    at = (0, 0, first, 0)
    old = jax.lax.dynamic_slice(buffer, at, new.shape)
    moved = jnp.roll(narrowed(new, buffer.dtype), skip, 2)
    kept = jnp.arange(rows)[None, None, :, None] < skip
    return jax.lax.dynamic_update_slice(buffer, jnp.where(kept, old, moved), at)


def _write_batch(buffer: jax.Array, new: jax.Array, slot: jax.Array, half: int) -> jax.Array:
    """Rows of all sequences, in one scatter however many there are."""
    b, _, rows, _ = new.shape
    row = jnp.arange(rows)[None]
    index = slot[:, None] + row
    inside = index // half == (slot // half)[:, None]
    index = jnp.where(inside, index, buffer.shape[2] + row)  # else beyond: dropped
    at = buffer.at[jnp.arange(b)[:, None], :, index]
    new = narrowed(new.swapaxes(1, 2), buffer.dtype)
    return at.set(new, mode="drop", unique_indices=True)
