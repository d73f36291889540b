"""Products with packed 4-bit weights in XLA, written from the formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.layout import QuantizedWeight, unpack, unsigned_halves

HIGHEST = jax.lax.Precision.HIGHEST


def dequantize(weight: QuantizedWeight) -> jax.Array:
    """float32 [groups · group, N], padding rows included."""
    codes = unpack(weight.packed).astype(jnp.float32)
    scale = weight.scale.astype(jnp.float32)[:, None, :]
    if weight.minimum is None:
        w = scale * codes
    else:
        w = weight.minimum.astype(jnp.float32)[:, None, :] + scale * (codes + 8)
    return w.reshape(-1, w.shape[-1])


def int4_matmul(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """[..., Kin] times a quantized [Kin, N] → float32 [..., N].

    A group at a time, in a loop: y += scale · (x_g codes_g) + minimum · Σ x_g. So no more than one
    group is ever unpacked, and XLA cannot move the unpacking out of a loop around the product.
    """
    groups, half, n = weight.packed.shape
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    filled = jnp.pad(rows, ((0, 0), (0, 2 * half * groups - rows.shape[1])))
    by_group = filled.reshape(-1, groups, 2 * half).swapaxes(0, 1)
    scale = weight.scale.astype(jnp.float32)
    # Codes as unsigned 0..15: what the sum over a group adds besides scale · codes.
    offset = -8 * scale if weight.minimum is None else weight.minimum.astype(jnp.float32)

    def add_group(g: jax.Array, y: jax.Array) -> jax.Array:
        low, high = unsigned_halves(weight.packed[g])
        x_g = by_group[g]
        product = jnp.matmul(x_g[:, :half], low.astype(jnp.float32), precision=HIGHEST)
        product += jnp.matmul(x_g[:, half:], high.astype(jnp.float32), precision=HIGHEST)
        return y + product * scale[g][None] + x_g.sum(-1, keepdims=True) * offset[g][None]

    y = jax.lax.fori_loop(0, groups, add_group, jnp.zeros((rows.shape[0], n), jnp.float32))
    return y.reshape(*x.shape[:-1], n)
