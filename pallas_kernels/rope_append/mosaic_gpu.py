"""Bias, norm, RoPE and the write into the buffer from Ampere on (Pallas Mosaic GPU).

XLA makes three to five kernels of it, which each cost a launch and nothing else; here it is one,
and none where the launch of the products does it (`products.append`), which takes few rows and has
no whole heads to norm. A warp takes one vector of a token, H queries, K keys, K values, a lane two
channels of its first half and the two that they rotate with:

    lane l    channels 2 l, 2 l + 1, 2 (l + 32) …     bias → bf16 → norm → bf16
              D/2 + the same                          rotate → bf16 → query, or slot of the buffer

A position, and the row of angles that it names, are two reads one after the other. Where launches
begin early they are made before the wait for q, k and v, if they were so for the layer before.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import ptx
from pallas_kernels.layout import LayerCache
from pallas_kernels.ptx import V, f32
from pallas_kernels.rope_append.heads import Heads
from pallas_kernels.rope_append.steps import rotated, slot_of

WARPS = 4  # a block
Numbers = list[V]  # of a lane: first half, then what each rotates with


def unsupported(heads: Heads, cache: LayerCache) -> str | None:
    """Why the kernel cannot do a call, or None."""
    head_dim = heads.q.shape[-1]
    if heads.dtype != jnp.bfloat16 or cache.key_buffer.dtype != jnp.bfloat16:
        return "activations and buffer have to be bfloat16"
    if head_dim % 4:
        return f"head_dim is {head_dim}; it takes multiples of 4"
    return None


@dataclasses.dataclass(frozen=True)
class _Warp:
    """A warp's vector; `row` of the tables is its token's."""

    channels: int
    lane: V
    row: V

    @property
    def words(self) -> list[tuple[V, V]]:
        """Of each pair of channels in the first half: the first one, and whether the lane has it
        (those past the end repeat the last)."""
        half = self.channels // 2
        pairs = [self.lane + first for first in range(0, half // 2, 32)]
        return [(ptx.minimum(pair, half // 2 - 1) * 2, pair < half // 2) for pair in pairs]

    def read(self, where: V, itemsize: int) -> Numbers:
        """Numbers of a vector in memory as float32: all first halves, then all second."""
        out = []
        for offset in (0, self.channels // 2):
            for channel, _ in self.words:
                at = where + ((channel + offset) * itemsize).to_i64()
                if itemsize == 4:
                    out += ptx.load(at, 2, "f32")
                else:
                    (word,) = ptx.load(at)
                    out += [ptx.low_bf16(word), ptx.high_bf16(word)]
        return out

    def write(self, where: V, numbers: Numbers) -> None:
        """As `read`, rounded to bfloat16."""
        words = ptx.pack_bf16s(numbers)
        for offset in (0, self.channels // 2):
            for channel, inside in self.words:
                at = where + ((channel + offset) * 2).to_i64()
                ptx.when(inside, functools.partial(ptx.store, at, [words.pop(0)]))

    def normed(self, numbers: Numbers, weights: Numbers, eps: float) -> Numbers:
        square = f32(0.0)
        inside = [here for _, here in self.words for _ in range(2)] * 2
        for number, here in zip(numbers, inside, strict=True):
            square = square + ptx.select(here, number * number, 0.0)
        square = ptx.over_lanes(square, operator.add)
        factor = ptx.reciprocal_sqrt(square * (1.0 / self.channels) + eps)
        return _rounded([x * factor * w for x, w in zip(numbers, weights, strict=True)])

    def angles(self, cos: V, sin: V) -> tuple[Numbers, Numbers]:
        """First halves of the token's rows in tables [rows, D]."""
        at = (self.row * (4 * self.channels)).to_i64()
        cosines, sines = (self.read(table + at, 4) for table in (cos, sin))
        return cosines[: len(cosines) // 2], sines[: len(sines) // 2]

    def rotated(self, numbers: Numbers, angles: tuple[Numbers, Numbers]) -> Numbers:
        half = len(numbers) // 2
        first, second = rotated(numbers[:half], numbers[half:], *angles)
        return first + second


def _rounded(numbers: Numbers) -> Numbers:
    return ptx.unpack_bf16s(ptx.pack_bf16s(numbers))


def _body(heads: Heads, slots: int, half: int, ahead: bool) -> Callable[[Sequence[V], V], None]:
    """`heads`: shapes and types alone."""
    _, tokens, num_heads, channels = heads.q.shape
    kv_heads = heads.k.shape[2]
    vectors, rows = num_heads + 2 * kv_heads, heads.rope[0].shape[1]
    present = [x is not None for x in (*heads.biases, *heads.norms)]

    def body(addresses: Sequence[V], shared: V) -> None:
        del shared
        ptx.let_next_begin()
        if not ahead:
            ptx.wait_for_launches()
        starts, firsts, cos, sin, *rest = addresses
        projected, rest = rest[:3], rest[3:]
        *others, key_buffer, value_buffer, queries = rest
        optional = [others.pop(0) if here else None for here in present]
        biases, norms = optional[:3], optional[3:]

        thread, block = ptx.special("tid.x"), ptx.special("ctaid.x")
        blocks_a_token = -(-vectors // WARPS)
        token = block // blocks_a_token
        vector = block % blocks_a_token * WARPS + ptx.uniform(thread >> 5)
        b, s = token // tokens, token % tokens
        (start,) = ptx.load(starts + b.to_i64() * 4)
        (first,) = ptx.load(firsts + b.to_i64() * 4)
        warp = _Warp(channels, thread & 31, b * rows + s + (start - first))

        def finished(which: int, head: V) -> Numbers:
            """A head of q (0), k (1) or v (2)."""
            source = (heads.q, heads.k, heads.v)[which]
            size = source.dtype.itemsize
            at = (token * source.shape[2] + head).to_i64() * (size * channels)
            bias, norm = biases[which], [*norms, None][which]
            if bias is not None:
                added = warp.read(bias + (head * (2 * channels)).to_i64(), 2)
            if norm is not None:
                weights = warp.read(norm, 2)
            if which != 2:
                angles = warp.angles(cos, sin)
            if ahead:
                ptx.wait_for_launches()
            numbers = warp.read(projected[which] + at, size)
            if bias is not None:
                numbers = [x + y for x, y in zip(numbers, added, strict=True)]
            numbers = _rounded(numbers)
            if norm is not None:
                numbers = warp.normed(numbers, weights, heads.eps)
            return numbers if which == 2 else warp.rotated(numbers, angles)

        def query() -> None:
            at = (token * num_heads + vector).to_i64() * (2 * channels)
            warp.write(queries + at, finished(0, vector))

        def buffered(which: int, buffer: V, head: V) -> None:
            slot, kept = slot_of(start, s, slots, half)
            row = (b * kv_heads + head).to_i64() * slots + slot.to_i64()
            write = functools.partial(warp.write, buffer + row * (2 * channels))
            numbers = finished(which, head)
            ptx.when(kept, lambda: write(numbers))

        key, value = vector - num_heads, vector - (num_heads + kv_heads)
        ptx.when(vector < num_heads, query)
        is_key = ptx.both(key >= 0, value < 0)
        ptx.when(is_key, lambda: buffered(1, key_buffer, key))
        is_value = ptx.both(value >= 0, value < kv_heads)
        ptx.when(is_value, lambda: buffered(2, value_buffer, value))

    return body


def rope_append(
    heads: Heads,
    cache: LayerCache,
    start: jax.Array,
    first: jax.Array | None = None,
    *,
    ahead: bool = False,
) -> tuple[jax.Array, LayerCache]:
    """See `pallas_kernels.rope_append.api.rope_append`; bf16 activations and buffer."""
    b, tokens, num_heads = heads.q.shape[:3]
    slots = cache.key_buffer.shape[2]
    vectors = num_heads + 2 * heads.k.shape[2]
    optional = [x.astype(jnp.bfloat16) for x in (*heads.biases, *heads.norms) if x is not None]
    tables = [jnp.broadcast_to(x, (b, *x.shape[1:])) for x in heads.rope]
    operands = [
        start,
        start if first is None else first,
        *tables,
        heads.q,
        heads.k,
        heads.v,
        *optional,
    ]
    queries, key_buffer, value_buffer = ptx.kernel(
        _body(heads, slots, cache.half, ahead),
        [jax.ShapeDtypeStruct(heads.q.shape, jnp.bfloat16)],
        name="rope_append",
        blocks=b * tokens * -(-vectors // WARPS),
        warpgroups=WARPS // 4,
        updated=2,
        ahead=(*range(4), *range(7, len(operands))) if ahead else (),  # all but q, k and v
    )(*operands, cache.key_buffer, cache.value_buffer)
    return queries, dataclasses.replace(cache, key_buffer=key_buffer, value_buffer=value_buffer)
