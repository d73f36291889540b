"""Votes for pages and the choice among them: the kernels' own code, run by the emulator, and XLA's
way, against NumPy."""

from __future__ import annotations

import functools
import re

import emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_attention.read import ByPage, PageLogSums
from pallas_kernels.page_choice import mosaic_gpu, xla

WAYS = {"mosaic_gpu": mosaic_gpu, "xla": xla}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "mosaic_gpu":
        emulator.install(monkeypatch)
    return WAYS[request.param]


def attention_by_page(layers, batch, kv_heads, tiles, group, tokens, shares, seed=0):
    """Of each layer; garbage for tiles that were not written, and a page that a row sees nothing
    of."""
    rng = np.random.default_rng(seed)
    written = jnp.asarray([tiles - 1 - 3 * b for b in range(batch)], jnp.int32)
    found = []
    for _ in range(layers):
        parts = rng.normal(0, 3, (batch, kv_heads, tiles, shares, group * tokens))
        parts[:, :, 1, :, 0] = -np.inf
        for b in range(batch):
            parts[b, :, int(written[b]) :] = np.nan
        lse = rng.normal(12, 1, (batch, tokens, kv_heads * group))
        sums = PageLogSums(jnp.asarray(parts, jnp.float32), written, tokens)
        found.append(ByPage(sums, jnp.asarray(lse, jnp.float32)))
    return found


@pytest.mark.parametrize(
    ("layers", "batch", "kv_heads", "tiles", "group", "tokens", "shares"),
    [(3, 2, 2, 130, 1, 5, 4), (2, 1, 1, 5, 3, 3, 1), (1, 2, 1, 7, 3, 6, 2)],
)
def test_votes_are_the_mass_of_the_rows_that_vote(
    way, layers, batch, kv_heads, tiles, group, tokens, shares
):
    """For each layer, sequence and key-value head; of rows up to the last that was accepted."""
    seen = attention_by_page(layers, batch, kv_heads, tiles, group, tokens, shares)
    last = np.arange(batch) * 2 % tokens
    found = np.asarray(way.page_votes(seen, jnp.asarray(last, jnp.int32)))
    assert found.shape == (batch, layers, kv_heads, tiles)
    for layer, b, k in np.ndindex(layers, batch, kv_heads):
        sums, lse = seen[layer]
        written = int(sums.written[b])
        parts = np.asarray(sums.parts, np.float64)[b, k, :written]
        parts = parts.reshape(written, shares, group, tokens)[..., : last[b] + 1]
        heads = np.asarray(lse, np.float64)[b, : last[b] + 1, k * group : (k + 1) * group]
        expected = np.exp(parts - heads.T).sum((1, 2, 3))
        np.testing.assert_allclose(found[b, layer, k, :written], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("tiles", "places", "ends"), [(40, 12, (1, 1)), (300, 77, (0, 0)), (2100, 300, (2, 3))]
)
def test_the_choice_is_the_pages_with_most_votes_in_order(way, tiles, places, ends):
    """Ties go to the first; a sequence that has few pages, one none."""
    layers, batch, kv_heads = 2, 3, 1
    rng = np.random.default_rng(tiles)
    votes = rng.exponential(1.0, (batch, layers, kv_heads, tiles))
    votes[:, 1] = np.floor(4 * votes[:, 1])  # many are equal, of which not all are chosen
    coded = np.asarray([tiles - 2, 7, 0])
    count = np.asarray([places, 5, 0])
    given = (jnp.asarray(x, kind) for x, kind in ((votes, jnp.float32), (coded, jnp.int32)))
    found = way.most_voted(*given, jnp.asarray(count, jnp.int32), places=places, ends=ends)
    assert len(found) == layers
    for layer, b in np.ndindex(layers, batch):
        by_vote = votes[b, layer, 0, : coded[b]].copy()
        by_vote[: ends[0]] = by_vote[max(coded[b] - ends[1], 0) :] = np.inf
        best = np.argsort(-by_vote, kind="stable")[: count[b]]
        expected = np.r_[np.sort(best), np.full(places - count[b], tiles)]
        assert found[layer].dtype == jnp.int32
        np.testing.assert_array_equal(found[layer][b, 0], expected)


def test_votes_that_are_not_finite_give_lists_of_pages_nevertheless(monkeypatch):
    """Each once and in order, with the ends: what the target's broken logits leave reads no other
    memory."""
    emulator.install(monkeypatch)
    votes = jnp.asarray(np.resize([np.nan, 1.0, -np.nan, np.inf], (1, 1, 1, 50)), jnp.float32)
    coded, count = jnp.asarray([45]), jnp.asarray([20])
    (found,) = mosaic_gpu.most_voted(votes, coded, count, places=24, ends=(1, 1))
    chosen = np.asarray(found)[0, 0, :20]
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] == 0
    assert chosen[-1] == 44


def lower(fn, *args) -> str:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    return jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_all_layers_are_one_launch_each():
    """Of more layers than a launch takes there are several."""
    seen = attention_by_page(1, 1, 2, 20, 2, 3, 2)
    votes = jnp.zeros((1, 32, 2, 1032))
    for layers, launches in ((80, 1), (129, 2)):
        text = lower(mosaic_gpu.page_votes, seen * layers, jnp.zeros(1, jnp.int32))
        assert len(re.findall("custom_call @mosaic_gpu", text)) == launches
    choose = functools.partial(mosaic_gpu.most_voted, places=258, ends=(1, 1))
    text = lower(choose, votes, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    assert len(re.findall("custom_call @mosaic_gpu", text)) == 1


def test_what_the_kernels_cannot_do_is_named():
    seen = attention_by_page(1, 1, 1, 4, 1, 2, 1) + attention_by_page(1, 1, 1, 4, 1, 2, 2)
    assert "layers differ" in mosaic_gpu.votes_unsupported(seen)
    assert "40000 pages" in mosaic_gpu.choice_unsupported(jnp.zeros((1, 1, 1, 40000)))
