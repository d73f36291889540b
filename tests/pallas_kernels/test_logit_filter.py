"""Which tokens are left of a row of logits: the kernel's own code, run by the emulator, and XLA's
way, against NumPy."""

from __future__ import annotations

import types

import emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.logit_filter import mosaic_gpu, xla
from pallas_kernels.logit_filter.api import kept as dispatched
from pallas_kernels.logit_filter.kept import Kept


@pytest.fixture(params=["mosaic_gpu", "xla"])
def kept(request, monkeypatch):
    if request.param == "mosaic_gpu":
        emulator.install(monkeypatch)
        return mosaic_gpu.kept
    return lambda *call: xla.kept(*call, (True, True))


def left_of(scores, temperature, top_k, top_p, min_p):
    """[N] bool of a row in float64, one token at a time, from the least likely on."""
    n = len(scores)
    first = np.arange(n) == np.argmax(scores)
    if temperature == 0:
        return first
    weights = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    left = np.ones(n, bool)
    if 0 < top_k < n:
        left &= scores >= np.sort(scores)[-top_k]
    if top_p < 1:
        budget = (1 - np.float64(np.float32(top_p))) * weights[left].sum()
        # Of equal ones the last go first.
        for token in np.lexsort((-np.arange(n), scores)):
            if left[token] and not first[token]:
                budget -= weights[token]
                if budget < -1e-6 * weights.sum():
                    break
                left[token] = False
    return left & (weights >= min_p)


def wants(*each):
    """Arguments after the scores, one (temperature, top_k, top_p, min_p) a sequence."""
    kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    return [jnp.asarray(x, kind) for x, kind in zip(zip(*each, strict=True), kinds, strict=True)]


def scores_of(batch, tokens, n, kind):
    rng = np.random.default_rng(n)
    x = 3 * rng.normal(size=(batch, tokens, n))
    if kind == "ties":
        x = np.round(x)
    if kind == "far apart":
        x = np.where(rng.random(x.shape) < 0.3, -np.inf, 1e30 * x)
        x[..., 1] = 0
    if kind == "zeros":
        x = np.where(rng.random(x.shape) < 0.5, -0.0, 0.0)
    return np.asarray(x, np.float32)


SEQUENCES = (
    (0.7, 0, 0.9, 0.0), (1.0, 20, 1.0, 0.0), (0.7, 20, 0.8, 0.05), (1.0, 0, 1e-9, 0.0),
    (0.0, 3, 0.5, 0.1), (1.3, 10**9, 0.999, 0.0), (1.0, 0, 1.0, 0.3), (1.0, 0, 1.0, 0.0),
)  # fmt: skip


@pytest.mark.parametrize(
    ("n", "kind", "bits", "chosen"),
    [
        (257, "apart", 4, (0, 1, 2, 5)), (1030, "ties", 4, (0, 2)), (64, "far apart", 4, (2, 6)),
        (96, "zeros", 4, (0, 4)), (131, "ties", 3, (2, 3, 4, 7)), (96, "zeros", 4, (3, 7)),
    ],
)  # fmt: skip
def test_it_is_what_is_left_one_token_after_the_other(kept, monkeypatch, n, kind, bits, chosen):
    """Each sequence with wishes of its own."""
    monkeypatch.setattr(mosaic_gpu, "MOST_BITS", bits)
    sequences = [SEQUENCES[i] for i in chosen]
    scores = scores_of(len(sequences), 1, n, kind)
    found = kept(jnp.asarray(scores), *wants(*sequences))
    left = np.asarray(found.of(jnp.asarray(scores)))
    for row, ours, mass, wish in zip(scores, left, found.mass, sequences, strict=True):
        expected = left_of(row[0], *wish)
        divisor = wish[0] or 1.0
        weights = np.exp((row[0].astype(np.float64) - row[0].max()) / divisor)
        some = weights > 1e-30  # it makes no difference whether what weighs nothing is left
        np.testing.assert_array_equal(ours[0][some], expected[some])
        np.testing.assert_allclose(mass[0], weights[expected].sum(), rtol=1e-5)
    np.testing.assert_array_equal(found.most, scores.max(-1))


def test_the_mass_that_may_go_is_met_exactly(kept):
    """Sums that are no approximation: eight equal tokens, and what rounds to one more."""
    shares = (0.51, 0.75)
    scores = jnp.zeros((len(shares), 1, 8))
    found = kept(scores, *wants(*((1.0, 0, p, 0.0) for p in shares)))
    number = found.of(scores).sum(-1)[:, 0]
    np.testing.assert_array_equal(number, [5, 6])
    assert all(found.of(scores)[i, 0, : number[i]].all() for i in range(len(shares)))


def test_a_row_is_the_same_beside_others(kept):
    """Bits of a verification are those of a plain step."""
    scores = jnp.asarray(scores_of(1, 2, 200, "apart"))
    together = kept(scores, *wants((0.8, 30, 0.9, 0.01)))
    alone = kept(scores[:, 1:], *wants((0.8, 30, 0.9, 0.01)))
    for one, several in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one[:, 0], several[:, 1])


def test_probabilities_are_shares_of_the_mass():
    scores = jnp.asarray(scores_of(2, 2, 50, "apart"))
    sequences = ((0.7, 5, 0.9, 0.0), (0.0, 0, 1.0, 0.0))
    temperature = jnp.asarray([0.7, 0.0])
    left = xla.kept(scores, *wants(*sequences), (True, True))
    p = left.probabilities(scores, temperature)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(p > 0, left.of(scores))
    np.testing.assert_array_equal(p[1].max(-1), 1)


def test_where_it_runs(monkeypatch):
    """With clusters, and a vocabulary that their shared memory holds; else XLA's way, silently."""
    scores = jnp.zeros((1, 1, 151936))
    assert mosaic_gpu.unsupported(scores) is None
    most = int((mosaic_gpu.unsupported(jnp.zeros((1, 1, 1 << 20))) or "").split()[-1])
    assert mosaic_gpu.unsupported(jnp.zeros((1, 1, most))) is None
    assert mosaic_gpu.unsupported(jnp.zeros((1, 1, most + 1))) is not None
    ampere = types.SimpleNamespace(device_kind="A", compute_capability="8.0", core_count=7)
    monkeypatch.setattr(dispatch, "cuda_device", lambda: ampere)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))  # which compiles for it
    assert "clusters" in (mosaic_gpu.unsupported(scores) or "")
    found = dispatched(scores, *wants((1.0, 0, 0.9, 0.0)), wanted=(False, True))
    assert isinstance(found, Kept)


@pytest.mark.parametrize(("n", "tokens"), [(151936, 1), (32003, 5)])
def test_it_lowers(n, tokens):
    call = (jax.ShapeDtypeStruct((2, tokens, n), "float32"), *wants(*[(1.0, 0, 0.9, 0.0)] * 2))
    text = jax.jit(mosaic_gpu.kept).trace(*call).lower(lowering_platforms=("cuda",)).as_text()
    assert "logit_filter" in text
