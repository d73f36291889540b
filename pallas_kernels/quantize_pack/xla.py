"""Full-precision keys and values to two 4-bit planes, written from the formulas, in float32.

    m̂ = min x rounded down to bf16      ŝ = (max x − m̂)/15 rounded up to bf16
    u = clip(⌊(x − m̂)/ŝ + 17/32⌋, 0, 15)       l = clip(round((x − m̂ − ŝ u)/(ŝ/16)), −8, 7)

Both codes are the digits of one number: round((x − m̂)/(ŝ/16)) = 16 u + l. Each operation below is
one correctly rounded float32 operation, so what comes out does not depend on how a compiler
arranges them, and a kernel that rounds its quotients correctly gets the same bits.

|x − x8| ≤ ŝ/32 and |x − x4| ≤ ŝ/2 up to float32 rounding, 2⁻²²·max|x|, for |x| ≤ 2¹²⁶; numbers
below 2⁻¹²⁶ count as zero, as XLA's arithmetic has it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import Planes, pack_keys, pack_values

# ŝ/16 has to be a normal float32 number: XLA flushes the others to zero.
SMALLEST_SCALE = 2.0**-122


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _high_half(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def round_down_to_bf16(x: jax.Array) -> jax.Array:
    """The largest bf16 number ≤ x. A bf16 number is the upper half of a float32."""
    bits = _bits(x)
    return _high_half(jnp.where(x < 0, bits + np.uint32(0xFFFF), bits))


def round_up_to_bf16(x: jax.Array) -> jax.Array:
    """The smallest bf16 number ≥ x, for x ≥ 0."""
    return _high_half(_bits(x) + np.uint32(0xFFFF))


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
    x = _float32(x)
    in_group = True if valid is None else valid
    low = jnp.min(x, axis, keepdims=True, initial=jnp.inf, where=in_group)
    high = jnp.max(x, axis, keepdims=True, initial=-jnp.inf, where=in_group)
    minimum = round_down_to_bf16(low)
    m = minimum.astype(jnp.float32)
    span = high - m
    smallest = jnp.maximum(_divide(span, 15), SMALLEST_SCALE)
    scale = round_up_to_bf16(jnp.where(span > 0, smallest, 0.0))
    # Where ŝ is 0 so is x − m̂: any divisor gives code 0.
    s = jnp.where(span > 0, scale.astype(jnp.float32), 1.0)
    # x ≥ low; saying so keeps x − m̂ from being contracted with a product that x may be.
    offset = jnp.maximum(x, low) - m
    code = jnp.clip(jnp.round(_divide(offset, s / 16)), 0, 240).astype(jnp.uint8) + 8
    upper, lower = (code >> 4).astype(jnp.int8) - 8, (code & 15).astype(jnp.int8) - 8
    return upper, lower, scale, minimum


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
