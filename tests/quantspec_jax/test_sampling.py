"""The warped distribution against transformers' own processors; draws by position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.requests import sampling_arrays
from quantspec_jax.generate.sampling import Role, Sampling, Warpers, choose, draw, warp

VOCABULARIES = (7, 53, 1000)
WARPERS = {
    "temperature": {"temperature": 0.7},
    "high temperature": {"temperature": 1.9},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-k 1": {"temperature": 1.0, "top_k": 1},
    "top-k beyond the vocabulary": {"temperature": 1.0, "top_k": 10**10},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "top-p leaves one": {"temperature": 1.0, "top_p": 1e-6},
    "top-p tiny": {"temperature": 1.0, "top_p": 1e-12},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "min-p 1": {"temperature": 1.0, "min_p": 1.0},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.3},
    "reward": {"temperature": 1.0, "repetition_penalty": 0.8},
    "top-k and top-p": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "all": {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
    },
}


COMPILED_FOR = ("any", "wanted", "all")


def reference(logits: np.ndarray, seen: np.ndarray, config: GenerateConfig) -> np.ndarray:
    """[R, N] rows through transformers' processors, in the order that its `generate` has."""
    rows = []
    for row, mask in zip(logits, seen, strict=True):
        ids = torch.tensor(np.flatnonzero(mask))[None]
        processors: list = [hf.RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty))]
        if config.temperature != 1:
            processors.append(hf.TemperatureLogitsWarper(float(config.temperature)))
        if config.top_k > 0:
            processors.append(hf.TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            processors.append(hf.TopPLogitsWarper(config.top_p))
        if config.min_p > 0:
            processors.append(hf.MinPLogitsWarper(config.min_p))
        scores = torch.tensor(row)[None]
        for process in processors:
            scores = process(ids, scores)
        rows.append(torch.softmax(scores, -1)[0].numpy())
    return np.stack(rows)


jitted_warp = jax.jit(warp, static_argnames="warpers")


def both(
    logits: np.ndarray, seen: np.ndarray, config: GenerateConfig, compiled_for: str = "any"
) -> tuple[np.ndarray, np.ndarray]:
    """[B, S, N] probabilities, ours and those of transformers. Ours of a program that finds out
    what is wanted, that is compiled for just that, or for all there is."""
    b, s, n = logits.shape
    warpers = {"any": None, "wanted": config.warpers, "all": Warpers()}[compiled_for]
    ours = jitted_warp(jnp.asarray(logits), jnp.asarray(seen), sampling_arrays(config, b), warpers)
    theirs = reference(logits.reshape(-1, n), seen.reshape(-1, n), config)
    return np.asarray(ours), theirs.reshape(b, s, n)


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(ours.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("compiled_for", COMPILED_FOR)
@pytest.mark.parametrize("n", VOCABULARIES)
@pytest.mark.parametrize("name", WARPERS)
def test_warp_is_that_of_transformers(name: str, n: int, compiled_for: str) -> None:
    random = np.random.default_rng(n)
    logits = (random.normal(size=(2, 3, n)) * 3).astype(np.float32)
    seen = random.random((2, 3, n)) < 0.3
    same(*both(logits, seen, GenerateConfig(**WARPERS[name]), compiled_for))


@pytest.mark.parametrize("compiled_for", COMPILED_FOR)
@pytest.mark.parametrize("name", WARPERS)
def test_equal_logits(name: str, compiled_for: str) -> None:
    """As many survive a threshold as in transformers, where an unstable sort says which: here the
    first ones do.
    """
    # Numbers with few significant bits, as bf16 logits have: ties at every threshold.
    random = np.random.default_rng(1)
    logits = random.integers(-6, 6, (2, 8, 53)).astype(np.float32) / 2
    unseen = np.zeros(logits.shape, bool)
    ours, theirs = both(logits, unseen, GenerateConfig(**WARPERS[name]), compiled_for)
    same(np.sort(ours), np.sort(theirs))
    for row, p in zip(logits.reshape(-1, 53), ours.reshape(-1, 53), strict=True):
        for value in np.unique(row):
            survives = p[row == value] > 0
            assert np.array_equal(survives, np.sort(survives)[::-1])


@pytest.mark.parametrize("compiled_for", COMPILED_FOR)
@pytest.mark.parametrize("top_p", [0.125, 0.25, 0.5, 0.51, 0.75, 0.76, 1.0])
def test_top_p_at_exact_boundaries(top_p: float, compiled_for: str) -> None:
    logits = np.zeros((1, 1, 8), np.float32)  # cumulative probabilities are multiples of 1/8
    config = GenerateConfig(temperature=1.0, top_p=top_p)
    ours, theirs = both(logits, np.zeros(logits.shape, bool), config, compiled_for)
    same(np.sort(ours), np.sort(theirs))


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([[[1e4, -1e4, 0.0, 9.9e3, -np.inf]]], np.float32)
    seen = np.array([[[True, True, False, False, True]]])
    for config in (
        GenerateConfig(temperature=1e-30, top_p=0.9, repetition_penalty=1.3),
        GenerateConfig(temperature=1e30, top_k=4),
    ):
        p = jitted_warp(jnp.asarray(logits), jnp.asarray(seen), sampling_arrays(config, 1))
        p = np.asarray(p)
        assert np.isfinite(p).all()
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
        assert p[0, 0, 4] == 0


def test_temperature_0_is_the_first_largest_penalized_logit() -> None:
    logits = jnp.asarray([[[3.0, 2.5, 2.5, 1.0], [0.0, -1.0, -1.1, -1.0]]], jnp.float32)
    seen = jnp.asarray([[[True, False, False, False], [True, False, False, False]]])
    config = GenerateConfig(repetition_penalty=2.0, top_k=2, top_p=0.5)
    p = jitted_warp(logits, seen, sampling_arrays(config, 1))
    assert np.array_equal(p, [[[0, 1, 0, 0], [1, 0, 0, 0]]])


def mixed(batch: int) -> Sampling:
    """A greedy sequence first, then others, each warped in its own way."""
    configs = [
        GenerateConfig(repetition_penalty=1.3),
        *(GenerateConfig(**WARPERS[name]) for name in ("temperature", "top-p", "top-k", "all")),
    ]
    each = [sampling_arrays(config, 1) for config in configs[:batch]]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *each)


step = jax.jit(choose, static_argnums=5)


def test_a_sequence_is_warped_and_drawn_in_a_batch_as_it_is_alone() -> None:
    b, n = 5, 301
    logits = jax.random.normal(jax.random.key(0), (b, n)) * 3
    seen = jax.random.bernoulli(jax.random.key(1), 0.3, (b, n))
    keys = jax.random.split(jax.random.key(2), b)
    sampling = mixed(b)
    for first_position in range(20):
        position = first_position + 7 * jnp.arange(b)
        tokens, probabilities = step(logits, seen, sampling, keys, position, Role.DRAFT)
        for i in range(b):
            row = slice(i, i + 1)
            own = jax.tree.map(lambda x, row=row: x[row], sampling)
            token, p = step(logits[row], seen[row], own, keys[row], position[row], Role.DRAFT)
            assert token[0] == tokens[i]
            if i:  # alone, the greedy sequence computes no probabilities
                np.testing.assert_allclose(p[0], probabilities[i], rtol=1e-6, atol=1e-9)


def test_greedy_choice_is_argmax_in_any_company() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 301))
    seen = jnp.zeros((2, 301), bool)
    keys = jax.random.split(jax.random.key(2), 2)
    best = jnp.argmax(logits, -1)
    token, p = step(
        logits, seen, sampling_arrays(GenerateConfig(), 2), keys, jnp.arange(2), Role.TARGET
    )
    assert np.array_equal(token, best)
    assert not np.any(p)
    token, p = step(logits, seen, mixed(2), keys, jnp.arange(2), Role.TARGET)
    assert token[0] == best[0]
    assert p[0, best[0]] == 1


def test_draws_differ_by_key_position_and_role_alone() -> None:
    count = 3000
    uniform = jnp.ones((count, 1000))
    keys = jnp.broadcast_to(jax.random.key(5), (count,))
    position = jnp.arange(count)
    target = draw(uniform, keys, position, Role.TARGET)
    assert np.array_equal(target, draw(uniform, keys, position, Role.TARGET))
    for other in (
        draw(uniform, keys, position, Role.DRAFT),
        draw(uniform, keys, position + 1, Role.TARGET),
        draw(uniform, jnp.broadcast_to(jax.random.key(6), (count,)), position, Role.TARGET),
    ):
        assert np.mean(np.asarray(target == other)) < 0.01  # 1/1000 expected


def test_draws_follow_the_probabilities() -> None:
    count = 40_000
    weights = jnp.asarray([0.0, 1.0, 3.0, 0.0, 6.0])
    keys = jax.random.split(jax.random.key(0), count)
    tokens = draw(jnp.tile(weights, (count, 1)), keys, jnp.zeros(count, jnp.int32), Role.DRAFT)
    share = np.bincount(tokens, minlength=5) / count
    assert share[0] == share[3] == 0
    np.testing.assert_allclose(share, weights / 10, atol=4 * np.sqrt(0.25 / count))


def test_other_parameters_compile_nothing() -> None:
    traces = []

    @jax.jit
    def counted(logits, sampling, keys):
        traces.append(1)
        seen = jnp.zeros(logits.shape, bool)
        return choose(logits, seen, sampling, keys, jnp.arange(2), Role.TARGET)

    logits, keys = jnp.ones((2, 50)), jax.random.split(jax.random.key(0), 2)
    for config in (GenerateConfig(), *(GenerateConfig(**kw) for kw in WARPERS.values())):
        counted(logits, sampling_arrays(config, 2), keys)
    assert len(traces) == 1
