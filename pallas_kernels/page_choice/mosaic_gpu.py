"""Votes for pages and the choice among them from Ampere on (Pallas Mosaic GPU).

What XLA makes of it are launches by the layer, two sorts, and a copy of each layer's list: 72 for
32 layers, whose gaps cost more than their work. Here all layers are one launch each, which is given
an operand or a result a layer, and picks the one that its block works on.

Votes: a block has 128 pages of a layer, sequence and key-value head, a thread each. A page's log
sums lie together, parts and rows; their references, −log-sum-exp of the row, lie in shared memory,
−∞ for a row that does not vote:

    Σ 2^(log sum · log2 e + reference)        over a page's parts and rows

Choice: a block has all pages of a layer, sequence and key-value head, a thread some that follow
each other. Votes are sums of masses, none below 0: their bits have their order. The vote of the
last page that is chosen is found bit by bit, each time by counting the pages that have as much;
then each page's place in the list is the number of those chosen before it:

    thread    0        1        2            counts of pages above and at the last vote, in one word
    page      0 1 2    3 4 5    6 7 8        place: those above before it, and of those at it as
    chosen    x   x      x                          many as there is room for
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import ptx
from pallas_kernels.kv_attention.read import ByPage
from pallas_kernels.ptx import V, f32, i32

THREADS = 128  # of a block that counts votes, a page each
MOST_LAYERS = 128  # of a launch: a kernel takes 4 KB of addresses
MOST_WARPGROUPS = 4
PAGES = 16  # of a thread that chooses, before there are more threads: they share each sum
MOST_PAGES = 1 << 15  # two counts in a word
AT_ONCE = 8  # reads in flight
ALWAYS, MOST_BITS, NEVER = 0x7FFFFFFF, 0x7FFFFFFE, -1  # for a vote's bits


def votes_unsupported(seen: Sequence[ByPage]) -> str | None:
    """Why the kernel cannot do a call, or None."""
    forms = {(each.log_sums.parts.shape, each.log_sums.tokens) for each in seen}
    return "layers differ in their heads or parts" if len(forms) > 1 else None


def choice_unsupported(votes: Any) -> str | None:
    """Why the kernel cannot do a call, or None."""
    if votes.shape[-1] > MOST_PAGES:
        return f"there are {votes.shape[-1]} pages; it takes up to {MOST_PAGES}"
    return None


def _one_of(addresses: Sequence[V], index: V) -> V:
    """The address of that number."""
    found = addresses[0]
    for i, address in enumerate(addresses[1:], 1):
        found = ptx.select(index.equals(i), address, found)
    return found


# Votes -------------------------------------------------------------------------------------------


def _votes_body(
    layers: int, shape: tuple[int, ...], tokens: int
) -> Callable[[Sequence[V], V], None]:
    _, kv_heads, tiles, _, rows = shape
    of_page = math.prod(shape[3:])
    words = math.gcd(of_page, 4)  # of a read
    step = words * max(n for n in range(1, AT_ONCE + 1) if of_page // words % n == 0)
    group, chunks = rows // tokens, -(-tiles // THREADS)

    def body(addresses: Sequence[V], shared: V) -> None:
        parts, log_sum_exps = addresses[:layers], addresses[layers : 2 * layers]
        last_at, written_at, votes = addresses[2 * layers :]
        thread, block = ptx.special("tid.x"), ptx.special("ctaid.x")
        row, tile = block // chunks, block % chunks * THREADS + thread
        k, layer, b = row % kv_heads, row // kv_heads % layers, row // (kv_heads * layers)
        (last,) = ptx.load(last_at + (b * 4).to_i64(), 1)
        (written,) = ptx.load(written_at + (b * 4).to_i64(), 1)
        log_sum_exp = _one_of(log_sum_exps, layer)

        def refer(i: V, carry: list[V]) -> list[V]:
            token, head = i % rows % tokens, i % rows // tokens
            index = (b * tokens + token) * (kv_heads * group) + k * group + head
            (found,) = ptx.load(log_sum_exp + (index * 4).to_i64(), 1, "f32")
            reference = ptx.select(token <= last, found * -math.log2(math.e), f32(-math.inf))
            ptx.store(shared + i * 4, [reference])
            return carry

        ptx.loop(thread, i32(of_page), [], refer, step=THREADS)
        ptx.sync_threads(i32(1), THREADS)
        # Threads past the end repeat the last page, and do not write it.
        page = (b * kv_heads + k) * tiles + ptx.minimum(tile, tiles - 1)
        at = _one_of(parts, layer) + page.to_i64() * (4 * of_page)

        def add(first: V, carry: list[V]) -> list[V]:
            total = carry[0]
            places = range(0, step, words)
            sums = [ptx.load(at + ((first + i) * 4).to_i64(), words, "f32") for i in places]
            references = [ptx.load(shared + (first + i) * 4, words, "f32") for i in places]
            for each, under in zip(sums, references, strict=True):
                for x, reference in zip(each, under, strict=True):
                    total = total + ptx.exp2(ptx.fma(x, f32(math.log2(math.e)), reference))
            return [total]

        (total,) = ptx.loop(i32(0), i32(of_page), [f32(0.0)], add, step=step)
        vote = ptx.select(tile < written, total, f32(0.0))
        where = votes + (row * tiles + tile).to_i64() * 4
        ptx.when(tile < tiles, lambda: ptx.store(where, [vote]))

    return body


def page_votes(seen: Sequence[ByPage], last: jax.Array) -> jax.Array:
    """See `pallas_kernels.page_choice.api.page_votes`."""
    some = [_votes(seen[i : i + MOST_LAYERS], last) for i in range(0, len(seen), MOST_LAYERS)]
    return some[0] if len(some) == 1 else jnp.concatenate(some, 1)


def _votes(seen: Sequence[ByPage], last: jax.Array) -> jax.Array:
    sums = seen[0].log_sums
    batch, kv_heads, tiles = sums.parts.shape[:3]
    layers = len(seen)
    (votes,) = ptx.kernel(
        _votes_body(layers, sums.parts.shape, sums.tokens),
        [jax.ShapeDtypeStruct((batch, layers, kv_heads, tiles), jnp.float32)],
        name="page_votes",
        blocks=batch * layers * kv_heads * -(-tiles // THREADS),
        warpgroups=THREADS // 128,
        shared_bytes=4 * math.prod(sums.parts.shape[3:]),
    )(
        *[each.log_sums.parts.reshape(-1) for each in seen],
        *[each.log_sum_exp.reshape(-1) for each in seen],
        last,
        sums.written,
    )
    return votes


# The choice --------------------------------------------------------------------------------------


def _choice_body(
    form: tuple[int, ...], places: int, ends: tuple[int, int], warpgroups: int
) -> Callable[[Sequence[V], V], None]:
    layers, kv_heads, tiles = form
    threads, warps = 128 * warpgroups, 4 * warpgroups
    each = -(-tiles // threads)

    def body(addresses: Sequence[V], shared: V) -> None:
        votes, coded_at, count_at, *lists = addresses
        thread, row = ptx.special("tid.x"), ptx.special("ctaid.x")
        lane, warp = thread & 31, ptx.uniform(thread >> 5)
        k, layer, b = row % kv_heads, row // kv_heads % layers, row // (kv_heads * layers)
        (coded,) = ptx.load(coded_at + (b * 4).to_i64(), 1)
        (count,) = ptx.load(count_at + (b * 4).to_i64(), 1)
        first = thread * each
        keys = []
        for i in range(each):
            tile = first + i
            at = votes + (row * tiles + ptx.minimum(tile, tiles - 1)).to_i64() * 4
            (bits,) = ptx.load(at, 1)
            key = ptx.minimum(ptx.at_least(bits, 0), MOST_BITS)
            key = ptx.select(tile < ends[0], i32(ALWAYS), key)
            key = ptx.select(tile >= coded - ends[1], i32(ALWAYS), key)
            keys.append(ptx.select(tile < coded, key, i32(NEVER)))

        def of_warps(numbers: V, x: V) -> list[V]:
            """A word of each warp, for all threads; `numbers` is where they lie."""
            ptx.when(lane.equals(0), lambda: ptx.store(numbers + warp * 4, [x]))
            ptx.sync_threads(i32(1), threads)
            return [y for i in range(0, warps, 4) for y in ptx.load(numbers + 4 * i, 4)]

        def narrow(i: V, carry: list[V]) -> list[V]:
            """The next bit of the last vote. Two sets of words in turn: who writes to one has
            waited for all that read it."""
            candidate = carry[0] | (i32(1) << (i32(30) - i))
            number = i32(0)
            for key in keys:
                number = number + ptx.select(key >= candidate, i32(1), 0)
            found = of_warps(shared + (i & 1) * (4 * warps), ptx.over_lanes(number, operator.add))
            enough = functools.reduce(operator.add, found) >= count
            return [ptx.select(enough, candidate, carry[0])]

        (limit,) = ptx.loop(i32(0), i32(31), [i32(0)], narrow)
        above, equal = [key > limit for key in keys], [key.equals(limit) for key in keys]
        mine = i32(0)
        for more, same in zip(above, equal, strict=True):
            mine = mine + ptx.select(more, i32(1), 0) + ptx.select(same, i32(1 << 16), 0)
        before, total = ptx.over_lanes_before(mine, lane)
        found = of_warps(shared + 4 * warps, total)
        for i, number in enumerate(found):
            before = before + ptx.select(warp > i, number, i32(0))
        room = count - (functools.reduce(operator.add, found) & 0xFFFF)
        listed = _one_of(lists, layer) + (b * kv_heads + k).to_i64() * (4 * places)

        def pad(place: V, carry: list[V]) -> list[V]:
            ptx.store(listed + (place * 4).to_i64(), [i32(tiles)])
            return carry

        ptx.loop(count + thread, i32(places), [], pad, step=threads)
        over, level = before & 0xFFFF, before >> 16
        for i, (more, same) in enumerate(zip(above, equal, strict=True)):
            at_last = ptx.select(same, ptx.select(level < room, i32(1), 0), 0)
            chosen = ptx.select(more, i32(1), at_last)
            place = over + ptx.minimum(level, room)
            where = listed + (place * 4).to_i64()
            ptx.when(chosen > 0, functools.partial(ptx.store, where, [first + i]))
            over = over + ptx.select(more, i32(1), 0)
            level = level + ptx.select(same, i32(1), 0)

    return body


def most_voted(
    votes: jax.Array, coded: jax.Array, count: jax.Array, *, places: int, ends: tuple[int, int]
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.page_choice.api.most_voted`."""
    layers = votes.shape[1]
    if layers > MOST_LAYERS:
        some = (votes[:, i : i + MOST_LAYERS] for i in range(0, layers, MOST_LAYERS))
        run = functools.partial(most_voted, places=places, ends=ends)
        return tuple(one for part in some for one in run(part, coded, count))
    batch, _, kv_heads, tiles = votes.shape
    warpgroups = min(MOST_WARPGROUPS, -(-tiles // (128 * PAGES)))
    return ptx.kernel(
        _choice_body(votes.shape[1:], places, ends, warpgroups),
        [jax.ShapeDtypeStruct((batch, kv_heads, places), jnp.int32)] * layers,
        name="most_voted",
        blocks=batch * layers * kv_heads,
        warpgroups=warpgroups,
        shared_bytes=2 * 4 * 4 * warpgroups,
    )(votes.reshape(-1), coded, count)
