"""Full-precision keys and values to two 4-bit planes, written from the formulas, in float32.

    m̂ = min x rounded down to f16       ŝ = (max x − m̂)/15 rounded up to f16
    u = clip(⌊(x − m̂)/ŝ + 17/32⌋, 0, 15)       l = clip(round((x − m̂ − ŝ u)/(ŝ/16)), −8, 7)

Both codes are the digits of one number: round((x − m̂)/(ŝ/16)) = 16 u + l. Each operation below is
one correctly rounded float32 operation, so what comes out does not depend on how a compiler
arranges them, and a kernel that rounds its quotients correctly gets the same bits.

|x − x8| ≤ ŝ/32 and |x − x4| ≤ ŝ/2 up to float32 rounding, 2⁻²²·max|x|, for |x| ≤ 65,280. Beyond
that, where inference in float16 has no numbers either, x is read as if it were ±65,280. m̂ is less
than max(2⁻¹⁰ |m̂|, 2⁻²⁴) below the minimum, and ŝ is as near to (max x − m̂)/15: what is as small as
2⁻²⁴, float16's smallest number, is coded coarsely. Numbers below 2⁻¹²⁶ count as zero, as XLA's
arithmetic has it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import LARGEST, Planes, pack_keys, pack_values

SMALLEST_SCALE = 2.0**-24  # float16's smallest number


def _to_float16s(x: jax.Array, whole: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """float32 x made a whole number of float16's steps at its place. (Not by a conversion and back:
    XLA leaves out such.)"""
    exponent = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7F800000)
    power = jax.lax.bitcast_convert_type(exponent, jnp.float32)  # of two, not above |x|
    step = jnp.maximum(power * 2.0**-10, 2.0**-24)
    return whole(x / step) * step


def round_down_to_f16(x: jax.Array) -> jax.Array:
    """The largest float16 number ≤ x, for |x| ≤ 65,504, as float32."""
    return _to_float16s(x, jnp.floor)


def round_up_to_f16(x: jax.Array) -> jax.Array:
    """The smallest float16 number ≥ x, for |x| ≤ 65,504, as float32."""
    return _to_float16s(x, jnp.ceil)


def _divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """x/y, correctly rounded, for finite x.

    A quotient by a number that XLA sees to be broadcast becomes a product with its rounded
    reciprocal on the CPU, one unit off in every fourth case. The sum hides that.
    """
    return x / (y + 0 * x)


def _float32(x: jax.Array) -> jax.Array:
    """x as float32. Rounding it again, to the digits that it has, keeps XLA from leaving out the
    rounding to x's type that was just before: the codes are those of the numbers that are stored.
    """
    if x.dtype == jnp.float32:
        return x
    kind = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), kind.nexp, kind.nmant)


def _quantize(
    x: jax.Array, axis: int, valid: np.ndarray | None = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Codes (u − 8, l) of x's shape, and (ŝ, m̂) with `axis` of length 1: a group along `axis`."""
    x = jnp.clip(_float32(x), -LARGEST, LARGEST)
    in_group = True if valid is None else valid
    low = jnp.min(x, axis, keepdims=True, initial=jnp.inf, where=in_group)
    high = jnp.max(x, axis, keepdims=True, initial=-jnp.inf, where=in_group)
    m = round_down_to_f16(low)
    span = high - m
    smallest = jnp.maximum(_divide(span, 15), SMALLEST_SCALE)
    scale = jnp.where(span > 0, round_up_to_f16(smallest), 0.0)
    # Where ŝ is 0 so is x − m̂: any divisor gives code 0.
    s = jnp.where(span > 0, scale, 1.0)
    # x ≥ low; saying so keeps x − m̂ from being contracted with a product that x may be.
    offset = jnp.maximum(x, low) - m
    code = jnp.clip(jnp.round(_divide(offset, s / 16)), 0, 240).astype(jnp.uint8) + 8
    upper, lower = (code >> 4).astype(jnp.int8) - 8, (code & 15).astype(jnp.int8) - 8
    return upper, lower, scale.astype(jnp.float16), m.astype(jnp.float16)


def quantize_keys(keys: jax.Array, group_size: int) -> Planes:
    """[B, K, T, D] keys after RoPE, T a multiple of G → planes. Groups: G tokens of a channel."""
    b, k, t, d = keys.shape
    tiles = keys.reshape(b, k, t // group_size, group_size, d)
    upper, lower, scale, minimum = _quantize(tiles, axis=-2)
    return Planes(pack_keys(upper), pack_keys(lower), scale[..., 0, :], minimum[..., 0, :])


def value_groups(head_dim: int, group_size: int) -> tuple[int, int]:
    """(channels a group, groups a token): min(G, D) channels, the last group shorter if need be."""
    width = min(group_size, head_dim)
    return width, -(-head_dim // width)


def quantize_values(values: jax.Array, group_size: int) -> Planes:
    """[B, K, T, D] values, T a multiple of G → planes. Groups: min(G, D) channels of a token."""
    b, k, t, d = values.shape
    width, groups = value_groups(d, group_size)
    padded = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, groups * width - d)))
    grouped = padded.reshape(b, k, t // group_size, group_size, groups, width)
    valid = (np.arange(groups * width) < d).reshape(groups, width)
    upper, lower, scale, minimum = _quantize(grouped, axis=-1, valid=valid)

    def tile(codes: jax.Array) -> jax.Array:
        flat = codes.reshape(b, k, t // group_size, group_size, groups * width)
        return pack_values(flat[..., :d])

    def by_token(numbers: jax.Array) -> jax.Array:
        return jnp.swapaxes(numbers[..., 0], -1, -2)

    return Planes(tile(upper), tile(lower), by_token(scale), by_token(minimum))
