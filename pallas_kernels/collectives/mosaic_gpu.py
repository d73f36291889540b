"""Meetings of devices that write into each other's memory (Pallas Mosaic GPU).

Each layer over devices has one or two, of the few rows of a decode step: a collective is latency
then. Here each device writes its part into the *mailboxes* of all (`mailboxes`; a one-shot
collective), each number with a mark, and reads what has come into its own:

    device 0   part of block b ──┬─► mailbox 0, b, place 0        device 1   ...
                                 └─► mailbox 1, b, place 0

That is one launch, with what follows: the sum with the residual stream, the weights of a merge. The
sums of o and down are the end of the products' own launches (`products.sums`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import ptx
from pallas_kernels.collectives.mailboxes import MOST_BLOCKS, devices_of
from pallas_kernels.collectives.meeting import Meeting, total
from pallas_kernels.ptx import V, f32, i32

THREADS = 128
QUAD = 4  # results of a thread
MOST_NUMBERS = MOST_BLOCKS // 2 * THREADS * QUAD
LOG2_E = 1.4426950408889634


def unsupported(part: Any) -> str | None:
    """Why the kernels cannot do a call with such a part of each device, or None."""
    if part.shape[-1] % QUAD:
        return f"there are {part.shape[-1]} channels; they take multiples of {QUAD}"
    if part.size > MOST_NUMBERS:
        return f"there are {part.size} numbers; they take up to {MOST_NUMBERS}"
    return None


def _meet(thread: V, table: V, devices: int, numbers: Sequence[V]) -> list[list[V]]:
    """Of each device of the group what this thread's counterpart there has sent, as this has."""
    meeting = Meeting(table, devices)
    meeting.send(thread, numbers)
    found = meeting.received(thread, len(numbers))
    ptx.sync_threads(i32(1), THREADS)
    meeting.leave(thread)
    return found


def _quad(thread: V, numbers: int) -> V:
    """The first of a thread's numbers. Threads past the end repeat the last ones."""
    index = ptx.special("ctaid.x") * THREADS + thread
    return ptx.minimum(index * QUAD, numbers - QUAD)


def _sum(numbers: int, devices: int) -> Callable[..., None]:
    def body(given: Sequence[V], shared: V) -> None:
        y, table, *residual, out = given
        thread = ptx.special("tid.x")
        at = _quad(thread, numbers).to_i64()
        part = ptx.load(y + at * 4, QUAD, "f32")
        stream = [ptx.load(x + at * 2, 2) for x in residual]  # asked for before the others' parts
        words = ptx.pack_bf16s(total(_meet(thread, table, devices, part)))
        for halves in stream:
            sums = zip(ptx.unpack_bf16s(halves), ptx.unpack_bf16s(words), strict=True)
            words = ptx.pack_bf16s([a + b for a, b in sums])
        ptx.store(out + at * 2, words)

    return body


def all_reduce(y: jax.Array, peers: jax.Array, residual: jax.Array | None) -> jax.Array:
    """See `pallas_kernels.collectives.api.all_reduce`; y float32, the result bfloat16."""
    table, more = peers.reshape(-1), [] if residual is None else [residual]
    out = jax.ShapeDtypeStruct(y.shape, jnp.bfloat16)
    return _launch(_sum(y.size, devices_of(table.size)), "all_reduce", [out], y, table, *more)[0]


def _gather(numbers: int, channels: int, devices: int) -> Callable[..., None]:
    def body(given: Sequence[V], shared: V) -> None:
        x, table, out = given
        thread = ptx.special("tid.x")
        quad = _quad(thread, numbers)
        row, column = quad // channels, quad % channels
        own = ptx.load(x + quad.to_i64() * 4, QUAD, "f32")
        for device, part in enumerate(_meet(thread, table, devices, own)):
            at = row * (devices * channels) + column + device * channels
            ptx.store(out + at.to_i64() * 4, part)

    return body


def all_gather(x: jax.Array, peers: jax.Array) -> jax.Array:
    """See `pallas_kernels.collectives.api.all_gather`; x float32."""
    table, channels = peers.reshape(-1), x.shape[-1]
    devices = devices_of(table.size)
    out = jax.ShapeDtypeStruct((*x.shape[:-1], devices * channels), jnp.float32)
    return _launch(_gather(x.size, channels, devices), "all_gather", [out], x, table)[0]


def _merge(numbers: int, head_dim: int, devices: int) -> Callable[..., None]:
    def body(given: Sequence[V], shared: V) -> None:
        part, sums, table, out, whole = given
        thread = ptx.special("tid.x")
        quad = _quad(thread, numbers)
        at, head = quad.to_i64(), (quad // head_dim).to_i64() * 4
        own = ptx.load(part + at * 4, QUAD, "f32") + ptx.load(sums + head, 1, "f32")
        met = _meet(thread, table, devices, [*own, f32(0.0)])
        most = met[0][QUAD]
        for each in met[1:]:
            most = ptx.maximum(most, each[QUAD])
        seen = most > float("-inf")  # else the differences would be NaN
        highest = ptx.select(seen, most, 0.0)
        weights = [ptx.exp2((each[QUAD] - highest) * LOG2_E) for each in met]
        (whole_weight,) = total([[weight] for weight in weights])
        merged = [f32(0.0)] * QUAD
        for weight, each in zip(weights, met, strict=True):
            merged = [ptx.fma(weight, x, y) for x, y in zip(each[:QUAD], merged, strict=True)]
        scale = ptx.select(seen, f32(1.0) / whole_weight, 0.0)
        ptx.store(out + at * 2, ptx.pack_bf16s([x * scale for x in merged]))
        log_sum_exp = highest + ptx.log2(whole_weight) * (1 / LOG2_E)
        first = (quad % head_dim).equals(0)
        ptx.when(first, lambda: ptx.store(whole + head, [log_sum_exp]))

    return body


def merge(out: jax.Array, log_sum_exp: jax.Array, peers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.collectives.api.merge`; the merged output is bfloat16."""
    table = peers.reshape(-1)
    forms = [
        jax.ShapeDtypeStruct(out.shape, jnp.bfloat16),
        jax.ShapeDtypeStruct(log_sum_exp.shape, jnp.float32),
    ]
    body = _merge(out.size, out.shape[-1], devices_of(table.size))
    merged, whole = _launch(body, "merge_parts", forms, out, log_sum_exp, table)
    return merged, whole


def _launch(
    body: Callable[..., None], name: str, out_type: list[Any], part: jax.Array, *more: jax.Array
) -> tuple[jax.Array, ...]:
    blocks = -(-part.size // (THREADS * QUAD))
    return ptx.kernel(body, out_type, name=name, blocks=blocks, warpgroups=1)(part, *more)
