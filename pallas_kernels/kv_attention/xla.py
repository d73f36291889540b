"""Attention over the hierarchical cache in XLA, float32, written from the formulas.

    x4 = m̂ + ŝ (u − 1/32)            draft view, upper plane
    x8 = m̂ + ŝ u + (ŝ/16) l          target view, both planes

The planes are read a few tiles at a time and only as far as the longest sequence reaches; partial
results are merged with the running maximum and sum (online softmax, arXiv 1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.read import Attended, PageLogSums, Pages, Read
from pallas_kernels.layout import (
    LayerCache,
    Planes,
    key_halves,
    unpack_keys,
    unpack_values,
    value_halves,
)

CHUNK_TOKENS = 1024  # of the full-precision view
TILES_AT_ONCE = (3, 8)  # fewest and most: a quarter of the planes between them
# On a GPU a turn is some ten launches and waits for the host: few, and large.
GPU_CHUNK_TOKENS, GPU_TILES_AT_ONCE = 16384, 128
Weigh = Callable[[jax.Array], jax.Array]
T = TypeVar("T")


def _codes(upper: jax.Array, lower: jax.Array | None) -> jax.Array:
    """x = m̂ + ŝ · codes, from the codes u − 8 and l, int8 → float32. Exact."""
    u = upper.astype(jnp.float32) + 8
    if lower is None:
        return u - 1 / 32
    return u + lower.astype(jnp.float32) / 16


def dequantize_keys(planes: Planes, view: str) -> jax.Array:
    """Planes of n tiles → float32 [B, K, n·G, D] in `view` int8 or int4."""
    lower = unpack_keys(planes.lower) if view == "int8" else None
    codes = _codes(unpack_keys(planes.upper), lower)
    scale = planes.scale.astype(jnp.float32)[..., None, :]
    minimum = planes.minimum.astype(jnp.float32)[..., None, :]
    x = minimum + scale * codes
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def dequantize_values(planes: Planes, view: str) -> jax.Array:
    """As `dequantize_keys`; the groups run over the channels of a token."""
    lower = unpack_values(planes.lower) if view == "int8" else None
    codes = _codes(unpack_values(planes.upper), lower)
    head_dim, group_size = codes.shape[-1], codes.shape[-2]
    width = min(group_size, head_dim)

    def by_channel(numbers: jax.Array) -> jax.Array:  # [..., V, G] → [..., G, D]
        return jnp.repeat(jnp.swapaxes(numbers, -1, -2), width, -1)[..., :head_dim]

    scale = by_channel(planes.scale.astype(jnp.float32))
    x = by_channel(planes.minimum.astype(jnp.float32)) + scale * codes
    return x.reshape(*x.shape[:2], -1, head_dim)


class Partial(NamedTuple):
    """Attention over part of the keys: before division, with what it takes to merge two parts."""

    maximum: jax.Array  # [B, K, R] of the scores
    total: jax.Array  # [B, K, R] Σ exp(score − maximum)
    output: jax.Array  # [B, K, R, D] Σ exp(score − maximum) v


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
    """In float32 on every backend (a GPU's default is TF32)."""
    return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)


def _merge(state: Partial, scores: jax.Array, mask: jax.Array, weigh: Weigh) -> Partial:
    """Merge tokens with scores [B, K, R, t], where `mask` [B, K, R, t] admits them, into `state`.
    `weigh`: weights [B, K, R, t] → [B, K, R, D], the weighted sum of the tokens' values."""
    scores = jnp.where(mask, scores, -jnp.inf)
    maximum = jnp.maximum(state.maximum, scores.max(-1))
    # A row that has seen no key yet has maximum −∞; subtracting 0 keeps its weights 0, not NaN.
    origin = jnp.where(jnp.isfinite(maximum), maximum, 0.0)
    weights = jnp.exp(scores - origin[..., None])
    decay = jnp.exp(state.maximum - origin)
    return Partial(
        maximum,
        state.total * decay + weights.sum(-1),
        state.output * decay[..., None] + weigh(weights),
    )


def _digits(upper: jax.Array, lower: jax.Array | None) -> jax.Array:
    """(x − m̂)/ŝ in float32 from unsigned codes u and l + 8. Exact: both codes make one byte first,
    16 u + l + 8, so that only one number is converted."""
    if lower is None:
        return upper.astype(jnp.float32) - 1 / 32
    return ((upper << 4) | lower).astype(jnp.float32) / 16 - 0.5


def _halves(planes: Planes, view: str, split: Callable) -> tuple[jax.Array, jax.Array]:
    """Both halves of a tile that share bytes, as `split` gives them, converted to float32. Never
    joined: joining costs more than the products with them."""
    if view == "int4":  # the draft never touches the lower plane
        low, high = split(planes.upper)
        return _digits(low, None), _digits(high, None)
    return tuple(map(_digits, split(planes.upper), split(planes.lower)))  # type: ignore[return-value]


def _key_scores(q: jax.Array, keys: Planes, view: str) -> jax.Array:
    """[B, K, R, D] queries, n tiles → scores [B, K, R, n·G]: (q ŝ)·codes + q·m̂, a tile at a time,
    with the scales of a tile's channels folded into the query."""
    b, k, rows, d = q.shape
    scaled = q[:, :, None] * keys.scale.astype(jnp.float32)[..., None, :]  # [B, K, n, R, D]
    low, high = _halves(keys, view, key_halves)
    scores = _einsum("bknrd,bkngd->bkrng", scaled[..., : d // 2], low)
    scores += _einsum("bknrd,bkngd->bkrng", scaled[..., d // 2 :], high)
    scores += _einsum("bkrd,bknd->bkrn", q, keys.minimum.astype(jnp.float32))[..., None]
    return scores.reshape(b, k, rows, -1)


def _weigh_values(weights: jax.Array, values: Planes, view: str) -> jax.Array:
    """[B, K, R, n·G] weights, n tiles → [B, K, R, D]: Σ (w ŝ) codes + Σ w m̂, with a token's scale
    folded into its weight."""
    b, k, n, groups, g = values.scale.shape
    rows = weights.shape[2]
    low, high = _halves(values, view, value_halves)  # [B, K, n, runs, D, W/2]
    runs, d, half = low.shape[3:]
    width = min(g, d)
    by_tile = weights.reshape(b, k, rows, n, g)
    parts = []
    for i in range(groups):
        scaled = by_tile * values.scale[:, :, None, :, i].astype(jnp.float32)
        scaled = scaled.reshape(b, k, rows, n, runs, 2, half)
        channels = slice(i * width, (i + 1) * width)
        part = _einsum("bkrnie,bknide->bkrd", scaled[..., 0, :], low[..., channels, :])
        part += _einsum("bkrnie,bknide->bkrd", scaled[..., 1, :], high[..., channels, :])
        minimum = values.minimum[:, :, :, i].astype(jnp.float32)
        parts.append(part + _einsum("bkrng,bkng->bkr", by_tile, minimum)[..., None])
    return jnp.concatenate(parts, -1)


def _turns(turns: jax.Array, most: int, body: Callable[[jax.Array, T], T], state: T) -> T:
    """`turns` turns of a body that masks what is not there; one at most is no loop on a GPU."""
    if most == 1 and jax.default_backend() == "gpu":
        return body(jnp.int32(0), state)
    return jax.lax.fori_loop(0, turns, body, state)


class Rows(NamedTuple):
    """All rows that read one key-value head: R = H/K · S of them, query heads first."""

    queries: jax.Array  # [B, K, R, D] float32, times the factor on the scores
    position: jax.Array  # [B, R, 1] last position that each sees
    shape: tuple[int, int, int, int]  # B, S, H, K

    def by_token(self, x: jax.Array) -> jax.Array:
        """[B, K, R, ...] → [B, S, H, ...]."""
        b, s, h, k = self.shape
        x = x.reshape(b, k, h // k, s, *x.shape[3:])
        return jnp.moveaxis(x, 3, 1).reshape(b, s, h, *x.shape[4:])


def _rows(q: jax.Array, start: jax.Array, k: int, sm_scale: float, strict: bool) -> Rows:
    b, s, h, d = q.shape
    grouped = q.astype(jnp.float32).reshape(b, s, k, h // k, d).transpose(0, 2, 3, 1, 4)
    last = start[:, None] + jnp.arange(s)[None] - int(strict)
    position = jnp.tile(last, (1, h // k))[..., None]
    return Rows(grouped.reshape(b, k, h // k * s, d) * sm_scale, position, (b, s, h, k))


class Walk(NamedTuple):
    """What the tiles that were read so far make."""

    state: Partial
    page_log_sums: jax.Array | None  # [B, K, R, T/G]


def _attend_tiles(
    walk: Walk,
    rows: Rows,
    tiles: tuple[Planes, Planes],
    index: jax.Array,
    mask: jax.Array,
    view: str,
) -> Walk:
    """Attend to n tiles of keys and values, of the numbers `index` [B or 1, K or 1, n], in `view`;
    `mask`, of the same axes, says which of them."""
    keys, values = tiles
    g = values.scale.shape[-1]
    scores = _key_scores(rows.queries, keys, view)
    tokens = jnp.broadcast_to(jnp.repeat(mask, g, -1)[:, :, None], scores.shape)
    state = _merge(walk.state, scores, tokens, lambda w: _weigh_values(w, values, view))
    pages = walk.page_log_sums
    if pages is not None:
        by_tile = jnp.where(tokens, scores, -jnp.inf).reshape(*scores.shape[:3], -1, g)
        sums = jax.nn.logsumexp(by_tile, -1)
        b, k, r, n = sums.shape
        at = jnp.broadcast_to(index, (b, k, n))[:, :, None]
        batch, head, row = (x[..., None] for x in jnp.ogrid[:b, :k, :r])
        pages = pages.at[batch, head, row, at].max(sums)
    return Walk(state, pages)


def _attend_planes(
    walk: Walk,
    rows: Rows,
    planes: tuple[Planes, Planes],
    quantized_length: jax.Array,
    read: Read,
    pages: Pages | None,
) -> Walk:
    """Attend to the tiles that are coded, of `pages` only those listed or counted."""
    n, g = planes[0].upper.shape[2:4]
    listed = None if pages is None else pages.tiles
    count = (quantized_length // g if pages is None else pages.count)[:, None, None]  # [B, 1, 1]
    exact = min(read.exact_tiles, n)
    if exact:
        index = jnp.arange(exact)[None, None]
        if listed is None:
            mask = index < count
        else:
            chosen = jnp.arange(listed.shape[2])[None, None] < count
            found = (listed[..., None] == index[:, :, None]) & chosen[..., None]
            mask = found.any(2)
        first = jax.tree.map(lambda x: x[:, :, :exact], planes)
        walk = _attend_tiles(walk, rows, first, index, mask, "int8")

    # Of a list the work follows its length.
    places = n if listed is None else listed.shape[2]
    fewest, most = TILES_AT_ONCE
    step = min(max(n // 4, fewest), most, places)
    if jax.default_backend() == "gpu":
        step = -(-places // -(-places // GPU_TILES_AT_ONCE))

    def some(i: jax.Array, walk: Walk) -> Walk:
        # The last ones are moved back to end with the planes or list; what they repeat is masked.
        begin = jnp.minimum(i * step, places - step)
        place = begin + jnp.arange(step)[None, None]
        new = place >= i * step

        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, begin, step, 2)

        mask = new & (place < count)
        if listed is None:
            index, tiles = place, jax.tree.map(cut, planes)
        else:
            index = jnp.where(mask, cut(listed), 0)
            tiles = jax.tree.map(lambda x: _gather(x, index), planes)
        return _attend_tiles(walk, rows, tiles, index, mask & (index >= exact), read.view)

    return _turns(-(-jnp.max(count) // step), -(-places // step), some, walk)


def _gather(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """Tiles `index` [B, K, n] of [B, K, T/G, ...]."""
    if leaf.dtype == jnp.float16:  # as integers: XLA's CPU backend would convert the whole array
        bits = _gather(jax.lax.bitcast_convert_type(leaf, jnp.uint16), index)
        return jax.lax.bitcast_convert_type(bits, jnp.float16)
    b, k = (x[..., None] for x in jnp.ogrid[: leaf.shape[0], : leaf.shape[1]])
    return leaf[b, k, index]


def kv_attention(
    q: jax.Array,
    cache: LayerCache,
    quantized_length: jax.Array,
    start: jax.Array,
    *,
    read: Read,
    sm_scale: float,
    pages: Pages | None = None,
    page_log_sums: bool = False,
    strict: bool = False,
) -> Attended:
    """See `pallas_kernels.kv_attention.api.kv_attention`."""
    keys, values = cache.keys, cache.values
    b, s, _, d = q.shape
    k, length = cache.key_buffer.shape[1:3]
    rows = _rows(q, start, k, sm_scale, strict)
    r = rows.queries.shape[2]

    state = Partial(
        jnp.full((b, k, r), -jnp.inf, jnp.float32),
        jnp.zeros((b, k, r), jnp.float32),
        jnp.zeros((b, k, r, d), jnp.float32),
    )
    tiles = 0 if keys is None else keys.upper.shape[2]
    log_sums = jnp.full((b, k, r, tiles), -jnp.inf, jnp.float32) if page_log_sums else None
    if keys is not None and values is not None:
        walk = Walk(state, log_sums)
        walk = _attend_planes(walk, rows, (keys, values), quantized_length, read, pages)
        state, log_sums = walk

    # Beside planes two chunks at least: XLA's CPU backend would fuse the read of a whole buffer
    # with the append before it, and copy the buffer.
    width = min(length if keys is None else -(-length // 2), CHUNK_TOKENS)
    if jax.default_backend() == "gpu":
        width = min(length, GPU_CHUNK_TOKENS)
    first = quantized_length[:, None, None]

    def over_buffer(i: jax.Array, state: Partial) -> Partial:
        # The last chunk is moved back to end with the buffer; what it repeats is masked.
        begin = jnp.minimum(i * width, length - width)

        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, begin, width, 2).astype(jnp.float32)

        slot = begin + jnp.arange(width)[None, None]
        held = first + (slot - first) % length
        mask = ((held <= rows.position) & (slot >= i * width))[:, None]
        scores = _einsum("bkrd,bktd->bkrt", rows.queries, cut(cache.key_buffer))
        value = cut(cache.value_buffer)
        return _merge(state, scores, mask, lambda w: _einsum("bkrt,bktd->bkrd", w, value))

    used = jnp.minimum(jnp.max(start) + s, length)
    state = _turns(-(-used // width), -(-length // width), over_buffer, state)

    sums = None
    if log_sums is not None:
        by_tile = jnp.moveaxis(log_sums, 3, 2)[:, :, :, None]
        sums = PageLogSums(by_tile, jnp.full(b, tiles, jnp.int32), s)
    total = jnp.where(state.total > 0, state.total, 1.0)
    return Attended(
        rows.by_token(state.output / total[..., None]),
        rows.by_token(state.maximum + jnp.log(total)),
        sums,
    )


def ideal_bytes(view: str, tokens: int, num_kv_heads: int, head_dim: int, group_size: int) -> int:
    """Fewest bytes one sequence's pass reads of the planes: codes, scales, minima, each once."""
    planes = 2 if view == "int8" else 1
    groups = math.ceil(head_dim / min(group_size, head_dim))
    codes = 2 * planes * tokens * head_dim // 2
    numbers = 2 * 2 * (tokens // group_size * head_dim + tokens * groups)
    return num_kv_heads * (codes + numbers)
