"""The hierarchical cache: what is where, bit for bit, however it was filled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_attention.xla import dequantize_keys, dequantize_values
from quantspec_jax.cache import (
    KVCache,
    append,
    cache_bytes,
    create,
    flush,
    flush_due,
    from_prompt,
    quantized_length,
    rollback,
)
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.models.config import ModelConfig

G, HEADS, WIDTH = 16, 2, 5


def tokens(length: int, head_dim: int, seed: int = 0):
    """Keys and values [2, K, length, D]."""
    rng = np.random.default_rng(seed)
    shape = (2, HEADS, length, head_dim)
    return (rng.normal(size=shape).astype(np.float32) for _ in range(2))


_from_prompt = jax.jit(from_prompt, static_argnums=3)
_append = jax.jit(append)
_flush = jax.jit(flush)
_keys, _values = (jax.jit(f, static_argnums=1) for f in (dequantize_keys, dequantize_values))


def fill(keys, values, config: CacheConfig, prompt: list[int], lengths: list[int], pieces: int):
    """Prefill `prompt` tokens of each sequence, then append `pieces` at a time, as a decoder does:
    rows past the end of a half of the buffer are garbage and do not count."""
    start = jnp.asarray(prompt, jnp.int32)
    layer = _from_prompt(keys, values, start, config)
    cache = KVCache((layer,), start, quantized_length(start, G), G, config.codec)
    padded = [np.pad(x, ((0, 0), (0, 0), (0, WIDTH), (0, 0))) for x in (keys, values)]
    goal = np.asarray(lengths)
    while (np.asarray(cache.length) < goal).any():
        n = np.asarray(cache.length)
        count = np.minimum.reduce([np.full(2, pieces), goal - n, G - n % G])
        rows = []
        for x in padded:
            parts = [x[i : i + 1, :, n[i] : n[i] + WIDTH] for i in range(2)]
            good = (np.arange(WIDTH)[None] < count[:, None])[:, None, :, None]
            rows.append(np.where(good, np.concatenate(parts), np.float32(1e3)))
        layer = _append(cache.layers[0], *rows, cache.length)
        cache = dataclasses.replace(cache, layers=(layer,))
        cache = _flush(rollback(cache, jnp.asarray(n + count, jnp.int32)))
    return cache


def assert_same(cache: KVCache, other: KVCache) -> None:
    """Equal planes, and equal full-precision tokens, in every bit that is ever read."""
    np.testing.assert_array_equal(cache.length, other.length)
    np.testing.assert_array_equal(cache.quantized_length, other.quantized_length)
    a, b = jax.tree.map(np.asarray, (cache.layers[0], other.layers[0]))
    for i in range(2):
        q, n = int(cache.quantized_length[i]), int(cache.length[i])
        for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
            np.testing.assert_array_equal(x[i, :, : q // G], y[i, :, : q // G])
        slots = np.arange(q, n) % (2 * G)
        np.testing.assert_array_equal(a.key_buffer[i][:, slots], b.key_buffer[i][:, slots])
        np.testing.assert_array_equal(a.value_buffer[i][:, slots], b.value_buffer[i][:, slots])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5 * G), min_size=2, max_size=2),
    fractions=st.lists(st.floats(0, 1), min_size=2, max_size=2),
    pieces=st.integers(1, WIDTH),
)
def test_any_split_into_prompt_and_appends_gives_the_same_bits(lengths, fractions, pieces):
    config = CacheConfig(6 * G, G, "int8", WIDTH)
    keys, values = tokens(5 * G, 8)
    prompt = [max(1, int(f * n)) for f, n in zip(fractions, lengths, strict=True)]
    whole = fill(keys, values, config, lengths, lengths, 1)
    assert_same(fill(keys, values, config, prompt, lengths, pieces), whole)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_positions_are_where_their_number_says(head_dim):
    """Planes below q within the bounds of the views, the last G to 2 G tokens exact."""
    config = CacheConfig(7 * G, G, "int8", WIDTH)
    keys, values = tokens(6 * G, head_dim)
    lengths = [5 * G + 3, 6 * G - 1]
    cache = fill(keys, values, config, [3 * G - 1, 1], lengths, 4)
    layer = cache.layers[0]
    for planes, dequantize, exact, buffer in (
        (layer.keys, _keys, keys, np.asarray(layer.key_buffer)),
        (layer.values, _values, values, np.asarray(layer.value_buffer)),
    ):
        x8, x4 = (np.asarray(dequantize(planes, view)) for view in ("int8", "int4"))
        largest = float(planes.scale.max())
        for i, n in enumerate(lengths):
            q = G * max(0, n // G - 1)
            assert int(cache.quantized_length[i]) == q
            error8, error4 = (float(np.abs(x[i, :, :q] - exact[i, :, :q]).max()) for x in (x8, x4))
            assert error8 <= 1.0001 * largest / 32
            assert largest / 32 < error4 <= 1.0001 * largest / 2
            slots = np.arange(q, n) % (2 * G)
            np.testing.assert_array_equal(buffer[i][:, slots], exact[i][:, q:n])


def test_a_rejection_changes_neither_planes_nor_what_is_kept():
    config = CacheConfig(6 * G, G, "int8", WIDTH)
    keys, values = tokens(5 * G, 8)
    n = 3 * G + 2
    cache = fill(keys, values, config, [n, n], [n, n], 1)
    junk = np.full((2, HEADS, WIDTH, 8), 77.0, np.float32)
    layer = _append(cache.layers[0], junk, junk, cache.length)
    rolled = rollback(dataclasses.replace(cache, layers=(layer,)), cache.length)
    assert_same(rolled, cache)


def test_rows_past_the_half_of_the_ring_are_dropped():
    """They would lie where the oldest exact tokens still are."""
    config = CacheConfig(6 * G, G, "int8", WIDTH)
    keys, values = tokens(5 * G, 8)
    for n in range(3 * G - WIDTH, 3 * G):
        cache = fill(keys, values, config, [n, n], [n, n], 1)
        junk = np.full((2, HEADS, WIDTH, 8), 77.0, np.float32)
        layer = _append(cache.layers[0], junk, junk, cache.length)
        after = dataclasses.replace(cache, layers=(layer,))
        assert_same(after, cache)
        written = int((np.asarray(layer.key_buffer) == 77.0).sum()) // (2 * HEADS * 8)
        assert written == min(WIDTH, 3 * G - n)


def test_flush_is_due_exactly_when_the_buffer_is_full():
    config = CacheConfig(6 * G, G, "int8", WIDTH)
    keys, values = tokens(5 * G, 8)
    cache = fill(keys, values, config, [2 * G - 1, 2 * G - 2], [2 * G - 1, 2 * G - 2], 1)
    longer = rollback(cache, cache.length + 1)
    assert not flush_due(cache).any()
    np.testing.assert_array_equal(flush_due(longer), [True, False])
    np.testing.assert_array_equal(_flush(longer).quantized_length, [G, 0])


MODEL = ModelConfig("llama", 100, 64, 64, 3, 8, 2, 64, 8192)


@pytest.mark.parametrize(("head_dim", "bits"), [(64, 8.4), (128, 8.26)])
def test_bytes_are_those_of_the_arrays_and_half_of_bf16(head_dim, bits):
    model = dataclasses.replace(MODEL, head_dim=head_dim)
    cache = create(model, CacheConfig(8192, dtype="bfloat16"), 2)
    parts = cache_bytes(cache, 8192)
    arrays = jax.tree.leaves(cache)
    assert parts["total"] == sum(x.nbytes for x in arrays)
    planes = parts["upper"] + parts["lower"] + parts["scales"]
    assert parts["total"] == planes + parts["buffer"]
    assert parts["bf16_equivalent"] == 2 * 2 * 2 * 8192 * head_dim * 2 * 3
    assert planes <= bits / 16 * parts["bf16_equivalent"]
    assert parts["upper"] == parts["lower"] == parts["bf16_equivalent"] // 4
    assert cache_bytes(jax.eval_shape(lambda: cache), 8192) == parts
    # Nothing but the ring holds tokens in full precision.
    wide = [x for x in arrays if x.ndim == 4 and x.shape[-1] == head_dim and x.shape[2] > 2 * 128]
    assert not wide


def test_the_full_view_is_a_plain_cache():
    cache = create(MODEL, CacheConfig(1000, view="full", pass_width=3), 1)
    assert cache.layers[0].keys is None
    assert cache.layers[0].key_buffer.shape == (1, 2, 1003, 64)
    assert not flush_due(rollback(cache, jnp.asarray([900]))).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_length": 0},
        {"max_length": 100, "group_size": 12},
        {"max_length": 100, "view": "int2"},
        {"max_length": 100, "group_size": 16, "pass_width": 17},
    ],
)
def test_wrong_configurations_are_refused_by_name(wrong):
    name = list(wrong)[-1]
    with pytest.raises(ValueError, match=f"^{name} is .*; allowed: "):
        CacheConfig(**wrong)
