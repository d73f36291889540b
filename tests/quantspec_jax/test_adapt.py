"""Adaptive γ: what it yields at the cost model's prices, against the best fixed γ."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantspec_jax.cost import tokens_a_round
from quantspec_jax.generate.adapt import (
    MOST_DRAFTED,
    NEVER,
    Timing,
    choose_gamma,
    measured_cost,
    observe,
)

G = 128
ALPHAS = np.array([0.1, 0.3, 0.5, 0.7, 0.85, 0.93, 0.98])
COSTS = np.array([0.15, 0.3, 0.45, 0.7, 1.1])
ALPHA, COST = (x.ravel() for x in np.meshgrid(ALPHAS, COSTS, indexing="ij"))


@functools.partial(jax.jit, static_argnames="rounds")
def simulate(key, alphas, rounds: int):
    """Tokens, cost and γ of each round of each cell; `alphas` [rounds or 1, cells]."""
    choose = jax.vmap(lambda e, room, c: choose_gamma(e[None], room[None], jnp.ones(1, bool), c))

    def one(carry, inputs):
        evidence, position = carry
        key, alpha = inputs
        room = G - 1 - position % G
        gamma = choose(evidence, room, jnp.asarray(COST))
        proposed = jnp.minimum(gamma, room)
        accepts = jax.random.uniform(key, (alpha.size, MOST_DRAFTED)) < alpha[:, None]
        run = jnp.cumprod(accepts, 1, dtype=jnp.int32).sum(1, dtype=jnp.int32)
        accepted = jnp.minimum(run, proposed)
        carry = observe(evidence, proposed, accepted), position + accepted + 1
        return carry, (accepted + 1, 1 + jnp.asarray(COST) * gamma, gamma)

    start = jnp.zeros((COST.size, 2)), jnp.zeros(COST.size, jnp.int32)
    alphas = jnp.broadcast_to(alphas, (rounds, COST.size))
    return jax.lax.scan(one, start, (jax.random.split(key, rounds), alphas))[1]


def test_no_fixed_gamma_is_three_per_cent_faster_and_plain_decoding_is_not_either():
    tokens, cost, gamma = (np.asarray(x) for x in simulate(jax.random.key(0), ALPHA[None], 8000))
    yielded = tokens.sum(0) / cost.sum(0)
    best = [
        max(tokens_a_round(a, g, G) / (1 + c * g) for g in range(MOST_DRAFTED + 1))
        for a, c in zip(ALPHA, COST, strict=True)
    ]
    assert (yielded >= 0.97 * np.array(best)).all()
    poor = ALPHA < COST - 0.1
    assert (gamma[:, poor].mean(0) < 0.15).all(), "hardly anything is drafted where it cannot pay"
    rich = (ALPHA > 0.9) & (COST < 0.5)
    assert (gamma[:, rich].mean(0) > 4).all()


def test_it_notices_that_acceptance_has_changed():
    """Poor for 500 rounds, then good: within 200 rounds it drafts as if it had always been."""
    cheap = COST == 0.3
    alphas = np.concatenate([np.full((500, COST.size), 0.05), np.full((700, COST.size), 0.93)])
    gamma = np.asarray(simulate(jax.random.key(1), alphas, 1200)[2])[:, cheap]
    assert gamma[200:500].mean() < 0.3
    assert gamma[700:].mean() > 4


@pytest.mark.parametrize(
    ("evidence", "room", "active", "cost", "expected"),
    [
        ([[90, 100]], [0], [True], 0.3, 0),  # no proposal would count
        ([[90, 100]], [2], [True], 0.3, 2),
        ([[100, 100]], [99], [True], 1.2, 0),  # a draft step costs more than what it replaces
        ([[90, 100], [1, 100]], [9, 9], [False, True], 0.3, 0),  # the first one has finished
        ([[98, 100], [98, 100]], [0, 99], [True, True], 0.3, None),  # the second one's gain counts
    ],
)
def test_gamma_is_what_pays_for_the_batch(evidence, room, active, cost, expected):
    arrays = jnp.asarray(evidence, jnp.float32), jnp.asarray(room), jnp.asarray(active)
    gamma = int(choose_gamma(*arrays, cost))
    assert gamma == expected if expected is not None else gamma > 0


def test_the_cost_of_a_draft_step_from_timed_rounds():
    plain = Timing(4, 0, 4 * 0.020)
    drafting = Timing(3, 12, 3 * 0.020 + 12 * 0.008)
    assert measured_cost(drafting, plain) == pytest.approx(0.4)
    assert measured_cost(Timing(3, 0, 0.06), plain) is None
    assert measured_cost(drafting, Timing(0, 0, 0.0)) is None
    assert 0 < measured_cost(Timing(3, 12, 0.05), plain) < 0.1, "noise: no cost below zero"


@pytest.mark.parametrize("evidence", [[0, 0], [99, 100], [1, 100]])
def test_nothing_is_drafted_at_the_cost_that_says_so(evidence):
    arrays = jnp.asarray([evidence], jnp.float32), jnp.asarray([50]), jnp.ones(1, bool)
    assert int(choose_gamma(*arrays, jnp.float32(NEVER))) == 0


def test_evidence_counts_what_was_tried():
    found = observe(jnp.zeros((4, 2)), jnp.array([4, 4, 4, 0]), jnp.array([0, 2, 4, 0]))
    np.testing.assert_array_equal(found, [[0, 1], [2, 3], [4, 4], [0, 0]])
