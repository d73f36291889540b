"""Properties of the hierarchical code: error bounds, directed rounding, packing, same bits."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import layout
from pallas_kernels.kv_attention import xla as attention
from pallas_kernels.layout import Planes
from pallas_kernels.quantize_pack import api
from pallas_kernels.quantize_pack import xla as reference

BF16 = ml_dtypes.bfloat16
LARGEST = layout.LARGEST
SMALLEST = 2.0**-126  # normal float32
SHAPES = [  # (G, D): every head size at the usual group, every group at two head sizes
    *((128, d) for d in (64, 80, 96, 128, 192, 256)),
    *((g, d) for g in (16, 32, 64) for d in (80, 128)),
    (24, 80),
]
reproducibly = settings(max_examples=30, deadline=None, derandomize=True)


@functools.cache
def compiled(name: str, group_size: int):
    """Planes and both views of keys or values [B, K, T, D], in one program."""
    quantize = getattr(api, f"quantize_{name}")
    dequantize = getattr(attention, f"dequantize_{name}")

    @jax.jit
    def run(x):
        planes = quantize(x, group_size)
        return planes, dequantize(planes, "int8"), dequantize(planes, "int4")

    return run


def by_element(name: str, numbers: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """A group's numbers (see `Planes`) at each element of [B, K, T, D], as float64."""
    b, k, t, d = shape
    x = np.asarray(numbers).astype(np.float64)
    if name == "keys":
        return np.repeat(x, t // x.shape[2], axis=2)
    group_size = x.shape[-1]
    x = np.moveaxis(x, -1, -2).reshape(b, k, t, -1)
    return np.repeat(x, min(group_size, d), axis=-1)[..., :d]


def of_group(name: str, reduce: np.ufunc, x: np.ndarray, group_size: int) -> np.ndarray:
    """max, min, ... over the group that each element of [B, K, T, D] belongs to."""
    b, k, t, d = x.shape
    if name == "keys":
        tiles = x.reshape(b, k, t // group_size, group_size, d)
        return np.repeat(reduce.reduce(tiles, axis=3), group_size, axis=2)
    width = min(group_size, d)
    starts = range(0, d, width)
    parts = [reduce.reduce(x[..., i : i + width], axis=-1, keepdims=True) for i in starts]
    widths = [min(width, d - i) for i in starts]
    return np.concatenate([np.repeat(p, w, -1) for p, w in zip(parts, widths, strict=True)], -1)


def flushed(x: np.ndarray) -> np.ndarray:
    """float64, with 0 for what XLA's arithmetic takes for 0."""
    x = np.asarray(x).astype(np.float64)
    return np.where(np.abs(x) < SMALLEST, 0.0, x)


def check_bounds(name: str, x: np.ndarray, group_size: int) -> None:
    planes, x8, x4 = compiled(name, group_size)(x)
    exact = np.asarray(x).astype(np.float64)
    scale = by_element(name, planes.scale, x.shape)
    largest = of_group(name, np.maximum, np.abs(exact), group_size)
    rounding = largest * 2.0**-22 + SMALLEST
    assert np.all(np.isfinite(scale))
    assert np.all(np.abs(exact - x8) <= scale / 32 + rounding)
    assert np.all(np.abs(exact - x4) <= scale / 2 + rounding)


def check_directed_rounding(name: str, x: np.ndarray, group_size: int) -> None:
    """m̂ is the largest f16 number ≤ the minimum, ŝ the smallest with m̂ + 15 ŝ ≥ the maximum."""
    planes, _, _ = compiled(name, group_size)(x)
    exact = flushed(x)
    low = of_group(name, np.minimum, exact, group_size)
    high = of_group(name, np.maximum, exact, group_size)
    minimum = by_element(name, planes.minimum, x.shape)
    scale = by_element(name, planes.scale, x.shape)

    assert np.all(minimum <= low + SMALLEST)
    above = np.nextafter(minimum.astype(np.float16), np.float16(np.inf)).astype(np.float64)
    assert np.all(above > low - SMALLEST)

    minimum = flushed(minimum)
    span = (high - minimum).astype(np.float32).astype(np.float64)  # as float32 has it
    # Of a span below the normal numbers a thread makes 0 or not, as it was set.
    settled = (span == 0) | (span >= SMALLEST)
    assert np.array_equal((scale > 0)[settled], (span > 0)[settled])
    assert np.all((scale == 0) | (scale >= reference.SMALLEST_SCALE))
    assert np.all(15 * scale >= flushed(span))
    below = np.nextafter(scale.astype(np.float16), np.float16(0)).astype(np.float64)
    assert np.all((15 * below < span) | (scale <= reference.SMALLEST_SCALE))


def groups(seed: int, shape: tuple[int, ...], center: float, spread: float, axis: int):
    """Random groups around ± `center`, each with a width of its own near `spread`; some constant,
    some zero, some with one value far out. `axis`: along which they lie.
    """
    random = np.random.default_rng(seed)
    one = [1 if i == axis % len(shape) else n for i, n in enumerate(shape)]
    width = spread * 2.0 ** random.integers(-6, 1, one)
    x = center * random.choice([-1, 0, 1], one) + width * random.uniform(-1, 1, shape)
    x = np.where(random.random(one) < 0.1, center, x)
    x = np.where(random.random(one) < 0.1, 0.0, x)
    x = np.where((random.random(one) < 0.1) & (random.random(shape) < 0.1), spread, x)
    return np.clip(x, -LARGEST, LARGEST).astype(np.float32)


exponents = st.sampled_from([-149, -126, -125, -60, -24, -20, -14, -3, 0, 1, 5, 12, 15])
centers = st.one_of(st.just(0.0), exponents.map(lambda e: 2.0**e), st.floats(-8, 8, width=32))


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
@reproducibly
@given(
    seed=st.integers(0, 2**32),
    center=centers,
    spread=exponents.map(lambda e: 2.0**e),
    bf16=st.booleans(),
)
def test_error_bounds(name, group_size, head_dim, seed, center, spread, bf16) -> None:
    shape = (1, 2, 2 * group_size, head_dim)
    x = groups(seed, shape, center, spread, axis=-2 if name == "keys" else -1)
    x = np.asarray(x.astype(BF16)) if bf16 else x
    check_bounds(name, x, group_size)


any_float = st.floats(-LARGEST, LARGEST, width=32)
near = st.floats(-2, 2, width=32)
grid = st.integers(-240, 240).map(lambda i: i / 16)  # codes and the borders between them


@pytest.mark.parametrize("name", ["keys", "values"])
@reproducibly
@given(data=st.data(), elements=st.sampled_from([any_float, near, grid]))
def test_any_numbers(name, data, elements) -> None:
    x = data.draw(hnp.arrays(np.float32, (1, 1, 16, 24), elements=elements))
    check_bounds(name, x, 16)
    check_directed_rounding(name, x, 16)


@pytest.mark.parametrize("name", ["keys", "values"])
@reproducibly
@given(seed=st.integers(0, 2**32), center=centers, spread=exponents.map(lambda e: 2.0**e))
def test_directed_rounding(name, seed, center, spread) -> None:
    x = groups(seed, (1, 4, 32, 80), center, spread, axis=-2 if name == "keys" else -1)
    check_directed_rounding(name, x, 32)


def test_scale_of_exact_multiples() -> None:
    """Where 15 ŝ is the span exactly ŝ is not a step larger, and a bit more takes a step more."""
    numbers = (1 + np.arange(1024) / 1024).astype(np.float32)
    x = np.zeros((1, 1, 16, 1024), np.float32)
    for span, expected in (
        (15 * numbers, numbers),
        (np.nextafter(15 * numbers, np.float32(np.inf)), numbers + np.float32(1 / 1024)),
    ):
        x[0, 0, 3] = span
        planes, _, _ = compiled("keys", 16)(x)
        assert np.array_equal(np.asarray(planes.scale, np.float32)[0, 0, 0], expected)


@reproducibly
@given(x=hnp.arrays(np.float32, 64, elements=any_float))
def test_rounding_to_float16(x) -> None:
    def check(rounded: jax.Array, sign: int) -> None:
        half = np.asarray(rounded).astype(np.float16)
        assert np.array_equal(half, rounded)
        nearer = np.nextafter(half, np.float16(-sign * np.inf)).astype(np.float32)
        normal = np.abs(x) >= SMALLEST
        assert np.all((sign * (half.astype(np.float32) - x) >= 0)[normal])
        assert np.all((sign * (nearer - x) < 0)[normal])

    check(reference.round_down_to_f16(x), -1)
    check(reference.round_up_to_f16(x), 1)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_numbers_beyond_float16_are_read_as_its_ends(name: str) -> None:
    """Those of a group beside them keep the bound; so do keys around a huge bias."""
    x = np.random.default_rng(0).normal(size=(1, 2, 32, 48)).astype(np.float32)
    x[0, 0] += 60_000
    bound = x.copy()
    x[0, 1, 3, :5], bound[0, 1, 3, :5] = -1e30, -LARGEST
    x[0, 1, 7, :5], bound[0, 1, 7, :5] = 70_000, LARGEST
    x[0, 0, :16, 20:30] = bound[0, 0, :16, 20:30] = -40_000
    planes, *views = compiled(name, 16)(x)
    scale = by_element(name, planes.scale, x.shape)
    for view, steps in zip(views, (32, 2), strict=True):
        assert np.all(np.abs(view - bound) <= scale / steps + LARGEST * 2.0**-22)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.3, LARGEST, -LARGEST, SMALLEST, 1e-40])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_constant_groups(name: str, value: float) -> None:
    """A constant that f16 holds is stored exactly, with scale 0; another one to the bound."""
    x = np.full((1, 1, 32, 48), value, np.float32)
    planes, x8, x4 = compiled(name, 16)(x)
    check_bounds(name, x, 16)
    if float(np.float16(value)) == value:
        assert not np.any(np.asarray(planes.scale, np.float32))
        assert np.array_equal(x8, x)
        assert np.array_equal(x4, x)


def test_both_planes_use_every_code() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (1, 1, 128, 64)).astype(np.float32)
    planes, _, _ = compiled("keys", 128)(x)
    for plane in (planes.upper, planes.lower):
        assert set(np.unique(layout.unpack_keys(plane))) == set(range(-8, 8))


def test_the_draft_view_ignores_the_lower_plane() -> None:
    x = np.random.default_rng(0).normal(size=(1, 1, 128, 64)).astype(np.float32)
    for name in ("keys", "values"):
        planes, x8, x4 = compiled(name, 64)(x)
        dequantize = getattr(attention, f"dequantize_{name}")
        other = planes._replace(lower=planes.lower ^ 0x5A)
        assert np.array_equal(dequantize(other, "int4"), x4)
        assert not np.array_equal(dequantize(other, "int8"), x8)


@pytest.mark.parametrize(("rows", "columns"), [(16, 8), (24, 80), (64, 192), (128, 64)])
@pytest.mark.parametrize("name", ["", "_keys", "_values"])
def test_packing_is_a_bijection(name: str, rows: int, columns: int) -> None:
    pack, unpack = (getattr(layout, f"{what}{name}") for what in ("pack", "unpack"))
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (2, 3, rows, columns)).astype(np.int8)
    packed = pack(jnp.asarray(codes))
    assert packed.dtype == jnp.uint8
    assert packed.size == codes.size // 2
    assert np.array_equal(unpack(packed), codes)
    some_bytes = random.integers(0, 256, packed.shape).astype(np.uint8)
    assert np.array_equal(pack(unpack(jnp.asarray(some_bytes))), some_bytes)


def assert_same(one: Planes, two: Planes) -> None:
    for x, y in zip(one, two, strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_same_bits_alone_in_a_batch_and_inside_a_program(name: str, dtype: str) -> None:
    g, d = 64, 80
    quantize = getattr(api, f"quantize_{name}")
    jitted = jax.jit(quantize, static_argnums=1)
    random = np.random.default_rng(3)
    a, b = (random.normal(size=(3, 2, 3 * g, d)).astype(np.float32) for _ in range(2))

    def product(a, b):  # which a compiler would like to contract with what follows
        return ((a + 0.3 * b) * b).astype(dtype)

    def rotation(a, b):
        return (a * 0.6 - b * 0.8).astype(dtype)

    for produce in (product, rotation):
        x = jax.jit(produce)(a, b)
        whole = jitted(x, g)
        assert_same(whole, quantize(x, g))
        assert_same(whole, jax.jit(lambda a, b, f=produce: quantize(f(a, b), g))(a, b))
    each, tiles = np.asarray(x), jax.tree.map(np.asarray, whole)
    for i in range(3):
        for tile in range(3):
            tokens = slice(tile * g, (tile + 1) * g)
            alone = jitted(each[i : i + 1, :, tokens], g)
            part = jax.tree.map(lambda y, i=i, tile=tile: y[i : i + 1, :, tile : tile + 1], tiles)
            assert_same(alone, part)

    @jax.jit
    def in_a_loop(x):
        def body(tile, planes):
            tokens = jax.lax.dynamic_slice_in_dim(x, tile * g, g, 2)
            return jax.tree.map(
                lambda y, new: jax.lax.dynamic_update_slice_in_dim(y, new, tile, 2),
                planes,
                quantize(tokens, g),
            )

        return jax.lax.fori_loop(0, 3, body, jax.tree.map(jnp.zeros_like, whole))

    assert_same(whole, in_a_loop(x))


@pytest.mark.parametrize("name", ["keys", "values"])
def test_codes_are_those_of_the_formulas(name: str) -> None:
    """Computed again in float64, where only values within float32 rounding of a border differ."""
    g, d = 32, 48
    x = np.random.default_rng(5).normal(size=(1, 2, 4 * g, d)).astype(np.float32)
    planes, _, _ = compiled(name, g)(x)
    scale = by_element(name, planes.scale, x.shape)
    minimum = by_element(name, planes.minimum, x.shape)
    u = np.clip(np.floor((x - minimum) / scale + 17 / 32), 0, 15)
    lower = np.clip(np.round((x - minimum - scale * u) / (scale / 16)), -8, 7)
    unpack = getattr(layout, f"unpack_{name}")
    codes = [np.asarray(unpack(p)).reshape(x.shape) for p in (planes.upper, planes.lower)]
    together = 16 * (codes[0] + 8.0) + codes[1]
    assert np.all(np.abs(together - (16 * u + lower)) <= 1)
    assert np.mean(together != 16 * u + lower) < 1e-4
