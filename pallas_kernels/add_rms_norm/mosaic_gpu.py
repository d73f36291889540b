"""Residual addition and RMS norm from Ampere on (Pallas Mosaic GPU).

XLA makes three kernels of it: the sum, the mean square, the product with both weights. For the few
rows of a decode step each costs a launch and nothing else, 4 to 5 µs together; here it is one.

A block works on a row. Its threads hold the row in registers, 8 channels a thread at a time, so x
and y are read once; squares are added in the warp, then across warps through shared memory:

    thread t    channels 8 t … 8 t + 7, 8 (t + T) …     x + y → bf16 → x² →  warp → block → norm
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import ptx
from pallas_kernels.ptx import V, f32, i32

CHUNK = 8  # channels of a thread: 16 bytes of bf16
WARPGROUPS = 4  # a block at most
MOST_CHANNELS = CHUNK * 128 * WARPGROUPS * 4  # 4 chunks of each thread in registers


def unsupported(x: Any) -> str | None:
    """Why the kernel cannot do a call, or None."""
    channels = x.shape[-1]
    if x.dtype != jnp.bfloat16:
        return "activations have to be bfloat16"
    if channels % CHUNK or channels > MOST_CHANNELS:
        return f"there are {channels} channels; it takes multiples of 8 up to {MOST_CHANNELS}"
    return None


def _wide(where: V, itemsize: int) -> list[V]:
    """8 numbers as float32: bf16, or float32 rounded to bf16."""
    if itemsize == 2:
        words = ptx.load(where, 4)
    else:
        numbers = ptx.load(where, 4, "f32") + ptx.load(where + 16, 4, "f32")
        words = ptx.pack_bf16s(numbers)
    return ptx.unpack_bf16s(words)


def _block_sum(x: V, shared: V, thread: V, warps: int) -> V:
    """The sum over the block's threads, added in one order, for each of them."""
    x = ptx.over_lanes(x, operator.add)
    ptx.when((thread & 31).equals(0), lambda: ptx.store(shared + (thread >> 5) * 4, [x]))
    ptx.sync_threads(i32(1), 32 * warps)
    parts = [part for i in range(0, warps, 4) for part in ptx.load(shared + 4 * i, 4, "f32")]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _body(
    channels: int, warpgroups: int, y_itemsize: int | None, eps: float
) -> Callable[..., None]:
    """`y_itemsize`: None where nothing is added."""
    threads = 128 * warpgroups
    chunks = channels // CHUNK

    def body(addresses: Sequence[V], shared: V) -> None:
        x, *y, weight = addresses[: 2 if y_itemsize is None else 3]
        *total, normed = addresses[len(y) + 2 :]
        thread, row = ptx.special("tid.x"), ptx.special("ctaid.x")
        held: list[tuple[V, V, V, list[V]]] = []
        square = f32(0.0)
        for first in range(0, chunks, threads):
            chunk = thread + first
            inside = chunk < chunks
            # Threads past the end repeat the last chunk, and neither count nor write it.
            channel = ptx.minimum(chunk, chunks - 1) * CHUNK
            at = row.to_i64() * channels + channel.to_i64()
            sums = _wide(x + at * 2, 2)
            if y_itemsize is not None:
                added = _wide(y[0] + at * y_itemsize, y_itemsize)
                words = ptx.pack_bf16s([a + b for a, b in zip(sums, added, strict=True)])
                sums = ptx.unpack_bf16s(words)
                ptx.when(inside, functools.partial(ptx.store, total[0] + at * 2, words))
            here = f32(0.0)
            for number in sums:
                here = ptx.fma(number, number, here)
            square = square + ptx.select(inside, here, 0.0)
            held.append((inside, at, channel, sums))
        mean = _block_sum(square, shared, thread, 4 * warpgroups) * (1.0 / channels)
        factor = ptx.reciprocal_sqrt(mean + eps)
        for inside, at, channel, sums in held:
            weights = _wide(weight + (channel * 2).to_i64(), 2)
            words = ptx.pack_bf16s([a * factor * w for a, w in zip(sums, weights, strict=True)])
            ptx.when(inside, functools.partial(ptx.store, normed + at * 2, words))

    return body


def add_rms_norm(
    x: jax.Array, y: jax.Array, weight: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.add_rms_norm.api.add_rms_norm`; bf16 x."""
    total, normed = _run(x, [y if y.dtype == jnp.float32 else y.astype(x.dtype)], weight, eps)
    return total, normed


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """See `pallas_kernels.add_rms_norm.api.rms_norm`; bf16 x."""
    return _run(x, [], weight, eps)[0]


def _run(x: jax.Array, added: list[jax.Array], weight: jax.Array, eps: float) -> list[jax.Array]:
    """The sum, if something is added, and the norm."""
    channels = x.shape[-1]
    rows = x.size // channels
    warpgroups = min(WARPGROUPS, -(-channels // (CHUNK * 128)))
    out = jax.ShapeDtypeStruct((rows, channels), x.dtype)
    found = ptx.kernel(
        _body(channels, warpgroups, added[0].dtype.itemsize if added else None, eps),
        [out] * (len(added) + 1),
        name="add_rms_norm" if added else "rms_norm",
        blocks=rows,
        warpgroups=warpgroups,
        shared_bytes=64,
    )(*(part.reshape(rows, channels) for part in (x, *added)), weight.astype(x.dtype))
    return [each.reshape(x.shape) for each in found]
