"""The XLA references against plain NumPy in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    attention_call,
    plain_attention,
    random_pages,
    random_weight,
    relative_error,
    with_other_lower_planes,
    without_poison,
)

from pallas_kernels.int4_matmul import api as matmul
from pallas_kernels.int4_matmul import xla as matmul_reference
from pallas_kernels.kv_attention import xla as attention_reference
from pallas_kernels.kv_attention.api import in_parts, kv_attention
from pallas_kernels.kv_attention.read import Pages, Read


def check(call, read: Read, strict: bool = False, pages=None):
    """Against plain attention."""
    call = without_poison(call)
    options = {"read": read, "sm_scale": 0.2, "strict": strict, "page_log_sums": True}
    found = jax.jit(functools.partial(kv_attention, **options, backend="xla"))(*call, pages=pages)
    expected = plain_attention(call, read, 0.2, strict, pages)
    assert relative_error(found.out, expected.out) <= 1e-5
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, atol=1e-4)
    np.testing.assert_allclose(found.page_log_sums.by_row, expected.page_log_sums, atol=1e-4)


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
    check(call, Read(view), strict)


@pytest.mark.parametrize(
    ("view", "exact_tiles", "listed"),
    [("int4", 1, "all"), ("int4", 2, "list"), ("int8", 0, "list"), ("int4", 1, "count")],
)
def test_attention_to_chosen_pages(view, listed, exact_tiles):
    """Nothing, one page, and several of ragged sequences, other ones for each head, with the first
    and without; more places than are used, and more than are read at a time."""
    call = attention_call(
        view, kv_heads=2, group=2, tokens=2, head_dim=32, group_size=8, tiles=16,
        positions=[5, 30, 140, 90], dtype=jnp.float32,
    )  # fmt: skip
    coded = np.asarray(call[2]) // 8
    assert coded.tolist() == [0, 2, 16, 10]
    pages = None
    if listed == "list":
        pages = random_pages(coded, 2, [0, 1, 11, 10], 12)
        assert {0, 1} & set(np.asarray(pages.tiles)[1, :, 0].tolist())
    elif listed == "count":
        pages = Pages(None, jnp.array([0, 1, 11, 10]))
    check(call, Read(view, exact_tiles), pages=pages)


@pytest.mark.parametrize(("view", "strict"), [("int8", False), ("full", True)])
def test_attention_in_parts_is_that_of_the_whole_pass(view, strict):
    """Parts that are not even, of ragged sequences, with the log-sums of pages."""
    call = attention_call(
        view, kv_heads=2, group=2, tokens=7, head_dim=32, group_size=8, tiles=6,
        positions=[3, 30], dtype=jnp.float32,
    )  # fmt: skip
    options = {"read": Read(view), "sm_scale": 0.3, "strict": strict, "page_log_sums": True}
    run = functools.partial(kv_attention, **options, backend="xla")
    whole, parts = run(*call), in_parts(run, *call, 3)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_of_a_list_nothing_but_the_listed_tiles_is_read():
    """No copy of planes is made, but of their scales and minima, as whose type another is read."""
    tiles, g, d = 4096, 32, 32
    call = attention_call(
        "int4", kv_heads=1, group=1, tokens=1, head_dim=d, group_size=g, tiles=tiles,
        positions=[g * tiles], dtype=jnp.float32,
    )  # fmt: skip
    pages = random_pages(np.asarray([tiles - 1]), 1, [16], 16)
    run = functools.partial(kv_attention, read=Read("int4", 1), sm_scale=0.2, backend="xla")
    compiled = jax.jit(run).lower(*call, pages=pages).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tiles * g * d / 2


@pytest.mark.parametrize(
    ("pages", "words"),
    [
        (Pages(np.zeros((2, 2, 3), np.int32), np.zeros(1, np.int32)), r"allowed: \[1, 2, P ≥ 1\]"),
        (Pages(np.zeros((1, 3), np.int32), np.zeros(1, np.int32)), r"allowed: \[1, 2, P ≥ 1\]"),
    ],
)
def test_lists_of_another_shape_are_refused(pages, words):
    call = attention_call(
        "int4", kv_heads=2, group=1, tokens=1, head_dim=32, group_size=8, tiles=2, positions=[20]
    )
    with pytest.raises(ValueError, match=words):
        kv_attention(*call, read=Read("int4"), sm_scale=1.0, pages=pages)


@pytest.mark.parametrize(("view", "tiles"), [("int4", 8), ("int8", 3)])
def test_attention_as_on_a_gpu(monkeypatch, view, tiles):
    """Turns of more tokens, and no loop where one turn reads everything there may be."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_reference, "GPU_TILES_AT_ONCE", 3)
    call = attention_call(
        view, kv_heads=2, group=2, tokens=2, head_dim=16, group_size=8, tiles=tiles,
        positions=[0, 5, 8 * tiles - 2], dtype=jnp.float32,
    )  # fmt: skip
    call = without_poison(call)
    attend = functools.partial(kv_attention, read=Read(view), sm_scale=0.2, backend="xla")
    attend = jax.jit(attend)
    found = attend(*call)
    expected = plain_attention(call, Read(view), 0.2, False)
    assert relative_error(found.out, expected[0]) <= 1e-5
    np.testing.assert_allclose(found.log_sum_exp, expected[1], atol=1e-4)
    assert ("while" in attend.lower(*call).as_text()) == (tiles == 8)


def test_the_draft_view_does_not_depend_on_the_lower_plane():
    call = attention_call(
        "int4", kv_heads=1, group=1, tokens=1, head_dim=32, group_size=16, tiles=4,
        positions=[70], dtype=jnp.float32,
    )  # fmt: skip
    q, cache, *lengths = without_poison(call)
    read, exact = (
        jax.jit(functools.partial(kv_attention, read=Read(view), sm_scale=0.2))
        for view in ("int4", "int8")
    )
    before, after = read(q, cache, *lengths), read(q, with_other_lower_planes(cache), *lengths)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    both = exact(q, cache, *lengths)[0], exact(q, with_other_lower_planes(cache), *lengths)[0]
    assert (both[0] != both[1]).any()


def test_a_view_that_is_none():
    with pytest.raises(ValueError, match="view is 'int2'; allowed: full, int8, int4"):
        Read("int2")
    with pytest.raises(ValueError, match="exact_tiles is -1; allowed: an integer ≥ 0"):
        Read("int4", -1)
    with pytest.raises(ValueError, match="exact_tiles is 1; allowed: 0 in the view int8"):
        Read("int8", 1)


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
