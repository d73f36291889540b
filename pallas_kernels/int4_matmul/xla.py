"""Products with packed 4-bit weights in XLA, written from the formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.layout import QuantizedWeight, unpack, unsigned_halves

HIGHEST = jax.lax.Precision.HIGHEST
MOST_SUMMED = 16  # rows on a GPU, each of which reads the codes


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
    """[..., Kin] times a quantized [Kin, N] → float32 [..., N]: y = Σ scale · (x_g codes_g) +
    minimum · Σ x_g over the groups g."""
    groups, half, n = weight.packed.shape
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    filled = jnp.pad(rows, ((0, 0), (0, 2 * half * groups - rows.shape[1])))
    by_group = filled.reshape(-1, groups, 2 * half).swapaxes(0, 1)
    if jax.default_backend() == "gpu":
        y = on_gpu(by_group, weight)
    else:
        y = group_by_group(by_group, weight)
    return y.reshape(*x.shape[:-1], n)


def _scale_and_offset(weight: QuantizedWeight) -> tuple[jax.Array, jax.Array]:
    """[groups, N] float32: factor of the sums over codes 0..15, and of the sum over x."""
    scale = weight.scale.astype(jnp.float32)
    return scale, -8 * scale if weight.minimum is None else weight.minimum.astype(jnp.float32)


def group_by_group(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """[groups, R, group] → [R, N], in a loop: so no more than one group is ever unpacked, and XLA
    cannot move the unpacking out of a loop around the product."""
    groups, half, n = weight.packed.shape
    scale, offset = _scale_and_offset(weight)

    def add_group(g: jax.Array, y: jax.Array) -> jax.Array:
        rows, packed, scales, offsets = (
            jax.lax.dynamic_index_in_dim(each, g, keepdims=False)
            for each in (x, weight.packed, scale, offset)
        )
        low, high = unsigned_halves(packed)
        product = jnp.matmul(rows[:, :half], low.astype(jnp.float32), precision=HIGHEST)
        product += jnp.matmul(rows[:, half:], high.astype(jnp.float32), precision=HIGHEST)
        return y + product * scales[None] + rows.sum(-1, keepdims=True) * offsets[None]

    return jax.lax.fori_loop(0, groups, add_group, jnp.zeros((x.shape[1], n), jnp.float32))


def on_gpu(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """As `group_by_group`, in a few launches.

    Few rows: the sums over each group are one reduction, which unpacks codes in passing, those over
    the groups another one. Many: the product with a weight that is unpacked for it.
    """
    # Bound to x: alone, codes would be unpacked once, before the loop that decodes, and kept so.
    x, packed = jax.lax.optimization_barrier((x, weight.packed))
    weight = weight._replace(packed=packed)
    groups, rows, group = x.shape
    if rows > MOST_SUMMED:
        flat = x.swapaxes(0, 1).reshape(rows, groups * group)
        return jnp.matmul(flat, dequantize(weight), precision=HIGHEST)
    scale, offset = _scale_and_offset(weight)
    terms = [
        part[..., None] * codes.astype(jnp.float32)[:, None]  # [groups, R, group/2, N]
        for part, codes in zip(jnp.split(x, 2, -1), unsigned_halves(packed), strict=True)
    ]
    by_group = (terms[0] + terms[1]).sum(2) * scale[:, None]
    return (by_group + x.sum(-1, keepdims=True) * offset[:, None]).sum(0)
