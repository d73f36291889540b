"""Products with packed 4-bit weights in XLA, written from the formulas."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.layout import QuantizedWeight, unpack, unsigned_halves

HIGHEST = jax.lax.Precision.HIGHEST
# Rows on a GPU: that one reduction has sums for, and that are worth reading codes again for.
SUMMED_AT_ONCE, MOST_SUMMED = 4, 16


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
        low, high = unsigned_halves(weight.packed[g])
        product = jnp.matmul(x[g][:, :half], low.astype(jnp.float32), precision=HIGHEST)
        product += jnp.matmul(x[g][:, half:], high.astype(jnp.float32), precision=HIGHEST)
        return y + product * scale[g][None] + x[g].sum(-1, keepdims=True) * offset[g][None]

    return jax.lax.fori_loop(0, groups, add_group, jnp.zeros((x.shape[1], n), jnp.float32))


def on_gpu(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """As `group_by_group`, in a few launches: of few rows straight from the codes, of many by a
    weight that is unpacked for this one product."""
    groups, rows, group = x.shape
    if rows > MOST_SUMMED:
        x, weight = _bound(x, weight)
        flat = x.swapaxes(0, 1).reshape(rows, groups * group)
        return jnp.matmul(flat, dequantize(weight), precision=HIGHEST)
    parts = [x[:, i : i + SUMMED_AT_ONCE] for i in range(0, rows, SUMMED_AT_ONCE)]
    return jnp.concatenate([_summed(*_bound(part, weight)) for part in parts])


def _bound(x: jax.Array, weight: QuantizedWeight) -> tuple[jax.Array, QuantizedWeight]:
    """Both, the codes bound to x: else they would be unpacked once for several products, or before
    the loop that decodes, and kept so."""
    x, packed = jax.lax.optimization_barrier((x, weight.packed))
    return x, weight._replace(packed=packed)


def _summed(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """The sums over each group of all rows are one reduction, which reads the codes once and
    unpacks them in passing; those over the groups another one."""
    half = weight.packed.shape[1]
    scale, offset = _scale_and_offset(weight)
    low, high = (codes.astype(jnp.float32) for codes in unsigned_halves(weight.packed))
    terms = [
        x[:, r, :half, None] * low + x[:, r, half:, None] * high for r in range(x.shape[1])
    ]  # [groups, half, N] each

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
        return [p + q for p, q in zip(a, b, strict=True)]

    by_group = jax.lax.reduce(terms, [jnp.float32(0)] * len(terms), add, (1,))
    totals = x.sum(-1)  # [groups, R]
    return jnp.stack(
        [(y * scale + totals[:, r, None] * offset).sum(0) for r, y in enumerate(by_group)]
    )
