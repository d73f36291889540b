"""Methods that read a part of the tokens, channels, ranks or layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from pallas_kernels.rope_append.heads import rotate
from quantspec_jax.loading import Model
from quantspec_jax.methods import (
    ClusterKV,
    DBudgetKV,
    KVSharer,
    L2Norm,
    Layer,
    LoRC,
    MiniCache,
    SnapKV,
    Streaming,
    Think,
    TileClusters,
    TopPages,
    TopTokens,
    kvsharer,
    lorc,
    minicache,
    think,
)
from quantspec_jax.methods.clusterkv import clustered
from quantspec_jax.methods.dbudgetkv import window_start
from quantspec_jax.methods.selection import budgeted, heads_of
from quantspec_jax.methods.snapkv import pooled, voted
from quantspec_jax.models.rope import rope_frequencies, rope_tables
from quantspec_jax.weights.formats import DraftConfig

G, PROMPT, T = 32, 96, 160
EXACT: dict[str, Any] = {"codes": "full", "group_size": G}  # all of it is about which tokens
SELECTIONS = [
    Streaming(**EXACT),
    L2Norm(**EXACT, whole_layers=0),
    SnapKV(**EXACT),
    DBudgetKV(**EXACT, whole_layers=0),
    TopTokens(**EXACT),
    TopPages(**EXACT, page=8, whole_layers=0),
    ClusterKV(**EXACT, whole_layers=0, tokens_a_cluster=10),
    TileClusters(**EXACT, whole_layers=0),
]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def text() -> Layer:
    return Layer(normal(0, T, 2, 16), normal(1, T, 2, 16))


QUERIES = normal(2, 8, 4, 16)


@functools.partial(jax.jit, static_argnums=0)
def _kept(method, text, q, whole) -> jax.Array:
    view = method.compress(whole, text, QUERIES, PROMPT)
    return method.keep(view.state, q, jnp.asarray(PROMPT))


def kept(method, text, q=None, whole=False) -> np.ndarray:
    """[K, S, P] tokens that are read of those of the prompt."""
    q = normal(3, G, 4, 16) if q is None else q
    read = np.asarray(_kept(method, text, q, jnp.asarray(whole)))
    return np.broadcast_to(read, (2, len(q), T))[..., :PROMPT]


@pytest.mark.parametrize("method", SELECTIONS, ids=lambda method: type(method).__name__)
def test_a_selection_keeps_to_its_budget(method, text):
    read = kept(method, text)
    if not isinstance(method, DBudgetKV):  # whose prompt decides
        assert (read.sum(-1) == round(0.25 * PROMPT)).all()
    assert read[..., : method.first].all()
    assert kept(method, text, whole=True).all()


@pytest.mark.parametrize(
    "method",
    [
        DBudgetKV(**EXACT, whole_layers=0, tolerance=0.0),
        SnapKV(1.0, **EXACT),
        TopPages(1.0, **EXACT, page=8, whole_layers=0),
        Streaming(1.0, **EXACT),
        L2Norm(1.0, **EXACT, whole_layers=0),
        TileClusters(1.0, **EXACT, whole_layers=0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_all_is_all(method, text):
    assert kept(method, text).all()


def test_a_budget_takes_the_best_and_of_equal_ones_the_first():
    scores = jnp.asarray([[3.0, 1.0, 2.0, 2.0, 9.0]])
    allowed = jnp.asarray([[True, True, True, True, False]])
    for budget, expected in ((0, ""), (1, "0"), (2, "02"), (3, "023"), (4, "0123"), (9, "0123")):
        found = budgeted(scores, allowed, jnp.asarray(budget))
        assert "".join(map(str, np.flatnonzero(found[0]))) == expected


def test_streaming_reads_sinks_and_a_window(text):
    (read,) = {tuple(row) for row in kept(Streaming(**EXACT), text)[:, 0]}
    assert np.flatnonzero(read).tolist() == [*range(4), *range(76, 96)]


def test_norms_choose_the_same_tokens_before_and_after_rope(text):
    config, _, _ = tiny_model()
    tables = rope_tables(*rope_frequencies(config.rope, 16, T), jnp.arange(T)[None])
    norms = [
        L2Norm().index(Layer(keys, keys), QUERIES, PROMPT)
        for keys in (text.keys, rotate(text.keys[None], *tables)[0])
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)
    read = kept(L2Norm(**EXACT, whole_layers=0), text)[0, 0]
    norm = np.asarray(norms[0])[0, :PROMPT]
    assert norm[read].max() <= norm[~read].min()


@pytest.mark.parametrize(
    ("pool", "width", "expected"),
    [
        ("none", 1, {9, 10, 12, 15, 20, 29, 32, 37}),
        ("average", 5, {8, 9, 10, 11, 12, 13, 14, 31}),
        ("max", 7, {*range(6, 13), 29}),
    ],
)
def test_snapkv_votes(pool, width, expected):
    rng = np.random.default_rng(14)
    k = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    q = jnp.asarray(rng.standard_normal((4, 16)), jnp.float32)
    stays = np.flatnonzero(voted(q[:, None], k[:, None], 8, pool, width)[0])
    assert set(stays.tolist()) == expected | {60, 61, 62, 63}


def test_pools_see_zeros_beyond_the_ends():
    votes = jnp.asarray([[3.0, 0.0, 0.0, 6.0]])
    np.testing.assert_allclose(pooled(votes, "average", 3), [[1, 1, 2, 2]])
    np.testing.assert_allclose(pooled(votes, "max", 3), [[3, 3, 6, 6]])


def test_dbudget_windows_grow_with_what_is_asked():
    attention = np.asarray(jax.nn.softmax(3 * normal(4, 8, 50), -1))
    start_of = jax.jit(window_start, static_argnums=1)
    starts = [int(start_of(attention, 4, tolerance)) for tolerance in (0, 0.01, 0.05, 0.5)]
    assert starts == sorted(starts)
    for start, tolerance in zip(starts, (0, 0.01, 0.05, 0.5), strict=True):
        norms = [
            np.linalg.norm(attention[:, (np.arange(50) < 4) | (np.arange(50) >= s)])
            for s in (start, start + 1)
        ]
        whole = (1 - tolerance) * np.linalg.norm(attention)
        assert norms[0] >= whole * (1 - 1e-6)
        assert start < 4 or norms[1] < whole


def test_pages_bound_the_scores_of_their_tokens(text):
    """The greatest product of a page's keys is never above its bound."""
    method = TopPages(**EXACT, page=8)
    low, high = method.index(text, QUERIES, PROMPT)
    q = heads_of(normal(5, 3, 4, 16), 2)
    products = jnp.einsum("krsd,tkd->krst", q, text.keys).reshape(2, 2, 3, -1, 8).max(-1)
    best = jnp.maximum(q[..., None, :] * low[:, None, None], q[..., None, :] * high[:, None, None])
    assert (products <= best.sum(-1) + 1e-4).all()


def test_clusters_of_three_directions_are_found_and_read_whole():
    rng, at = np.random.default_rng(0), np.arange(T)
    direction = ((at % G + 1) // 11 + at // G) % 3  # k-means begins with one of each
    keys = 5 * np.eye(16)[direction][:, None] + 0.1 * rng.standard_normal((T, 2, 16))
    given = Layer(jnp.asarray(keys, jnp.float32), normal(1, T, 2, 16))
    q = jnp.asarray(np.tile(np.eye(16)[1], (G, 4, 1)), jnp.float32)
    share = (direction[:PROMPT] == 1).mean()
    for method in (
        TileClusters(share, **EXACT, whole_layers=0, clusters=3, first=0),
        ClusterKV(share, **EXACT, whole_layers=0, tokens_a_cluster=32, first=0),
    ):
        read = kept(method, given, q)
        assert (read == (direction[:PROMPT] == 1)).mean() > 0.98
    label, mean, size = clustered(given.keys[:PROMPT, 0], 3)
    for i in range(3):
        own = given.keys[:PROMPT, 0][label == i]
        np.testing.assert_allclose(mean[i], own.mean(0), atol=1e-4)
        assert size[i] == len(own) > 0


def test_think_drops_the_channels_that_matter_least():
    q = jnp.asarray(np.random.default_rng(15).standard_normal((32, 8)), jnp.float32)
    k = np.random.default_rng(16).standard_normal((100, 8)) * np.arange(1, 9)
    k = jnp.asarray(k, jnp.float32)
    scores = think.channel_scores(q[:, None], k[:, None])[0]
    exact = [np.linalg.norm(np.outer(q[:, c], k[:, c])) ** 2 for c in range(8)]
    np.testing.assert_allclose(scores, exact, rtol=1e-5)
    assert np.flatnonzero(~think.kept(scores[None], 5)[0]).tolist() == [0, 1, 2]


def test_think_leaves_values_and_what_is_new(text):
    whole, half = (
        Think(dropped, codes="full", group_size=G).compress((), text, QUERIES, PROMPT)
        for dropped in (0.0, 0.5)
    )
    np.testing.assert_array_equal(whole.keys, text.keys)  # nothing dropped: as it was
    np.testing.assert_array_equal(half.values, text.values)
    assert ((half.keys[: PROMPT - 8] == 0).sum(-1) == 8).all()
    np.testing.assert_array_equal(half.keys[PROMPT - 8 :], text.keys[PROMPT - 8 :])
    later = Think(0.5, codes="full", later=True, group_size=G)
    cut = later.compress((), text, QUERIES, PROMPT).keys == 0
    np.testing.assert_array_equal(cut, jnp.broadcast_to((half.keys == 0)[:1], cut.shape))


# Rank


def test_lorc_projects_what_is_cached():
    w = np.random.default_rng(20).standard_normal((64, 32)) * np.linspace(1, 0.05, 32)
    h = np.random.default_rng(21).standard_normal((500, 64))
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    vectors, values = lorc.right_vectors(w)
    onto = vectors[:, :16] @ vectors[:, :16].T
    np.testing.assert_allclose(h @ (u[:, :16] * s[:16]) @ vt[:16], (h @ w) @ onto, atol=1e-12)
    exact = h @ w
    assert ((exact - exact @ onto) ** 2).sum() / (exact**2).sum() == pytest.approx(0.0784, abs=1e-4)
    assert (values[16:] ** 2).sum() / (values**2).sum() == pytest.approx(0.0800, abs=1e-4)
    assert values[0] / values[-1] == pytest.approx(41.3, abs=0.05)


def test_lorc_of_full_rank_is_the_identity_and_a_bias_costs_none():
    config, params, _ = tiny_model()
    model = Model(config, params, draft=DraftConfig(bits=None))
    text = Layer(normal(0, 20, 2, 16), normal(1, 20, 2, 16))
    (whole, *_), (half, *_) = (LoRC(share).prepare(model, None) for share in (1.0, 0.5))
    for a, b in zip(LoRC(1.0).read(whole, text, None), text, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    shifted = [to._replace(bias=jnp.ones(32)) for to in half]
    moved = LoRC().read(shifted, Layer(*(x + 1 for x in text)), None)
    for a, b in zip(moved, LoRC().read(half, text, None), strict=True):
        np.testing.assert_allclose(a, b + 1, atol=1e-5)
    # a text's own vectors are the best for it
    _learned, best = LoRC(learned_from="text").fit(text, None)
    for a, b, exact in zip(best, LoRC().read(half, text, None), text, strict=True):
        assert ((a - exact) ** 2).sum() < ((b - exact) ** 2).sum()


def test_lorc_has_the_vectors_of_the_weights_with_their_norms_gain_or_without():
    config, params, _ = tiny_model()
    layer = params["layers"]["0"]
    layer["attention_norm"] = jnp.linspace(0.1, 2.0, config.hidden_size)
    model = Model(config, params, draft=DraftConfig(bits=None))
    kernel = np.asarray(layer["k"]["kernel"], np.float64)
    gain = np.asarray(layer["attention_norm"], np.float64)[:, None]
    for folds, weight in ((True, gain * kernel), (False, kernel)):
        ((keys, _), *_) = LoRC(0.5, folds=folds).prepare(model, None)
        vectors = np.linalg.svd(weight, full_matrices=False)[2][: keys.onto.shape[0] // 2]
        np.testing.assert_allclose(keys.onto, vectors.T @ vectors, atol=1e-5)


def test_lorc_ranks_fall_with_depth_and_keep_their_mean():
    found = lorc.ranks(np.full(8, 10.0), 0.5, 0.4, 64)
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]
    assert np.mean(found) == pytest.approx(32, abs=0.5)
    assert lorc.ranks(np.full(8, 10.0), 0.5, 0.0, 64) == [32] * 8


# Depth


merged = jax.jit(minicache.merged, static_argnames="tile")


@pytest.mark.parametrize(("t", "lower", "upper"), [(0.5, 0.1012, 0.1012), (0.6, 0.145, 0.065)])
def test_minicache_goes_between_two_directions(t, lower, upper):
    a = np.random.default_rng(17).standard_normal((1000, 64))
    b = 0.8 * a + 0.6 * np.random.default_rng(18).standard_normal((1000, 64))
    a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
    direction, cosine = jax.jit(minicache.between)(a, b, t)
    assert np.degrees(np.arccos(cosine)).mean() == pytest.approx(36.8, abs=0.1)
    np.testing.assert_allclose(jnp.linalg.norm(direction, axis=-1), 1, atol=1e-5)
    for own, other, up, expected in ((a, b, False, lower), (b, a, True, upper)):
        read = merged(own[:, None], other[:, None], up, t, 0.0, tile=500)[:, 0]
        assert float(((read - own) ** 2).sum() / (own**2).sum()) == pytest.approx(
            expected, rel=0.01
        )


def test_minicache_keeps_unlike_tokens_and_equal_layers():
    a, b = normal(0, 200, 1, 16), normal(1, 200, 1, 16)
    read = merged(a, b, False, 0.6, 0.3, tile=200)
    _, cosine = jax.jit(minicache.between)(a, b, 0.6)
    kept = np.asarray((read == a).all(-1)[:, 0])
    assert 0 < kept.sum() < 200
    assert cosine[kept].max() < cosine[~kept].min()
    np.testing.assert_allclose(merged(a, a, False, 0.6, 0.0, tile=200), a, atol=1e-5)
    # What a tile keeps depends on it alone; a last one may be short.
    tiles = [merged(a[i], b[i], False, 0.6, 0.3, tile=128) for i in (slice(128), slice(128, 200))]
    found = merged(a, b, False, 0.6, 0.3, tile=128)
    np.testing.assert_allclose(found, np.concatenate(tiles), atol=1e-6)
    assert ((found == a).all(-1)[:, 0] != kept).any()
    layers = [MiniCache().partner((), i, 7) for i in range(7)]
    assert layers == [0, 1, 2, 4, 3, 6, 5]


def test_kvsharer_maps_are_settled_and_take_the_least_alike_that_pass():
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((6, 4, 2, 8)).astype(np.float32) for _ in range(2))
    distance = kvsharer.distances(keys, values)
    i, j = 4, 2
    each = [np.linalg.norm(x[i] - x[j], axis=-1).mean() for x in (keys, values)]
    assert distance[i, j] == pytest.approx(np.mean(each), rel=1e-5)
    asked = []

    def accepts(sources):
        asked.append(sources)
        return sources[5] == 5  # the last must stay

    found = kvsharer.chosen(distance, 2, accepts)
    assert sum(source != layer for layer, source in enumerate(found)) == 2
    assert found[5] == 5
    assert all(found[source] == source <= layer for layer, source in enumerate(found))
    first = next(s for s in asked if accepts(s))
    lower = [(a, b) for a in range(5) for b in range(a)]
    best = max(lower, key=lambda pair: distance[pair])
    assert (first.index(best[1], best[1] + 1) if best[1] in first[best[1] + 1 :] else None) == best[
        0
    ]


def test_kvsharer_learns_from_the_model_and_nothing_shared_is_the_model():
    config, params, _ = tiny_model()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 24))
    hidden, keys, _ = kvsharer.run(params, jnp.asarray(tokens), jnp.arange(2), config=config)
    other, _, _ = kvsharer.run(params, jnp.asarray(tokens), jnp.asarray([0, 0]), config=config)
    assert float(jnp.abs(hidden - other).max()) > 1e-3
    assert keys.shape == (2, 4, 24, 2, 16)
    model = Model(config, params, draft=DraftConfig(bits=None))
    assert KVSharer(shared=0.5, threshold=-2).prepare(model, lambda: tokens) == [0, 0]
    assert KVSharer(shared=0.5, threshold=2).prepare(model, lambda: tokens) == [0, 1]
    assert KVSharer(shared=0.0).prepare(model, lambda: tokens) == [0, 1]
