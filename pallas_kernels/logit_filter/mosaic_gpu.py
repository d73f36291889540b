"""Which tokens are left of a row of logits, from 9.0 on (Pallas Mosaic GPU).

XLA reads a row eight times to find the least score that stays, four bits at a time, three launches
each: some forty for a token. Here a row is a cluster's, whose blocks keep an equal part each in
shared memory, as integers in the order of the scores:

    block     | 0        | 1        | ...        keys of part of the row
    turn      for each value of a digit, four bits of the keys: mass and number of what has it
                 a thread's, in shared memory of its own → the block's → all blocks'
              the digit up to which what is below fits into the budget, and on with what has it

So one search finds where the budget ends, whatever is weighed: tokens (top-k), their masses
(top-p), and, of those that equal the least, tokens by their places. It is over as soon as one token
alone has the digits that are known. By masses it begins with tokens so light that all like them fit
into the budget: few digits differ above these. All sums are added in one order, so that a row gives
the same bits whichever rows are beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, ptx
from pallas_kernels.logit_filter.kept import Kept
from pallas_kernels.ptx import V, f32, i32

BLOCKS = 8  # of a cluster
WARPGROUPS = 2
WARPS, THREADS = 4 * WARPGROUPS, 128 * WARPGROUPS
MOST_BITS = 4  # of a digit; three, and eleven turns, where shared memory has no room for more
AT_ONCE = 5  # reads in flight
LEAST_KEY = -0x7F800001  # of −∞
NO_PLACE = -1 << 31  # below all keys

BIN = 8  # bytes: a mass and a number
# A place that is read is not written until all have met again: searches have two, used in turn.
INBOXES = 10
MOST_SCALE = 3e38  # 1/temperature: 0 times it is 0


def unsupported(scores: Any) -> str | None:
    """Why the kernel cannot do a call, or None."""
    device = dispatch.target()
    if not device.generation.clusters:
        return "it takes clusters, compute capability 9.0 or later"
    n = scores.shape[-1]
    if _Memory.of(n) is None:
        most = BLOCKS * ((device.shared_bytes - _Memory(0, MOST_BITS - 1).total) // 16 * 4)
        return f"there are {n} tokens in the vocabulary; it takes up to {most}"
    return None


@dataclasses.dataclass(frozen=True)
class _Memory:
    """How a block's shared memory is used: keys, then a thread's bins, a digit's of all threads
    after the other's, then the block's sums of them, then what the cluster's blocks leave it.

    Args:
      n: scores of a row.
      bits: of a digit.
    """

    n: int
    bits: int

    @classmethod
    def of(cls, n: int) -> _Memory | None:
        """With the most bits that there is room for; None: there is none."""
        room = dispatch.target().shared_bytes
        fitting = (cls(n, bits) for bits in (MOST_BITS, MOST_BITS - 1))
        return next((memory for memory in fitting if memory.total <= room), None)

    @property
    def part(self) -> int:
        """Keys of a block, a multiple of four."""
        return 4 * -(-self.n // (4 * BLOCKS))

    @property
    def digits(self) -> int:
        """Values of a digit."""
        return 1 << self.bits

    @property
    def of_digit(self) -> int:
        """Bytes of a digit's bins."""
        return THREADS * BIN

    @property
    def sums(self) -> int:
        """Bytes of a block's sums of bins; the warps' parts of other sums lie there, too."""
        return self.digits * BIN

    @property
    def inbox(self) -> int:
        """Bytes of what all blocks leave, once."""
        return BLOCKS * self.sums

    @property
    def total(self) -> int:
        """Bytes."""
        return 4 * self.part + self.digits * self.of_digit + self.sums + INBOXES * self.inbox


def _key(score: V) -> V:
    """An integer in the order of floats; −0 is 0."""
    bits = (score + 0.0).bits()
    return ptx.select(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _score(key: V) -> V:
    """What `_key` was given."""
    return ptx.select(key < 0, key ^ 0x7FFFFFFF, key).as_float()


class _Place(NamedTuple):
    """Where a search ends: keys from `key` up to `last` have the digits that were found, one of
    the row's or all that equal it, their `number`; and what weighs what is `below`."""

    key: V
    last: V
    below: V
    number: V


class _Row:
    """A thread's view of its row: who it is, and what all threads of the cluster do together.

    Args:
      memory: how the block's shared memory is used.
      shared: its address.
    """

    def __init__(self, memory: _Memory, shared: V):
        self.memory, self.n, self.part = memory, memory.n, memory.part
        self.thread, block = ptx.special("tid.x"), ptx.special("ctaid.x")
        self.rank, self.row = block % BLOCKS, block // BLOCKS
        self.lane, self.warp = self.thread & 31, ptx.uniform(self.thread >> 5)
        self.keys, self.bins = shared, shared + 4 * self.part
        self.sums = self.bins + memory.digits * memory.of_digit
        self.inboxes = self.sums + memory.sums
        self.digit = self.lane & (memory.digits - 1)

    def read(self, scores: V) -> V:
        """The block's part of the scores, as keys in its shared memory, filled up with −∞; returns
        the largest that this thread has read."""
        words = math.gcd(self.n, 4)
        step = THREADS * words
        row = scores + self.row.to_i64() * (4 * self.n)

        def some(first: V, carry: list[V]) -> list[V]:
            (most,) = carry
            at = [first + i * step for i in range(AT_ONCE)]
            index = [self.rank * self.part + i for i in at]
            read = [
                ptx.load(row + ptx.minimum(i, self.n - words).to_i64() * 4, words, "f32")
                for i in index
            ]
            for where, i, found in zip(at, index, read, strict=True):
                inside = [ptx.select(i < self.n, x, f32(-math.inf)) for x in found]
                keys = [_key(x) for x in inside]
                ptx.when(
                    where < self.part,
                    functools.partial(ptx.store, self.keys + where * 4, keys),
                )
                for x in inside:
                    most = ptx.maximum(most, x)
            return [most]

        first = self.thread * words
        (most,) = ptx.loop(first, i32(self.part), [f32(-math.inf)], some, step=AT_ONCE * step)
        return most

    def each(self, carry: Sequence[V], body: Callable[[V, V, list[V]], list[V]]) -> list[V]:
        """body(key, its place in the row, carry) for each of the thread's keys."""

        def four(first: V, carry: list[V]) -> list[V]:
            place = self.rank * self.part + first
            for i, key in enumerate(ptx.load(self.keys + first * 4, 4)):
                carry = body(key, place + i, carry)
            return carry

        return ptx.loop(self.thread * 4, i32(self.part), carry, four, step=THREADS * 4)

    def of_all(self, x: V, merge: Callable[[V, V], V], inbox: int) -> V:
        """Numbers of all threads of the cluster, merged."""
        own, box = ptx.over_lanes(x, merge), self.inboxes + inbox * self.memory.inbox
        ptx.when(self.lane.equals(0), lambda: ptx.store(self.sums + self.warp * 4, [own]))
        ptx.sync_threads(i32(1), THREADS)
        parts = [y for i in range(0, WARPS, 4) for y in ptx.load(self.sums + 4 * i, 4, "f32")]
        of_block = functools.reduce(merge, parts)
        peer = ptx.peer_address(box + self.rank * 16, self.thread & (BLOCKS - 1))
        ptx.when(self.thread < BLOCKS, lambda: ptx.store_peer(peer, [of_block] * 4))
        ptx.sync_cluster()
        blocks = [ptx.load(box + 16 * i, 1, "f32")[0] for i in range(BLOCKS)]
        return functools.reduce(merge, blocks)

    def search(
        self,
        weigh: Callable[[V], V],
        budget: V,
        end: tuple[V, V],
        bits: V,
        inbox: int,
        among: Callable[[V, V], tuple[V, V]] | None = None,
        below: V | None = None,
    ) -> _Place:
        """The largest key below which there is no more than the budget.

        Args:
          weigh: what a key weighs.
          end: (where keys begin, the largest that is allowed).
          bits: that keys differ in, one or more.
          inbox: the first of two.
          below: what weighs what is below where keys begin.
          among: of a key and its place what is searched for, and whether it counts; None: the key.
        """
        turns, digits = ptx.ceil_div(bits, self.memory.bits), self.memory.digits
        begin, most = end

        def one(i: V, carry: list[V]) -> list[V]:
            key, _, below, _, done = carry
            box = self.inboxes + ((i & 1) + inbox) * self.memory.inbox
            shift = (turns - 1 - i) * self.memory.bits

            def narrowed() -> list[V]:
                self._fill_bins(weigh, key, shift, among)
                mass, number = self._of_digits(box)
                before, _ = ptx.over_lanes_before(mass, self.lane, digits)
                step = self.digit << shift
                # Not beyond the most, of numbers without a sign.
                within = (step ^ NO_PLACE) <= ((most - key) ^ NO_PLACE)
                there = ptx.both((step >> shift).equals(self.digit), within)
                fits = ptx.both(there, below + before <= budget)
                fitting = self._over_digits(ptx.select(fits, f32(1.0), 0.0))
                place = ptx.at_least(_whole(fitting) - 1, 0)  # 0 fits, whatever rounding says

                def of_chosen(x: V) -> V:
                    return self._over_digits(ptx.select(self.digit.equals(place), x, 0.0))

                left = of_chosen(number)
                over, first = ptx.select(left <= 1.0, i32(1), 0), key + (place << shift)
                last = first + (i32(1) << shift) - 1
                return [first, last, below + of_chosen(before), left, over]

            return ptx.choose(done.equals(0), narrowed, lambda: carry, carry)

        start = [begin, most, f32(0.0) if below is None else below, f32(2.0), i32(0)]
        return _Place(*ptx.loop(i32(0), turns, start, one)[:4])

    def _fill_bins(
        self,
        weigh: Callable[[V], V],
        begin: V,
        shift: V,
        among: Callable[[V, V], tuple[V, V]] | None,
    ) -> None:
        """Of each digit this thread's mass and number, of keys from `begin` on that differ from it
        in the digit at `shift` and below."""
        own = self.bins + self.thread * BIN
        for digit in range(self.memory.digits):
            ptx.store(own + digit * self.memory.of_digit, [f32(0.0)] * 2)

        def one(key: V, place: V, carry: list[V]) -> list[V]:
            looked_for, counts = (key, None) if among is None else among(key, place)
            number = (looked_for - begin) >> shift
            inside = ptx.both(looked_for >= begin, (number >> self.memory.bits).equals(0))
            if counts is not None:
                inside = ptx.both(inside, counts)

            def add() -> None:
                where = own + number * self.memory.of_digit
                mass, count = ptx.load(where, 2, "f32")
                ptx.store(where, [mass + weigh(key), count + 1.0])

            ptx.when(inside, add)
            return carry

        self.each([], one)
        ptx.sync_threads(i32(1), THREADS)

    def _of_digits(self, box: V) -> tuple[V, V]:
        """Mass and number of this lane's digit, of the whole row."""
        own, sums = self.memory.digits // WARPS, self.memory.sums
        for i in range(own):
            digit = self.warp * own + i
            row = self.bins + digit * self.memory.of_digit + self.lane * BIN
            pairs = [ptx.load(row + j * (32 * BIN), 2, "f32") for j in range(WARPS)]
            pair = [ptx.over_lanes(_total(x), operator.add) for x in zip(*pairs, strict=True)]
            ptx.when(
                self.lane.equals(0),
                functools.partial(ptx.store, self.sums + digit * BIN, pair),
            )
        ptx.sync_threads(i32(1), THREADS)

        # Of the first warp four lanes a peer, two digits' pairs at a time.
        def leave() -> None:
            quarter = (self.lane & 3) * (sums // 4)
            peer = ptx.peer_address(box + self.rank * sums + quarter, self.lane >> 2)
            for i in range(0, sums // 4, 16):
                ptx.store_peer(peer + i, ptx.load(self.sums + quarter + i, 4, "f32"))

        ptx.when(self.warp.equals(0), leave)
        ptx.sync_cluster()
        at = box + self.digit * BIN
        pairs = [ptx.load(at + i * sums, 2, "f32") for i in range(BLOCKS)]
        mass, number = map(_total, zip(*pairs, strict=True))
        return mass, number

    def _over_digits(self, x: V) -> V:
        """The sum over a lane for each digit."""
        bits = self.memory.bits
        return ptx.over_lanes(x, operator.add, [1 << bits - 1 - i for i in range(bits)])


def _total(numbers: Sequence[V]) -> V:
    return functools.reduce(operator.add, numbers)


def _bits(x: V) -> V:
    """Of a number from 0 on, one at least."""
    zeros = ptx.asm("clz.b32 $0, $1;", ["i32"], [x])[0]
    return ptx.at_least(i32(32) - zeros, 1)


def _whole(x: V) -> V:
    """A float that is a whole number, as an integer."""
    return ptx.asm("cvt.rzi.s32.f32 $0, $1;", ["i32"], [x])[0]


def _floor(x: V) -> V:
    return ptx.asm("cvt.rmi.f32.f32 $0, $1;", ["f32"], [x])[0]


def _as_float(x: V) -> V:
    """Of an integer."""
    return ptx.asm("cvt.rn.f32.s32 $0, $1;", ["f32"], [x])[0]


def _body(memory: _Memory, tokens: int) -> Callable[[Sequence[V], V], None]:
    n = memory.n

    def body(addresses: Sequence[V], shared: V) -> None:
        scores, *wanted_at, most_at, least_at, last_at, mass_at = addresses
        row = _Row(memory, shared)
        of_sequence = (row.row // tokens * 4).to_i64()
        heat, top_p, min_p = (ptx.load(wanted_at[i] + of_sequence, 1, "f32")[0] for i in (0, 2, 3))
        (top_k,) = ptx.load(wanted_at[1] + of_sequence, 1)
        own = row.read(scores)
        ptx.sync_cluster()  # all blocks are there, and have their keys
        most = row.of_all(own, ptx.maximum, 0)
        most_key, sampled = _key(most), heat > 0.0
        divisor = ptx.select(sampled, heat, 1.0)
        scale = f32(math.log2(math.e)) / divisor
        scale = ptx.select(scale < MOST_SCALE, scale, MOST_SCALE)

        def weight(key: V) -> V:
            return ptx.exp2((_score(key) - most) * scale)

        def mass_of(holds: Callable[[V, V], V], inbox: int) -> V:
            def one(key: V, place: V, carry: list[V]) -> list[V]:
                return [carry[0] + ptx.select(holds(key, place), weight(key), 0.0)]

            (mass,) = row.each([f32(0.0)], one)
            return row.of_all(mass, operator.add, inbox)

        def by_number() -> list[V]:
            budget = _as_float(i32(BLOCKS * row.part) - top_k)
            end = (i32(NO_PLACE), most_key)
            found = row.search(lambda key: f32(1.0), budget, end, i32(32), 1)
            return [ptx.at_least(found.key, LEAST_KEY)]

        limited = ptx.both(top_k > 0, top_k < n)
        (first,) = ptx.choose(limited, by_number, lambda: [i32(LEAST_KEY)], [top_k])

        def by_mass() -> list[V]:
            share = ptx.select(sampled, f32(1.0) - top_p, 1.0)
            # All tokens together weigh 1 or more: those of less than share / n fit into the budget.
            least = ptx.log2(share * (0.5 / n)) / scale + most
            begin = ptx.at_least(ptx.minimum(_key(least), most_key), first)
            mass = mass_of(lambda key, place: key >= first, 3)
            below = mass_of(lambda key, place: ptx.both(key >= first, begin > key), 9)
            budget = share * mass
            end, bits = (begin, most_key), _bits(most_key - begin)
            found = row.search(weight, budget, end, bits, 4, below=below)
            room = ptx.maximum(budget - found.below, f32(0.0))
            stay = ptx.maximum(found.number - _floor(room / weight(found.key)), f32(1.0))
            stay = ptx.select(sampled, stay, 1.0)

            def some() -> list[V]:
                where = row.search(
                    lambda key: f32(1.0),
                    stay - 1.0,
                    (i32(0), i32(n - 1)),
                    i32(max((n - 1).bit_length(), 1)),
                    6,
                    lambda key, place: (place, key.equals(found.key)),
                )
                return [where.last]

            fewer = ptx.both(found.number > 1.0, stay < found.number)
            (last,) = ptx.choose(fewer, some, lambda: [i32(n)], [top_k])
            return [ptx.at_least(found.key, LEAST_KEY), last]

        filtered = ptx.select(sampled, ptx.select(top_p < 1.0, i32(1), 0), 1) > 0
        least, last = ptx.choose(filtered, by_mass, lambda: [first, i32(n)], [first, first])

        cut = _key(most + heat * (ptx.log2(min_p) * math.log(2)))
        higher = ptx.both(ptx.both(sampled, min_p > 0.0), cut > least)
        least, last = ptx.select(higher, cut, least), ptx.select(higher, i32(n), last)

        def left(key: V, place: V) -> V:
            at_least = ptx.select(place <= last, i32(1), 0)
            equal = ptx.select(key.equals(least), at_least, 0)
            return ptx.select(key > least, i32(1), equal) > 0

        mass = mass_of(left, 8)

        def write() -> None:
            where = (row.row * 4).to_i64()
            for at, value in (
                (most_at, most), (least_at, _score(least)), (last_at, last), (mass_at, mass),
            ):  # fmt: skip
                ptx.store(at + where, [value])

        ptx.when((row.rank * THREADS + row.thread).equals(0), write)

    return body


def kept(
    scores: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
) -> Kept:
    """See `pallas_kernels.logit_filter.api.kept`."""
    batch, tokens, n = scores.shape
    memory = _Memory.of(n)
    assert memory is not None
    number, place = (jax.ShapeDtypeStruct((batch, tokens), t) for t in (jnp.float32, jnp.int32))
    return Kept(
        *ptx.kernel(
            _body(memory, tokens),
            [number, number, place, number],
            name="logit_filter",
            blocks=batch * tokens * BLOCKS,
            warpgroups=WARPGROUPS,
            shared_bytes=memory.total,
            cluster=BLOCKS,
        )(scores.reshape(-1), temperature, top_k, top_p, min_p)
    )
