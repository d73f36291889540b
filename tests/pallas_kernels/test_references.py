"""The XLA references against plain NumPy in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    attention_call,
    random_weight,
    relative_error,
    with_other_lower_planes,
    without_poison,
)

from pallas_kernels.int4_matmul import api as matmul
from pallas_kernels.int4_matmul import xla as matmul_reference
from pallas_kernels.kv_attention import xla as reference
from pallas_kernels.kv_attention.api import kv_attention
from pallas_kernels.kv_attention.read import Read


def plain_attention(call, view: str, sm_scale: float, strict: bool):
    """Softmax attention of one query at a time, over the keys and values that it may see."""
    q, cache, quantized, start = call
    keys, values = cache.keys, cache.values
    key_buffer, value_buffer = cache.key_buffer, cache.value_buffer
    batch, tokens, heads = q.shape[:3]
    kv_heads, slots = key_buffer.shape[1:3]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    dense = None
    if keys is not None:
        parts = (reference.dequantize_keys(keys, view), reference.dequantize_values(values, view))
        dense = [np.asarray(x, np.float64) for x in parts]
    for b in range(batch):
        n = int(quantized[b])
        for h in range(heads):
            k = h // (heads // kv_heads)
            for i in range(tokens):
                last = int(start[b]) + i - strict
                held = [p % slots for p in range(n, last + 1)]
                rows = [np.asarray(x[b, k], np.float64)[held] for x in (key_buffer, value_buffer)]
                if dense is not None:
                    pairs = zip(dense, rows, strict=True)
                    rows = [np.concatenate([x[b, k, :n], r]) for x, r in pairs]
                if not len(rows[0]):
                    continue
                scores = rows[0] @ np.asarray(q[b, i, h], np.float64) * sm_scale
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights @ rows[1] / weights.sum()
                lse[b, i, h] = np.log(weights.sum()) + scores.max()
    return out, lse


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("view", ["int4", "int8", "full"])
@pytest.mark.parametrize(
    ("head_dim", "group_size", "group", "tokens"), [(32, 16, 2, 3), (80, 8, 1, 1)]
)
def test_attention(view, strict, head_dim, group_size, group, tokens):
    call = attention_call(
        view,
        kv_heads=2,
        group=group,
        tokens=tokens,
        head_dim=head_dim,
        group_size=group_size,
        tiles=8,
        positions=[0, 1, group_size, 2 * group_size + 1, 7 * group_size - 3],
        dtype=jnp.float32,
    )
    call = without_poison(call)
    out, lse = kv_attention(*call, read=Read(view), sm_scale=0.2, strict=strict, backend="xla")
    expected = plain_attention(call, view, 0.2, strict)
    assert relative_error(out, expected[0]) <= 1e-5
    np.testing.assert_allclose(lse, expected[1], atol=1e-4)


@pytest.mark.parametrize(("view", "tiles"), [("int4", 8), ("int8", 3)])
def test_attention_as_on_a_gpu(monkeypatch, view, tiles):
    """Turns of more tokens, and no loop where one turn reads everything there may be."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(reference, "GPU_TILES_AT_ONCE", 3)
    call = attention_call(
        view, kv_heads=2, group=2, tokens=2, head_dim=16, group_size=8, tiles=tiles,
        positions=[0, 5, 8 * tiles - 2], dtype=jnp.float32,
    )  # fmt: skip
    call = without_poison(call)
    attend = functools.partial(kv_attention, read=Read(view), sm_scale=0.2, backend="xla")
    attend = jax.jit(attend)
    out, lse = attend(*call)
    expected = plain_attention(call, view, 0.2, False)
    assert relative_error(out, expected[0]) <= 1e-5
    np.testing.assert_allclose(lse, expected[1], atol=1e-4)
    assert ("while" in attend.lower(*call).as_text()) == (tiles == 8)


def test_the_draft_view_does_not_depend_on_the_lower_plane():
    call = attention_call(
        "int4", kv_heads=1, group=1, tokens=1, head_dim=32, group_size=16, tiles=4,
        positions=[70], dtype=jnp.float32,
    )  # fmt: skip
    q, cache, *lengths = without_poison(call)
    read = functools.partial(kv_attention, read=Read("int4"), sm_scale=0.2)
    before, after = read(q, cache, *lengths), read(q, with_other_lower_planes(cache), *lengths)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    exact = functools.partial(read, read=Read("int8"))
    both = exact(q, cache, *lengths)[0], exact(q, with_other_lower_planes(cache), *lengths)[0]
    assert (both[0] != both[1]).any()


def test_a_view_that_is_none():
    with pytest.raises(ValueError, match="view is 'int2'; allowed: full, int8, int4"):
        Read("int2")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("inputs", "group"), [(128, 64), (100, 32)])
def test_int4_matmul(inputs, group, symmetric):
    """The product with the dequantized weight, where the last group is not full either."""
    weight = random_weight(inputs, 48, group, symmetric)
    x = jax.random.normal(jax.random.key(2), (2, 3, inputs))
    dense = np.asarray(matmul_reference.dequantize(weight), np.float64)[:inputs]
    expected = np.asarray(x, np.float64) @ dense
    assert relative_error(matmul.int4_matmul(x, weight), expected) <= 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [5, 17])
def test_int4_matmul_as_on_a_gpu(monkeypatch, rows, symmetric):
    """Few rows and many; and no loop."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    weight = random_weight(100, 48, 32, symmetric)
    x = jax.random.normal(jax.random.key(2), (rows, 100))
    dense = np.asarray(matmul_reference.dequantize(weight), np.float64)[:100]
    assert relative_error(matmul.int4_matmul(x, weight), np.asarray(x, np.float64) @ dense) <= 1e-5
    assert "while" not in jax.jit(matmul.int4_matmul).lower(x, weight).as_text()


def test_products_of_one_pass_are_those_of_one_weight():
    gate, up = (random_weight(64, 32, 32, False, seed) for seed in (0, 1))
    x = jax.random.normal(jax.random.key(2), (3, 64))
    a, b = matmul.int4_matmuls(x, [gate, up])
    np.testing.assert_array_equal(a, matmul.int4_matmul(x, gate))
    np.testing.assert_array_equal(b, matmul.int4_matmul(x, up))
