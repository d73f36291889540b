"""Keys and values to the two 4-bit planes from Ampere on (Pallas Mosaic GPU).

One pass: bfloat16 is read once, codes and numbers are written once, 2 bytes in and 1 + 4/G out a
value; the floor is that over the copy rate. Both codes are the digits of round((x − m̂)/(ŝ/16)) + 8,
one byte. The quotient is corrected with its exact remainder, so it is the correctly rounded one and
the codes are those of the reference, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import ptx
from pallas_kernels.layout import Planes
from pallas_kernels.ptx import V, f32, i32

SMALLEST_SCALE = 2.0**-24
LARGEST_BITS = 0x477F477F  # `layout.LARGEST` in bfloat16, twice
RUN = 32  # tokens of a run of value codes
# Added to a quotient below 2²², it leaves the nearest integer, plus 8, in the low bits.
ROUND_PLUS_8 = 1.5 * 2**23 + 8


def _largest(a: V, b: V) -> V:
    return ptx.asm("max.bf16x2 $0, $1, $2;", ["i32"], [a, b])[0]


def _smallest(a: V, b: V) -> V:
    return ptx.asm("min.bf16x2 $0, $1, $2;", ["i32"], [a, b])[0]


def _clamped(words: list[V]) -> list[V]:
    """Nothing beyond ±LARGEST."""
    most, least = i32(LARGEST_BITS), i32(LARGEST_BITS | 0x80008000)
    return [_smallest(_largest(x, least), most) for x in words]


def _numbers(low: V, high: V) -> tuple[V, V, V, V, V]:
    """For a group from `low` to `high`: float16 bits of ŝ and of m̂; m̂, the negated divisor −ŝ/16,
    and the divisor's reciprocal."""
    minimum = ptx.f16_below(low)
    m, _ = ptx.unpack_f16(minimum)
    span = high - m
    some = span > 0.0
    fifteenth = ptx.asm("div.rn.f32 $0, $1, $2;", ["f32"], [span, f32(15.0)])[0]
    scale = ptx.f16_above(ptx.maximum(fifteenth, f32(SMALLEST_SCALE)))
    s, _ = ptx.unpack_f16(scale)
    divisor = ptx.select(some, s * (1 / 16), f32(1.0))
    inverse = ptx.asm("rcp.rn.f32 $0, $1;", ["f32"], [divisor])[0]
    return ptx.select(some, scale, i32(0)), minimum, m, divisor * -1.0, inverse


def _code(x: V, low: V, minus_divisor: V, inverse: V) -> V:
    """16 u + l + 8 in the low byte; the rest of the word is anything. The quotient is at most 240
    but for its rounding, since ŝ was rounded up."""
    offset = x - low
    first = offset * inverse
    rest = ptx.fma(first, minus_divisor, offset)
    quotient = ptx.fma(rest, inverse, first)
    return (quotient + ROUND_PLUS_8).bits()


def _bytes(codes: Sequence[V]) -> V:
    """The low bytes of four words, as one."""
    low = ptx.permute_bytes(codes[0], codes[1], 0x0040)
    high = ptx.permute_bytes(codes[2], codes[3], 0x0040)
    return ptx.permute_bytes(low, high, 0x5410)


def _planes(low: V, high: V) -> tuple[V, V]:
    """Four bytes of the upper and of the lower plane, from codes of low and high nibbles."""
    upper = ptx.merge_bits(high, low >> 4, 0xF0F0F0F0)
    return upper, ptx.merge_bits(high << 4, low, 0xF0F0F0F0)


def _keys_body(head_dim: int, group_size: int):
    """A block a tile. A thread has 8 channels of each half, of every few tokens."""
    across = head_dim // 16  # threads that share a token
    together = 128 // across  # tokens at once
    turns = group_size // together
    words = head_dim // 2
    tile_codes = group_size * words

    def body(addresses: Sequence[V], shared: V) -> None:
        keys, upper, lower, scale, minimum = addresses
        thread = ptx.special("tid.x")
        warp, lane = thread >> 5, thread & 31
        tile = ptx.special("ctaid.x").to_i64()
        column, first = thread % across, thread // across
        source = keys + tile * (group_size * 2 * head_dim)
        source = source + (first * (2 * head_dim) + column * 16).to_i64()
        rows = []
        for i in range(turns):
            at = source + i * together * 2 * head_dim
            rows.append(_clamped(ptx.load(at, 4) + ptx.load(at + head_dim, 4)))
        high, low = list(rows[0]), list(rows[0])
        for row in rows[1:]:
            high = [_largest(a, b) for a, b in zip(high, row, strict=True)]
            low = [_smallest(a, b) for a, b in zip(low, row, strict=True)]
        distance = across
        while distance < 32:
            high = [_largest(x, ptx.shuffle_xor_bits(x, distance)) for x in high]
            low = [_smallest(x, ptx.shuffle_xor_bits(x, distance)) for x in low]
            distance *= 2

        # Maxima and minima of the four warps, [warp][2][D/2 words]; then the numbers, [3][D].
        def put() -> None:
            for half in range(2):
                for kind, x in enumerate((high, low)):
                    at = shared + (warp * 2 + kind) * (4 * words) + column * 16 + half * head_dim
                    ptx.store(at, x[4 * half : 4 * half + 4])

        ptx.when(lane < across, put)
        ptx.sync_threads(i32(0), 128)
        numbers = shared + 4 * 2 * 4 * words

        def compute() -> None:
            pairs = []
            for kind, merge in enumerate((_largest, _smallest)):
                x = ptx.load(shared + kind * (4 * words) + thread * 4)[0]
                for w in range(1, 4):
                    other = ptx.load(shared + (2 * w + kind) * (4 * words) + thread * 4)[0]
                    x = merge(x, other)
                pairs.append(x)
            stored = []
            for i, part in enumerate((ptx.low_bf16, ptx.high_bf16)):
                *two, m, minus_divisor, inverse = _numbers(part(pairs[1]), part(pairs[0]))
                stored.append(two)
                for j, x in enumerate((m, minus_divisor, inverse)):
                    ptx.store(numbers + j * (4 * head_dim) + thread * 8 + 4 * i, [x])
            target = tile * (2 * head_dim) + (thread * 4).to_i64()
            for where, low, high in zip((scale, minimum), *stored, strict=True):
                ptx.store(where + target, [low | (high << 16)])

        ptx.when(thread < words, compute)
        ptx.sync_threads(i32(0), 128)

        mine = []
        for j in range(3):
            at = numbers + j * (4 * head_dim) + column * 32
            both = (0, 2 * head_dim)
            mine.append([x for half in both for x in ptx.load_wide(at + half, 8)])
        mine = [[x.as_float() for x in row] for row in mine]
        target = tile * tile_codes + (first * words + column * 8).to_i64()
        for i, row in enumerate(rows):
            codes = []
            for channel in range(16):
                part = ptx.high_bf16 if channel % 2 else ptx.low_bf16
                codes.append(_code(part(row[channel // 2]), *[x[channel] for x in mine]))
            out = [
                _planes(_bytes(codes[4 * j : 4 * j + 4]), _bytes(codes[8 + 4 * j : 12 + 4 * j]))
                for j in range(2)
            ]
            at = target + i * together * words
            ptx.store(upper + at, [x[0] for x in out])
            ptx.store(lower + at, [x[1] for x in out])

    return body


def _values_body(head_dim: int, group_size: int, groups: int, runs: int):
    """A warp a run of 32 tokens. A lane has D/32 neighbouring channels of every token."""
    words = head_dim // 64
    lanes = 32 // groups  # that share a group of channels
    per_tile = group_size // RUN
    run_bytes = RUN // 2 * head_dim  # of a run's codes in a plane

    def body(addresses: Sequence[V], shared: V) -> None:
        values, upper, lower, scale, minimum = addresses
        thread = ptx.special("tid.x")
        warp, lane = thread >> 5, thread & 31
        run = ptx.special("ctaid.x") * 4 + warp

        def work() -> None:
            source = values + run.to_i64() * (RUN * 2 * head_dim)
            source = source + (lane * (4 * words)).to_i64()
            rows = [_clamped(ptx.load(source + t * 2 * head_dim, words)) for t in range(RUN)]
            # Of each token the maximum and the negated minimum of this lane's channels, in a word.
            extremes = []
            for row in rows:
                high, low = row[0], row[0]
                for x in row[1:]:
                    high, low = _largest(high, x), _smallest(low, x)
                high = _largest(high, ptx.permute_bytes(high, high, 0x1032))
                low = _smallest(low, ptx.permute_bytes(low, low, 0x1032))
                extremes.append(ptx.permute_bytes(high, low ^ 0x80008000, 0x7610))
            # Across the lanes of a group; each step a lane keeps half of the tokens.
            distance = lanes // 2
            while distance:
                upper_half = (lane & distance) > 0
                half = len(extremes) // 2
                kept = []
                for a, b in zip(extremes[:half], extremes[half:], strict=True):
                    keep, send = ptx.select(upper_half, b, a), ptx.select(upper_half, a, b)
                    kept.append(_largest(keep, ptx.shuffle_xor_bits(send, distance)))
                extremes = kept
                distance //= 2
            group, mine = lane // lanes, lane % lanes
            numbers = shared + (warp * groups + group) * (16 * RUN)
            tile, part = run // per_tile, run % per_tile
            place = (tile * groups + group).to_i64() * group_size + (part * RUN).to_i64()
            for i, x in enumerate(extremes):
                token = mine * groups + i
                low, high = f32(0.0) - ptx.high_bf16(x), ptx.low_bf16(x)
                *stored, m, minus_divisor, inverse = _numbers(low, high)
                ptx.store(numbers + token * 16, [m, minus_divisor, inverse, m])
                at = (place + token.to_i64()) * 2
                for where, bits in zip((scale, minimum), stored, strict=True):
                    ptx.store_half(where + at, bits)
            ptx.sync_warp()
            channels = 2 * words
            packed: list[list[V]] = [[] for _ in range(channels)]
            for four in range(RUN // 4):
                codes: list[list[V]] = [[] for _ in range(channels)]
                for t in range(4 * four, 4 * four + 4):
                    m, minus_divisor, inverse, _ = ptx.load(numbers + 16 * t, 4, "f32")
                    for c in range(channels):
                        unpack = ptx.high_bf16 if c % 2 else ptx.low_bf16
                        x = unpack(rows[t][c // 2])
                        codes[c].append(_code(x, m, minus_divisor, inverse))
                for c in range(channels):
                    packed[c].append(_bytes(codes[c]))
            # A lane's codes lie together; pieces change lanes, so that a store writes whole lines.
            shift = (8 // channels).bit_length() - 1

            def spot(owner: V, channel: V) -> V:
                """Where a piece of 16 bytes waits: eight lanes in turn reach all banks."""
                return (owner * channels + (channel ^ ((owner >> shift) & (channels - 1)))) * 16

            waiting = shared + 4 * groups * 16 * RUN + warp * (2 * run_bytes)
            for c in range(channels):
                out = [_planes(packed[c][k], packed[c][4 + k]) for k in range(4)]
                mine = waiting + spot(lane, i32(c))
                ptx.store(mine, [x[0] for x in out])
                ptx.store(mine + run_bytes, [x[1] for x in out])
            ptx.sync_warp()
            target = run.to_i64() * run_bytes + (lane * 16).to_i64()
            for turn in range(channels):
                piece = lane + 32 * turn
                its = waiting + spot(piece // channels, piece % channels)
                ptx.store(upper + target + 512 * turn, ptx.load(its, 4))
                ptx.store(lower + target + 512 * turn, ptx.load(its + run_bytes, 4))

        ptx.when(run < runs, work)

    return body


def unsupported(x: Any, group_size: int) -> str | None:
    """Why the kernels cannot do a call, or None."""
    head_dim = x.shape[-1]
    if x.dtype != jnp.bfloat16:
        return "keys and values have to be bfloat16"
    if head_dim not in (64, 128, 256):
        return f"head_dim is {head_dim}; it takes 64, 128 and 256"
    if group_size not in (32, 64, 128):
        return f"group_size is {group_size}; it takes 32, 64 and 128"
    if x.size == 0:
        return "there is nothing to quantize"
    return None


def quantize_keys(keys: jax.Array, group_size: int) -> Planes:
    """See `pallas_kernels.quantize_pack.api.quantize_keys`."""
    b, k, t, d = keys.shape
    tiles = t // group_size
    codes = jax.ShapeDtypeStruct((b, k, tiles, group_size, d // 2), jnp.uint8)
    numbers = jax.ShapeDtypeStruct((b, k, tiles, d), jnp.float16)
    kernel = ptx.kernel(
        _keys_body(d, group_size),
        [codes, codes, numbers, numbers],
        name="quantize_keys",
        blocks=b * k * tiles,
        warpgroups=1,
        shared_bytes=4 * 2 * 2 * d + 3 * 4 * d,
    )
    return Planes(*kernel(keys))


def quantize_values(values: jax.Array, group_size: int) -> Planes:
    """See `pallas_kernels.quantize_pack.api.quantize_values`."""
    b, k, t, d = values.shape
    tiles, groups = t // group_size, -(-d // min(group_size, d))
    codes = jax.ShapeDtypeStruct((b, k, tiles, d, group_size // 2), jnp.uint8)
    numbers = jax.ShapeDtypeStruct((b, k, tiles, groups, group_size), jnp.float16)
    runs = b * k * t // RUN
    kernel = ptx.kernel(
        _values_body(d, group_size, groups, runs),
        [codes, codes, numbers, numbers],
        name="quantize_values",
        blocks=-(-runs // 4),
        warpgroups=1,
        shared_bytes=4 * (groups * 16 * RUN + 2 * (RUN // 2 * d)),
    )
    return Planes(*kernel(values))
