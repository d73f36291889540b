"""One linear layer: 4-bit codes that keep its outputs, from moments of its inputs (GPTQ).

The layer's output on the draft's inputs x should be the target's output on its own inputs x + δ,
plus what else the target has there and the draft lacks, d (both at the same token, weight ω):

    r = Wᵀδ + d
    min Σ ω |Ŵᵀx − Wᵀx − r|²  =  min (Ŵ − W*)ᵀ H (Ŵ − W*) + constant
    H = Σ ω x xᵀ        W* = W + H⁻¹ Σ ω x rᵀ

So W* is found first, by regularized least squares, and then rounded an input channel at a time:
what rounding a channel loses is made good by the channels still to come (arXiv 2210.17323).
Groups are contiguous and their scales fixed before; channels go in the order of H's diagonal.
Both are damped well: of few thousand tokens only the strong directions of the inputs are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import QuantizedWeight, pack
from quantspec_jax.weights.calibrate.programs import program
from quantspec_jax.weights.formats import WeightFormat

HIGHEST = jax.lax.Precision.HIGHEST
BLOCK = 64  # channels rounded before the others hear of it
DAMPING = 0.3  # of H's mean diagonal, while rounding
RIDGE = 2.0  # of H's mean diagonal, in the least squares that find W*
ROUNDS = 2  # of rounding and refitting
REFIT_RIDGE = 0.001  # of each number's own term, in the least squares that refit scales
COLUMNS = 128  # output channels refitted at a time
SHRINK = (1.0, 0.92, 0.84, 0.76)  # of a group's range, either end


class Moments(NamedTuple):
    """Sums over the calibration tokens, each with its weight ω.

    gram  [Kin, Kin]  H = Σ ω x xᵀ
    miss  [Kin, N]    Σ ω x rᵀ, r what the target's weights on the draft's inputs leave to be wished
          [Kin, Kin]  or Σ ω x δᵀ, where r = Wᵀδ for several layers with the same inputs
    """

    gram: jax.Array
    miss: jax.Array


class Factor(NamedTuple):
    """What all layers with the same inputs share.

    order  [Kin]       channels by H's diagonal, largest first
    upper  [Kin, Kin]  U of (H + damping)⁻¹ = UᵀU, rows and columns in that order
    """

    order: jax.Array
    upper: jax.Array


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *operands, precision=HIGHEST)


def _damped(gram: jax.Array, share: float) -> jax.Array:
    """H with a share of its mean diagonal added to it; where all inputs are 0, the identity."""
    kin = gram.shape[0]
    mean = jnp.trace(gram) / kin
    return gram + jnp.eye(kin) * jnp.where(mean > 0, share * mean, 1)


@program()
def finite(sums: Moments) -> jax.Array:
    """Whether all sums are numbers."""
    return jnp.isfinite(sums.gram).all() & jnp.isfinite(sums.miss).all()


@program()
def factorize(gram: jax.Array) -> Factor:
    """H [Kin, Kin] → its `Factor`."""
    order = jnp.argsort(-jnp.diag(gram))
    damped = _damped(gram, DAMPING)[order][:, order]
    # U of H⁻¹ = UᵀU without an inverse: with P the reversal, P H P = L Lᵀ gives U = P L⁻¹ P.
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(order)), lower=True)
    return Factor(order, inverse[::-1, ::-1])


@program()
def correction(sums: Moments) -> jax.Array:
    """(H + damping)⁻¹ `sums.miss`: what W* adds to W, or where the miss is that of the inputs, what
    it adds to the identity before W."""
    factor = jax.scipy.linalg.cho_factor(_damped(sums.gram, RIDGE))
    return jax.scipy.linalg.cho_solve(factor, sums.miss)


def wanted(kernel: jax.Array, change: jax.Array, shared: bool) -> jax.Array:
    """W* [Kin, N] float32. `change`: the `correction`; `shared`: of moments that are those of δ."""
    w = kernel.astype(jnp.float32)
    return w + (_dot(change, w) if shared else change)


@program("stored", "shared")
def quantize_layers(
    kernels: Sequence[jax.Array],
    change: jax.Array,
    gram: jax.Array,
    factor: Factor,
    stored: WeightFormat,
    shared: bool,
) -> list[dict[str, QuantizedWeight]]:
    """The entries of linear layers [Kin, N] with the same inputs: their outputs side by side."""
    w = wanted(jnp.concatenate(list(kernels), 1), change, shared)
    ends = np.cumsum([kernel.shape[1] for kernel in kernels])[:-1]
    leaves, tree = jax.tree.flatten(quantize(w, gram, factor, stored))
    parts = zip(*(jnp.split(leaf, ends, -1) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(tree, part) for part in parts]


def quantize(
    w: jax.Array, gram: jax.Array, factor: Factor, stored: WeightFormat
) -> dict[str, QuantizedWeight]:
    """[Kin, N] → the entries of one linear layer, as `quantize_linear` of `weights.rounding`.

    Args:
      w: what the rounded weights should do, W*.
      gram: H [Kin, Kin], and its `factor`.
    """
    scale, minimum = _ranges(w, jnp.diag(gram), stored)
    if stored.bits == 8:
        return _entries(_round(w, factor, scale, minimum, stored), scale, minimum, stored)
    damped = _damped(gram, DAMPING)

    def improve(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scale, minimum, codes = state
        (codes,) = _round(w, factor, scale, minimum, stored)
        return *_refit(w, damped, codes, scale, minimum, stored), codes

    start = scale, minimum, jnp.zeros(w.shape, jnp.int8)
    scale, minimum, codes = jax.lax.fori_loop(0, ROUNDS, improve, start)
    return _entries((codes,), scale, minimum, stored)


def _grouped(w: jax.Array, group: int) -> jax.Array:
    """[Kin, ...] → [groups, group, ...], filled up with zeros."""
    groups = -(-w.shape[0] // group)
    filled = jnp.pad(w, ((0, groups * group - w.shape[0]), *((0, 0),) * (w.ndim - 1)))
    return filled.reshape(groups, group, *w.shape[1:])


def _ranges(w: jax.Array, weight: jax.Array, stored: WeightFormat):
    """Scale and minimum of each group, bf16 [groups, N] (symmetric: minima of 0), that round to
    nearest with the least error, each channel's weighted with H's diagonal [Kin]."""
    group = stored.group_size
    rows = _grouped(w, group)
    inside = _grouped(jnp.ones(w.shape[0], bool), group)[..., None]
    weight = _grouped(weight, group)[..., None]
    low = jnp.min(rows, 1, initial=jnp.inf, where=inside)
    high = jnp.max(rows, 1, initial=-jnp.inf, where=inside)
    # 8 bits: nothing may lie farther than half a step beyond the codes, or the second plane cannot
    # make it good; symmetric ones reach to 7.5 steps on the side without −8.
    exact = (1.0, 16 / 15) if stored.symmetric else (1.0,)
    shrink = jnp.asarray(exact if stored.bits == 8 else SHRINK)
    # Asymmetric: both ends are drawn in. Symmetric: one of them gets code −8, whatever its sign.
    ends = jnp.stack([x.ravel() for x in jnp.meshgrid(shrink, shrink)], 1)
    candidates = jnp.concatenate([shrink, -shrink]) if stored.symmetric else ends

    def numbers(candidate: jax.Array) -> tuple[jax.Array, jax.Array]:
        if stored.symmetric:
            scale = candidate * jnp.maximum(-low, high) / 8
            return scale.astype(jnp.bfloat16), jnp.zeros_like(low, jnp.bfloat16)
        minimum = (candidate[0] * low).astype(jnp.bfloat16)
        span = candidate[1] * high - minimum.astype(jnp.float32)
        return (span / 15).astype(jnp.bfloat16), minimum

    def attempt(best, candidate):
        scale, minimum = numbers(candidate)
        near = _near(rows, scale[:, None], minimum[:, None], stored)[1]
        error = jnp.sum(weight * (rows - near) ** 2, 1)
        better = error < best[0]
        return (
            jnp.where(better, error, best[0]),
            jnp.where(better, scale, best[1]),
            jnp.where(better, minimum, best[2]),
        ), None

    start = (jnp.full(low.shape, jnp.inf), *numbers(candidates[0]))
    (_, scale, minimum), _ = jax.lax.scan(attempt, start, candidates)
    return scale, minimum


def _fine(scale: jax.Array) -> jax.Array:
    """The second plane's scale: its codes reach as far as what the first one leaves, ±scale/2."""
    return (scale.astype(jnp.float32) / 15).astype(jnp.bfloat16)


def _near(w: jax.Array, scale: jax.Array, minimum: jax.Array, stored: WeightFormat):
    """Codes of both planes (int8, the second None for 4 bits) and the nearest that they can say."""
    wide = scale.astype(jnp.float32)
    low = -8.0 if stored.symmetric else 0.0
    offset = minimum.astype(jnp.float32)
    upper = jnp.clip(jnp.round((w - offset) / jnp.where(wide != 0, wide, 1)), low, low + 15)
    near = offset + wide * upper
    upper = (upper - 8 - low).astype(jnp.int8)
    if stored.bits == 4:
        return (upper, None), near
    fine = _fine(scale).astype(jnp.float32)
    lower = jnp.clip(jnp.round((w - near) / jnp.where(fine != 0, fine, 1)), -8, 7)
    return (upper, lower.astype(jnp.int8)), near + fine * lower


def _round(w, factor: Factor, scale, minimum, stored: WeightFormat):
    """Codes [Kin, N] of both planes."""
    kin, n = w.shape
    filled = -(-kin // BLOCK) * BLOCK
    group_of = jnp.pad(factor.order // stored.group_size, (0, filled - kin))
    upper = jnp.eye(filled).at[:kin, :kin].set(factor.upper)
    w = jnp.pad(w[factor.order], ((0, filled - kin), (0, 0)))
    planes = 1 if stored.bits == 4 else 2

    def block(w, inputs):
        begin, group = inputs
        rows = jax.lax.dynamic_slice_in_dim(w, begin, BLOCK)
        u = jax.lax.dynamic_slice_in_dim(upper, begin, BLOCK)  # [BLOCK, Kin]
        square = jax.lax.dynamic_slice_in_dim(u, begin, BLOCK, 1)

        def channel(rows, inputs):
            i, group, u = inputs
            code, near = _near(rows[i], scale[group], minimum[group], stored)
            error = (rows[i] - near) / u[i]
            return rows - u[:, None] * error[None], (error, jnp.stack(code[:planes]))

        each = jnp.arange(BLOCK), group, square
        _, (errors, codes) = jax.lax.scan(channel, rows, each)
        return w - _dot(u.T, errors), codes

    begins = jnp.arange(0, filled, BLOCK)
    _, codes = jax.lax.scan(block, w, (begins, group_of.reshape(-1, BLOCK)))
    codes = codes.reshape(filled, planes, n)[:kin]
    codes = jnp.zeros_like(codes).at[factor.order].set(codes, unique_indices=True)
    return tuple(codes[:, plane] for plane in range(planes))


def _refit(w, gram, codes, scale, minimum, stored: WeightFormat):
    """Scale and minimum [groups, N] that are best for codes [Kin, N]: least squares under H, all
    groups of an output channel at once."""
    kin, n = w.shape
    group, groups = stored.group_size, scale.shape[0]
    filled = groups * group
    h = jnp.pad(gram, ((0, filled - kin),) * 2)
    steps = codes.astype(jnp.float32) + (0 if stored.symmetric else 8)
    wide, low = scale.astype(jnp.float32), minimum.astype(jnp.float32)
    near = jnp.repeat(wide, group, 0)[:kin] * steps + jnp.repeat(low, group, 0)[:kin]
    rest = _dot(gram, w - near)

    def columns(x: jax.Array) -> jax.Array:  # [Kin, N] → [parts, groups, group, COLUMNS]
        x = jnp.pad(x, ((0, filled - kin), (0, -n % COLUMNS)))
        return jnp.moveaxis(x.reshape(groups, group, -1, COLUMNS), 2, 0)

    ones = (jnp.arange(filled) < kin).astype(jnp.float32).reshape(1, 1, groups, group)
    by_group = jnp.sum(h.reshape(groups, group, groups, group) * ones, -1)  # H 1 of each group

    def part(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        c, r = inputs
        moved = _einsum("kgi,gin->gkn", h.reshape(filled, groups, group), c)
        normal = jnp.sum(moved.reshape(groups, groups, group, -1) * c[None], 2)  # cᵀ H c
        right = jnp.sum(c * r, 1)
        if not stored.symmetric:
            mixed = _einsum("gin,gih->ghn", c, by_group)  # cᵀ H 1
            plain = jnp.broadcast_to(by_group.sum(1)[..., None], mixed.shape)  # 1ᵀ H 1
            upper = jnp.concatenate([normal, mixed], 1)
            normal = jnp.concatenate([upper, jnp.concatenate([mixed.swapaxes(0, 1), plain], 1)])
            right = jnp.concatenate([right, r.sum(1)])
        normal = jnp.moveaxis(normal, -1, 0)
        diagonal = jnp.diagonal(normal, axis1=1, axis2=2)[..., None]
        normal += jnp.eye(len(right))[None] * jnp.where(diagonal > 0, REFIT_RIDGE * diagonal, 1)
        factor = jax.scipy.linalg.cho_factor(normal)
        return jax.scipy.linalg.cho_solve(factor, right.T[..., None])[..., 0].T

    change = jax.lax.map(part, (columns(steps), columns(rest)))  # [parts, 1 or 2 · groups, COLUMNS]
    change = jnp.moveaxis(change, 0, 1).reshape(change.shape[1], -1)[:, :n]
    scale = (wide + change[:groups]).astype(jnp.bfloat16)
    if stored.symmetric:
        return scale, minimum
    return scale, (low + change[groups:]).astype(jnp.bfloat16)


def _entries(codes, scale, minimum, stored: WeightFormat) -> dict[str, QuantizedWeight]:
    group = stored.group_size
    packed = [pack(_grouped(plane, group)) for plane in codes]
    entries = {"kernel": QuantizedWeight(packed[0], scale, None if stored.symmetric else minimum)}
    if stored.bits == 8:
        entries["residual"] = QuantizedWeight(packed[1], _fine(scale), None)
    return entries
