"""Codes of a cache, each against the numbers that its formulas give on known inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantspec_jax.methods import CalibQuant, Coupled, KVQuant, Layer, Skvq, calibquant, skvq
from quantspec_jax.methods.coupled import codebooks
from quantspec_jax.methods.kmeans import code_of, kmeans, lloyd_numbers, nearest
from quantspec_jax.methods.kvquant import normalized, ranged, table
from quantspec_jax.models.presets import PRESETS

MODEL = PRESETS["smollm2-135m"]


def error(found, exact) -> float:
    """‖x − x̂‖² / ‖x‖²."""
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def text(seed: int, t: int = 96, k: int = 2, d: int = 32) -> Layer:
    return Layer(normal(seed, t, k, d), normal(seed + 1, t, k, d))


# k-means


def test_kmeans_finds_separated_points_and_weights_decide():
    centers = jnp.asarray([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = jnp.repeat(centers, 50, 0) + 0.1 * normal(0, 150, 2)
    found = kmeans(jax.random.key(0), x, jnp.ones(150), 3, 10)
    assert sorted(np.bincount(nearest(x, found)).tolist()) == [50, 50, 50]
    heavy = jnp.where(jnp.arange(150) < 50, 1e6, 1e-6)  # the others count for nothing
    (one,) = kmeans(jax.random.key(0), x, heavy, 1, 3)
    np.testing.assert_allclose(one, x[:50].mean(0), atol=1e-3)


# KVQuant


@pytest.mark.parametrize(
    ("width", "points", "expected", "uniform"),
    [
        (2, [-0.555, -0.169, 0.165, 0.551], 0.105, 0.269),
        (3, [-0.745, -0.480, -0.272, -0.089, 0.089, 0.272, 0.480, 0.745], 0.0287, 0.049),
    ],
)
def test_kvquant_tables_suit_normal_numbers(width, points, expected, uniform):
    """On the range between the percentiles 0.5 and 99.5; even steps err far more."""
    x = np.random.default_rng(10).standard_normal(200_000)
    low, high = np.quantile(x, [0.005, 0.995])
    z = jnp.asarray((x - (high + low) / 2) / ((high - low) / 2), jnp.float32)
    inside = (jnp.abs(z) <= 1).astype(jnp.float32)
    found = lloyd_numbers(jnp.clip(z, -1, 1), inside, 2**width)
    np.testing.assert_allclose(found, points, atol=0.006)

    def err(table):
        kept = np.asarray(inside) > 0
        return error(table[code_of(z, table)][kept], z[kept])

    assert err(found) == pytest.approx(expected, rel=0.02)
    assert err(jnp.linspace(-1, 1, 2**width)) == pytest.approx(uniform, rel=0.05)


def test_kvquant_keeps_outliers_and_codes_the_rest_by_its_table():
    given = text(0, 400)
    keys = given.keys.at[7, 1, 3].set(1e4)
    values = given.values.at[9, 0, 5].set(-1e4)
    learned, _ = jax.jit(KVQuant(3).fit)(given, None)
    made, read = (jax.jit(KVQuant(3).read)(learned, x, None) for x in (given, Layer(keys, values)))
    assert read.keys[7, 1, 3] == 1e4
    assert read.values[9, 0, 5] == -1e4
    same = np.arange(400) != 9
    np.testing.assert_array_equal(read.values[same], made.values[same])  # a token by itself
    for found, exact, most in ((made.keys, given.keys, 0.04), (made.values, given.values, 0.04)):
        assert 0.005 < error(found, exact) < most
    # 2 of 64 values of a token are its ends: they stay.
    ends = np.asarray(given.values.reshape(400, -1))
    kept = np.asarray(made.values.reshape(400, -1)) == ends
    assert (kept.sum(1) >= 2).all()
    assert kept[np.arange(400), ends.argmax(1)].all()
    assert kept[np.arange(400), ends.argmin(1)].all()


@pytest.mark.parametrize(("channels", "outliers"), [(4096, 42), (1024, 12), (256, 4), (128, 2)])
def test_kvquant_counts_a_tokens_outliers_by_interpolated_quantiles(channels, outliers):
    values = normal(4, 3, channels)
    found = jax.jit(KVQuant(2)._ranged_values)(values)
    assert found.outlier.sum(1).tolist() == [outliers] * 3


def test_kvquant_gradients_draw_points_to_where_they_matter():
    x = jnp.linspace(-1, 1, 64).reshape(64, 1) * jnp.ones((1, 8))
    whole = ranged(x, jnp.full_like(x, -1.0), jnp.full_like(x, 1.0), jnp.zeros_like(x, bool))
    flat = table(whole, jnp.ones_like(x), 2)
    drawn = table(whole, jnp.where(x > 0.5, 1e4, 1.0), 2)
    np.testing.assert_allclose(flat, [-0.75, -0.25, 0.25, 0.75], atol=0.02)
    assert (drawn > 0.4).sum() >= 3


def test_kvquant_q_norm_restores_mean_and_deviation():
    x = normal(3, 500, 16)
    whole = ranged(x, jnp.full_like(x, -4.0), jnp.full_like(x, 4.0), jnp.zeros_like(x, bool))
    points = table(whole, jnp.ones_like(x), 2)
    moved = normalized(whole, points)
    z = whole.normed
    found = moved[code_of(z, points)]
    assert found.mean() == pytest.approx(float(z.mean()), abs=1e-5)
    assert found.std() == pytest.approx(float(z.std()), rel=1e-4)


# SKVQ


def test_skvq_channels_of_one_size_are_a_group():
    """Small channels among great ones err 16 times their energy, in a group of their own a fifth:
    less where the ends are clipped."""
    x = np.random.default_rng(11).standard_normal((64, 128))
    x[:, 1::2] *= 10
    x = jnp.asarray(x, jnp.float32)
    label = skvq.grouping(x, 2)
    assert len(set(np.asarray(label[::2]))) == 1
    assert label[0] != label[1]
    neighbours = jnp.arange(128) // 64

    def small(label, clip):
        return error(skvq.rounded(x, label, 2, 3, clip, e4m3=False)[:, ::2], x[:, ::2])

    assert small(label, 1.0) == pytest.approx(0.209, rel=0.05)
    assert small(label, 0.92) == pytest.approx(0.177, rel=0.05)
    assert small(neighbours, 0.92) == pytest.approx(16.1, rel=0.05)


def test_skvq_with_many_levels_is_the_identity_but_for_its_8_bit_scales():
    x, label = normal(5, 64, 128), jnp.arange(128) % 2
    exact = skvq.rounded(x, label, 2, 2**16 - 1, 1.0, e4m3=False)
    np.testing.assert_allclose(exact, x, atol=1e-4)
    fine, found = (skvq.rounded(x, label, 2, 15, 1.0, e4m3=short) for short in (False, True))
    assert error(fine, x) < error(found, x) < 0.03  # three bits behind the point


def test_skvq_clips_to_the_middle_where_asked():
    x, label = jnp.full((64, 128), 100.0) + normal(6, 64, 128), jnp.arange(128) % 2
    off = [np.abs(skvq.rounded(x, label, 2, 15, 0.9, c) - x).max() for c in (False, True)]
    assert off[1] < off[0]  # α times both ends moves the range off numbers far from 0


# Coupled quantization


def test_coupled_codes_err_less_the_more_channels_share_one():
    """AR(1) channels: 1 bit each, and 2 bits."""
    rng = np.random.default_rng(12)
    x = rng.standard_normal((40_000, 8))
    for i in range(1, 8):
        x[:, i] = 0.8 * x[:, i - 1] + 0.6 * x[:, i]
    train, test = (jnp.asarray(part, jnp.float32) for part in (x[:20_000], x[20_000:]))
    found = []
    for size, bits, steps, expected in (
        (1, 1, 25, 0.363),
        (2, 2, 25, 0.207),
        (4, 4, 25, 0.153),
        (8, 8, 4, 0.131),
        (4, 8, 4, 0.046),
    ):
        split = [part.reshape(len(part), -1, size).swapaxes(0, 1) for part in (train, test)]
        (book,) = codebooks(split[0][:1], jnp.ones((1, 20_000)), bits, steps)
        found.append(error(book[nearest(split[1][0], book)], split[1][0]))
        assert found[-1] == pytest.approx(expected, rel=0.03)
    assert found == sorted(found, reverse=True)


def test_coupled_gradients_decide_what_a_codebook_is_for():
    given = text(0, 300, 1, 8)
    slopes = jnp.where(jnp.arange(300) < 20, 1e3, 1e-3)[:, None, None] * jnp.ones((1, 1, 8))
    gradient = Layer(slopes, slopes)
    method = Coupled(4, 4, steps=5)
    fit = jax.jit(method.fit)
    learned, weighted = fit(given, None, gradient)
    _, plain = fit(given, None, jax.tree.map(jnp.ones_like, gradient))
    for a, b in zip(method.read(learned, given, None), weighted, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b, exact in zip(weighted, plain, given, strict=True):
        assert error(a[:20], exact[:20]) < 0.5 * error(b[:20], exact[:20])
        assert error(a, exact) > error(b, exact)


# CalibQuant


def test_calibquant_narrows_one_bit():
    v = normal(8, 2, 256, 64)[0]
    assert error(calibquant.rounded(v, 1, 0.3), v) == pytest.approx(0.377, rel=0.01)
    assert error(calibquant.rounded(v, 1, 1.0), v) == pytest.approx(4.67, rel=0.01)


def test_calibquant_scores_need_no_keys():
    q, k = normal(1, 5, 64), normal(2, 100, 64)
    code, step, low = calibquant.codes(k, 1, 0.5)
    np.testing.assert_allclose(
        calibquant.post_scaled_scores(q, code, step, low), q @ (low + step * code).T, atol=2e-5
    )


def test_calibquant_mends_scores_to_a_narrower_range_and_leaves_the_others():
    scores = jnp.asarray([[1.0, 3.0, 11.0, 50.0]])
    read = jnp.asarray([[True, True, True, False]])
    np.testing.assert_allclose(calibquant.mended(scores, read), [[1, 1 + 2 * 0.7, 8, 50]])
    narrow = calibquant.mended(jnp.asarray([[0.0, 1.0]]), jnp.ones((1, 2), bool))
    assert narrow[0, 0] > narrow[0, 1]  # the order turns round, as in the authors' code


def test_calibquant_codes_the_prompt_alone():
    given = text(3, 64)
    queries = jnp.zeros((4, 4, 32))
    view = CalibQuant(1).compress((), given, queries, 40)
    for read, exact in zip((view.keys, view.values), given, strict=True):
        np.testing.assert_array_equal(read[40:], exact[40:])
        np.testing.assert_array_equal(read[:4], exact[:4])  # sinks
        assert (read[4:40] != exact[4:40]).all()
    constant = jnp.full((9, 3), 0.5)
    np.testing.assert_array_equal(calibquant.rounded(constant, 1, 1.0), constant)


# All


@pytest.mark.parametrize("method", [KVQuant(2), Skvq(group=32)])
def test_who_reads_sees_what_who_learned_saw(method):
    """The same bits, twice; another text is read by what was learned."""
    fit, read = jax.jit(method.fit), jax.jit(method.read)
    learned, _ = fit(text(1), None)
    once, twice = (read(learned, text(1), None) for _ in range(2))
    for a, b in zip(once, twice, strict=True):
        np.testing.assert_array_equal(a, b)
    other = read(learned, text(7), None)
    assert all(0 < error(a, b) < 1 for a, b in zip(other, text(7), strict=True))


def test_groups_are_learned_once_from_all_tokens():
    """SKVQ's of one size, whatever else differs; the first tokens, which it keeps, are among
    them."""
    learner = Skvq(group=32).learner()
    assert learner == Skvq(15, 15, group=32, centred=True).learner() != Skvq(group=64).learner()
    assert (Skvq().sinks, learner.sinks) == (5, 0)


def test_bits_count_everything():
    n, tokens = 192, 131072
    assert KVQuant(3).bits(MODEL, tokens) == pytest.approx(
        3 + 32 / (2 * n) + 0.32 + 16 * (2 * n + 16) / (2 * n * tokens)
    )
    assert Skvq().bits(MODEL, tokens) == pytest.approx(2.25, abs=1e-3)
    three = (2 + np.log2(3)) / 2 + 16 / 32
    assert Skvq(value_levels=2, group=32).bits(MODEL, tokens) == pytest.approx(three, abs=1e-3)
    assert Coupled(8).bits(MODEL, tokens) == pytest.approx(1 + 16 * 256 / tokens)
    assert CalibQuant(1).bits(MODEL, tokens) == pytest.approx(1 + 32 / tokens)
