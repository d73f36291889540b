"""Inputs of kernel tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_attention.read import Attended, Pages, Read
from pallas_kernels.kv_attention.xla import dequantize_keys, dequantize_values
from pallas_kernels.layout import LayerCache, Planes, QuantizedWeight, pack
from pallas_kernels.products.append import Append
from pallas_kernels.products.around import Around
from pallas_kernels.quantize_pack import xla as quantize
from pallas_kernels.rope_append.heads import Heads


def attention_call(
    view: str,
    *,
    kv_heads: int,
    group: int,
    tokens: int,
    head_dim: int,
    group_size: int,
    tiles: int,
    positions: list[int],
    dtype=jnp.bfloat16,
    seed: int = 0,
):
    """Arguments of kv_attention for passes that start at `positions`, one a sequence.

    What the pass may not read is poisoned: slots of the buffer that hold no position up to the
    pass's last are NaN, and tiles past the quantized ones have NaN scales.
    """
    return _attention_call(
        view, tuple(positions), kv_heads, group, tokens, head_dim, group_size, tiles, dtype, seed
    )


@functools.partial(jax.jit, static_argnums=range(10))  # op by op it takes four times as long
def _attention_call(
    view, positions, kv_heads, group, tokens, head_dim, group_size, tiles, dtype, seed
):
    batch, full = len(positions), view == "full"
    start = np.array(positions)
    before = np.maximum(0, start // group_size - 1) * group_size
    quantized = np.zeros_like(start) if full else before
    slots = max(positions) + tokens + 3 if full else 2 * group_size
    keys = jax.random.split(jax.random.key(seed), 5)
    q = jax.random.normal(keys[0], (batch, tokens, kv_heads * group, head_dim)).astype(dtype)
    held = quantized[:, None] + (np.arange(slots) - quantized[:, None]) % slots
    readable = (held < start[:, None] + tokens)[:, None, :, None]
    buffers = [
        jnp.where(
            readable, jax.random.normal(k, (batch, kv_heads, slots, head_dim)), jnp.nan
        ).astype(dtype)
        for k in keys[1:3]
    ]
    planes: list[Planes | None] = [None, None]
    if not full:
        shape = (batch, kv_heads, tiles * group_size, head_dim)
        made = [quantize.quantize_keys, quantize.quantize_values]
        planes = [
            f(jax.random.normal(k, shape), group_size) for f, k in zip(made, keys[3:], strict=True)
        ]
        past = np.arange(tiles) >= (quantized // group_size)[:, None]
        planes = [
            p._replace(scale=jnp.where(_over_tiles(past, p.scale), jnp.nan, p.scale))
            for p in planes
            if p is not None
        ]
    as_int32 = [jnp.asarray(x, jnp.int32) for x in (quantized, start)]
    return (q, LayerCache(*planes, *buffers), *as_int32)


def _over_tiles(past: np.ndarray, numbers: jax.Array) -> np.ndarray:
    """[B, tiles] → broadcast over [B, K, tiles, ...]."""
    return past.reshape(past.shape[0], 1, past.shape[1], *[1] * (numbers.ndim - 3))


def random_pages(
    coded: Sequence[int] | np.ndarray, kv_heads: int, count: Sequence[int], places: int, seed=0
) -> Pages:
    """`count` tiles of the first `coded` of each sequence, other ones for each head; the last head
    has tile 0 wherever it has one. Places that are not used hold what is no tile."""
    rng = np.random.default_rng(seed)
    tiles = np.full((len(coded), kv_heads, places), 1 << 30, np.int32)
    for b, k in np.ndindex(tiles.shape[:2]):
        chosen = rng.permutation(coded[b])[: count[b]]
        if count[b] and k == kv_heads - 1 and 0 not in chosen:
            chosen[0] = 0
        tiles[b, k, : count[b]] = np.sort(chosen)
    return Pages(jnp.asarray(tiles), jnp.asarray(count, jnp.int32))


def lists_of(pages: Pages, kv_heads: int, tiles: int) -> np.ndarray:
    """[B, K, P]: a count without a list is of the first ones."""
    if pages.tiles is not None:
        return np.asarray(pages.tiles)
    return np.broadcast_to(np.arange(tiles), (len(pages.count), kv_heads, tiles))


def with_poison_but_in(call, pages: Pages):
    """The same call with NaN scales in tiles that are not listed."""
    q, cache, *lengths = call
    kv_heads, number = cache.keys.upper.shape[1:3]
    lists = lists_of(pages, kv_heads, number)
    used = np.arange(lists.shape[2])[None, None] < np.asarray(pages.count)[:, None, None]
    listed = ((lists[..., None] == np.arange(number)) & used[..., None]).any(2)

    def poisoned(planes: Planes) -> Planes:
        mask = listed.reshape(*listed.shape, *[1] * (planes.scale.ndim - 3))
        return planes._replace(scale=jnp.where(mask, planes.scale, jnp.nan))

    keys, values = poisoned(cache.keys), poisoned(cache.values)
    return (q, dataclasses.replace(cache, keys=keys, values=values), *lengths)


@jax.jit
def without_poison(call):
    """The same call with zeros in place of NaN, for a reference that multiplies what it masks."""
    return jax.tree.map(
        lambda x: jnp.nan_to_num(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, call
    )


_dequantize = [jax.jit(f, static_argnums=1) for f in (dequantize_keys, dequantize_values)]


def plain_attention(call, read: Read, sm_scale: float, strict: bool, pages=None) -> Attended:
    """Softmax attention of one query at a time, over the keys and values that it may see: output,
    log-sum-exp, and that of each tile."""
    q, cache, *lengths = call
    quantized, start = map(np.asarray, lengths)
    q = np.asarray(q, np.float64)
    batch, tokens, heads = q.shape[:3]
    kv_heads, slots = cache.key_buffer.shape[1:3]
    buffers = [np.asarray(x, np.float64) for x in (cache.key_buffer, cache.value_buffer)]
    out, lse, tiles, g = np.zeros(q.shape), np.full(q.shape[:3], -np.inf), 0, 1
    if cache.keys is not None:
        tiles, g = cache.keys.upper.shape[2:4]
        dense = {
            view: [
                np.asarray(f(x, view), np.float64).reshape(batch, kv_heads, tiles, g, -1)
                for f, x in zip(_dequantize, (cache.keys, cache.values), strict=True)
            ]
            for view in ("int8", read.view)
        }
    if pages is not None:
        listed, counts = lists_of(pages, kv_heads, tiles), np.asarray(pages.count)
    page_lse = np.full((*q.shape[:3], tiles), -np.inf)
    for b, h, i in np.ndindex(batch, heads, tokens):
        k, n, last = h // (heads // kv_heads), int(quantized[b]), int(start[b]) + i - strict
        chosen = range(n // g)
        if pages is not None:
            chosen = listed[b, k, : counts[b]]
        parts = [(None, [x[b, k][[p % slots for p in range(n, last + 1)]] for x in buffers])]
        for tile in chosen:
            view = "int8" if tile < read.exact_tiles else read.view
            parts.append((tile, [x[b, k, tile] for x in dense[view]]))
        scores = [x[0] @ q[b, i, h] * sm_scale for _, x in parts]
        for (tile, _), found in zip(parts, scores, strict=True):
            if tile is not None:
                page_lse[b, i, h, tile] = np.logaddexp.reduce(found)
        total = np.concatenate(scores)
        if len(total):
            lse[b, i, h] = np.logaddexp.reduce(total)
            out[b, i, h] = np.exp(total - lse[b, i, h]) @ np.concatenate([x[1] for _, x in parts])
    return Attended(out, lse, page_lse)  # type: ignore[arg-type]


def with_other_lower_planes(cache: LayerCache) -> LayerCache:
    """The same cache with every bit of its lower planes changed."""
    keys, values = (p._replace(lower=~p.lower) for p in (cache.keys, cache.values) if p is not None)
    return dataclasses.replace(cache, keys=keys, values=values)


@functools.partial(jax.jit, static_argnums=range(5))
def random_weight(
    inputs: int, outputs: int, group: int, symmetric: bool, seed: int = 0
) -> QuantizedWeight:
    """A weight of random codes."""
    groups = -(-inputs // group)
    keys = jax.random.split(jax.random.key(seed), 3)
    codes = jax.random.randint(keys[0], (groups, group, outputs), -8, 8, jnp.int8)
    numbers = [
        (0.01 * jax.random.normal(k, (groups, outputs))).astype(jnp.bfloat16) for k in keys[1:]
    ]
    return QuantizedWeight(pack(codes), numbers[0], None if symmetric else numbers[1])


def relative_error(found, expected) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; NaN if anything found is."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


HEADS = {  # what a pass of heads may be: batch, tokens, H, K, D, types of q, k, v, biases, norms
    "plain": (1, 1, 4, 2, 128, "bbb", False, False),
    "bias": (1, 5, 6, 2, 64, "fff", True, False),
    "norm": (2, 3, 2, 1, 128, "bbb", False, True),
    "all, odd": (2, 4, 3, 3, 96, "fbf", True, True),
    "wide": (1, 2, 1, 1, 256, "bfb", False, True),
}


@functools.partial(jax.jit, static_argnums=range(4))
def heads_call(
    case: str, planes: bool, start: tuple[int, ...], slots: int = 64
) -> tuple[Heads, LayerCache, jax.Array]:
    """The arguments of `rope_append`; `start` a position for each of two sequences."""
    batch, tokens, h, k, d, types, bias, norm = HEADS[case]
    keys = iter(jax.random.split(jax.random.key(7), 16))

    def numbers(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(next(keys), shape).astype(dtype)

    dtypes = [{"b": jnp.bfloat16, "f": jnp.float32}[letter] for letter in types]
    q, *kv = (
        numbers(batch, tokens, n, d, dtype=dtype)
        for n, dtype in zip((h, k, k), dtypes, strict=True)
    )
    angles = numbers(batch, tokens, 1, d // 2, dtype=jnp.float32)
    angles = jnp.concatenate([angles, angles], -1)
    heads = Heads(
        q,
        *kv,
        biases=tuple(numbers(n * d) for n in (h, k, k)) if bias else (None,) * 3,
        norms=(numbers(d), numbers(d)) if norm else (None, None),
        rope=(jnp.cos(angles), jnp.sin(angles)),
        eps=1e-5,
        dtype=jnp.dtype(jnp.bfloat16),
    )
    # A cache's planes are not looked at but for whether there are any.
    some = Planes(*(jnp.zeros(1) for _ in range(4))) if planes else None
    buffers = (numbers(batch, k, slots, d) for _ in range(2))
    return heads, LayerCache(some, some, *buffers), jnp.array(start[:batch], jnp.int32)


APPENDS = {  # q, k and v that are finished with their products: batch, tokens, H, K, D, biases
    "one": (1, 1, 2, 1, 128, True),
    "several": (1, 5, 6, 2, 64, True),
    "batch": (2, 3, 3, 3, 64, False),
    "wide": (1, 2, 2, 1, 256, False),
}


def append_call(
    case: str, planes: bool, start: Sequence[int], ahead: bool, more: int = 0, inputs: int = 128
) -> tuple[jax.Array, list[int], Append]:
    """Activations [B, S, Kin], the outputs of q, k and v, and what finishes them. The tables have
    `more` rows, NaN, before a pass's own."""
    batch, tokens, h, k, d, bias = APPENDS[case]
    keys = iter(jax.random.split(jax.random.key(7), 8))

    def numbers(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(next(keys), shape).astype(dtype)

    outputs = [n * d for n in (h, k, k)]
    angles = numbers(batch, tokens, 1, d // 2, dtype=jnp.float32)
    angles = jnp.pad(jnp.concatenate([angles, angles], -1), ((0, 0), (more, 0), (0, 0), (0, 0)))
    own = jnp.arange(more + tokens)[None, :, None, None] >= more
    some = Planes(*(jnp.zeros(1) for _ in range(4))) if planes else None
    positions = jnp.array(start[:batch], jnp.int32)
    biases = tuple(map(numbers, outputs)) if bias else (None,) * 3
    append = Append(
        (biases[0], None, biases[2]) if case == "several" else biases,
        (jnp.where(own, jnp.cos(angles), jnp.nan), jnp.where(own, jnp.sin(angles), jnp.nan)),
        LayerCache(some, some, *(numbers(batch, k, 64, d) for _ in range(2))),
        positions,
        positions - more,
        ahead,
    )
    return numbers(batch, tokens, inputs), outputs, append


@functools.partial(jax.jit, static_argnums=range(6))
def random_around(
    parts: str, rows: int, inputs: int, outputs: int, eps: float = 1e-3, seed: int = 9
) -> Around:
    """What is named of "norm", "residual" and "gated", with random numbers."""
    keys = jax.random.split(jax.random.key(seed), 2)
    norm, residual = (
        jax.random.normal(k, shape).astype(jnp.bfloat16)
        for k, shape in zip(keys, ((inputs,), (rows, outputs)), strict=True)
    )
    return Around(
        norm if "norm" in parts else None,
        eps if "norm" in parts else 0.0,
        residual if "residual" in parts else None,
        "gated" in parts,
    )


def dense_products(x, weights: Sequence[Any], around: Around) -> list[np.ndarray]:
    """Products with dense [Kin, N] weights and what stands around them, written from the formulas
    in float64; what is rounded to bfloat16 on the way is rounded here too."""
    h = wide(x)
    if around.norm is not None:
        size = np.sqrt((h**2).mean(-1, keepdims=True) + around.eps)
        h = rounded(h / size * wide(around.norm))
    found = [h @ wide(w) for w in weights]
    if around.gated:
        gate, up = map(rounded, found)
        found = [gate / (1 + np.exp(-gate)) * up]
    if around.residual is not None:
        found = [wide(around.residual) + rounded(found[0])]
    if around.append is not None:
        found = appended(found, around.append)
    return found


def append_errors(
    found: Sequence[jax.Array], expected: Sequence[np.ndarray], append: Append
) -> list[float]:
    """Relative, of queries and of what has become of the buffers: other rows than those of the pass
    have to be as before."""
    before = [np.float64(0), *map(wide, append.buffers)]
    return [
        relative_error(wide(y) - old, exact - old)
        for y, exact, old in zip(found, expected, before, strict=True)
    ]


def wide(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def rounded(array: np.ndarray) -> np.ndarray:
    return wide(array.astype(jnp.bfloat16))


def appended(products: Sequence[np.ndarray], append: Append) -> list[np.ndarray]:
    """Queries, and the buffers: a token and a head at a time."""
    d, slots = append.channels, append.cache.key_buffer.shape[2]
    half = slots if append.cache.keys is None else slots // 2
    starts, firsts = np.asarray(append.start), np.asarray(append.first)
    cos, sin = map(wide, append.rope)
    found = []
    for product, bias in zip(products, append.biases, strict=True):
        y = rounded(product + (0 if bias is None else wide(bias)))
        found.append(y.reshape(*y.shape[:-1], -1, d))
    queries, buffers = np.zeros_like(found[0]), [wide(x).copy() for x in append.buffers]
    for b, s in np.ndindex(found[0].shape[:2]):
        row, slot = starts[b] - firsts[b] + s, starts[b] % slots + s
        kept = slot // half == starts[b] % slots // half
        for which, heads in enumerate(found):
            for h, x in enumerate(heads[b, s]):
                turned = np.concatenate([-x[d // 2 :], x[: d // 2]])
                x = x if which == 2 else x * cos[b, row, 0] + turned * sin[b, row, 0]
                if which == 0:
                    queries[b, s, h] = x
                elif kept:
                    buffers[which - 1][b, h, slot] = x
    return [queries, *buffers]
