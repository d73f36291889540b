"""Adaptive γ: what it yields at given prices, against the best fixed γ."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quantspec_jax.cost import tokens_a_round
from quantspec_jax.engine.adaptive import (
    BEYOND,
    MOST_DRAFTED,
    PROBE_ROUNDS,
    VERIFICATION,
    AdaptiveGamma,
)
from quantspec_jax.generate.state import COUNTED, NEVER

G = 128
ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.85, 0.93, 0.98)
COSTS = (0.1, 0.15, 0.3, 0.45, 0.7, 1.1)


def price(cost: float, gamma: int, verification: float = VERIFICATION) -> float:
    """What a round takes: a verification costs more than a plain step, and of more than five rows
    more than in proportion."""
    rows = min((known for known in BEYOND if gamma <= known), default=0) if gamma > 4 else 0
    share = min(verification, 2 * cost) if gamma else 0.0
    return (1 + share + (cost - share / 4) * gamma) * BEYOND.get(rows, 1.0)


def run(chunk, a_round) -> tuple[int, np.ndarray]:
    """What the loop does of a chunk (γ, rounds, look): rounds, and [2, COUNTED] proposals that
    counted and accepted ones. `a_round(i)`: so many of each of round i."""
    _, number, look = chunk
    counts, rounds = np.zeros((2, COUNTED), int), 0
    while rounds < number and not look.ends(rounds, *counts.sum(1)):
        proposed, accepted = a_round(rounds)
        counts[0, :proposed] += 1
        counts[1, :accepted] += 1
        rounds += 1
    return rounds, counts


def simulate(
    cost: float, alpha, rounds: int, seed: int = 0, size: int = 16
) -> tuple[float, float, np.ndarray]:
    """Tokens and cost of so many rounds in chunks of `size`, and γ of each; `alpha(round)`."""
    rng = np.random.default_rng(seed)
    chooser = AdaptiveGamma(cost, G)
    tokens, spent, gammas, position = 0, 0.0, [], 0
    while len(gammas) < rounds:
        chunk = chooser.next_chunk(size)
        gamma = chunk[0]

        def a_round(_: int, gamma: int = gamma) -> tuple[int, int]:
            nonlocal tokens, spent, position
            count = min(gamma, G - 1 - position % G)
            right = int(np.cumprod(rng.random(count) < alpha(len(gammas))).sum())
            tokens, spent = tokens + right + 1, spent + price(cost, gamma)
            position += right + 1
            gammas.append(gamma)
            return count, right

        number, counts = run(chunk, a_round)
        chooser.observe(number, *counts)
    return tokens, spent, np.array(gammas)


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_fixed_gamma_is_three_per_cent_faster_and_plain_decoding_is_not_either(
    alpha, cost, size
):
    tokens, spent, gammas = simulate(cost, lambda _: alpha, 8000, size=size)
    best = max(tokens_a_round(alpha, g, G) / price(cost, g) for g in range(MOST_DRAFTED + 1))
    assert tokens / spent >= 0.97 * best
    if alpha < cost - 0.1:
        assert gammas.mean() < 0.15, "hardly anything is drafted where it cannot pay"
    if alpha > 0.9 and cost < 0.4:
        assert gammas.mean() > 3.5


@pytest.mark.parametrize("verification", [0.0, 0.18])
@pytest.mark.parametrize("cost", [0.3, 0.45])
@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.93, 0.98])
def test_what_a_verification_takes_need_not_be_known_well(alpha, cost, verification):
    """It differs between models: as with SmolLM2, and as with Qwen2.5-Coder-1.5B."""
    tokens, _, gammas = simulate(cost, lambda _: alpha, 4000)
    spent = sum(price(cost, gamma, verification) for gamma in gammas)
    best = max(
        tokens_a_round(alpha, g, G) / price(cost, g, verification) for g in range(MOST_DRAFTED + 1)
    )
    assert tokens / spent >= 0.96 * best


def test_it_notices_that_acceptance_has_changed():
    """Poor for 500 rounds, then good, then poor again."""
    _, _, gammas = simulate(0.3, lambda i: 0.93 if 500 <= i < 3500 else 0.05, 5000)
    assert gammas[200:500].mean() < 0.3
    assert gammas[1500:3500].mean() > 3.5
    assert gammas[3700:].mean() < 0.3


def test_it_depends_on_counts_alone():
    """The same counts, the same choices: nothing is read off a clock."""
    runs = [simulate(0.2, lambda _: 0.8, 500, seed=3)[2] for _ in range(2)]
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("size", [32, 128])
def test_a_chunk_in_pieces_is_chosen_and_read_as_a_whole_one(size):
    """Whoever waits for text on a CPU sees it after each piece, and it is the same text. Sequences
    end within a chunk, and within a piece."""
    found = []
    for most, looks in ((None, True), (None, False), (4, True), (5, False), (40, True)):
        chooser, gammas, ended = AdaptiveGamma(0.45, G), [], 0
        for sequence, length in enumerate((100, 57, 500, 300)):
            rounds = 0
            while rounds < length:
                gamma, number, look = chooser.next_chunk(size, most, looks)
                assert looks or look == NEVER

                def a_round(i: int) -> tuple[int, int]:
                    hits = np.random.default_rng((sequence, rounds + i)).random(gamma)  # noqa: B023
                    return gamma, int(np.cumprod(hits < 0.97 - (rounds + i) / 500).sum())  # noqa: B023

                done, counts = run((gamma, min(number, length - rounds), look), a_round)
                ended += done < min(number, length - rounds)
                rounds += done
                chooser.observe(done, *counts, last=rounds == length)
                gammas += [gamma] * done
        assert (ended > 0) == (looks and most != 4 and size > 32)
        found.append((gammas, chooser.acceptance))
    assert len(set(found[0][0])) > (3 if size == 32 else 2)
    assert all(other == found[0] for other in found)


def test_no_more_rounds_are_taken_of_a_chunk_than_are_asked_for():
    """Of the one that an earlier call left, too."""
    chooser, nothing = AdaptiveGamma(0.57, G), np.zeros((2, COUNTED), int)
    numbers = []
    for rounds, most in ((128, 32), (5, 32), (128, None)):
        numbers.append(chooser.next_chunk(rounds, most)[1])
        chooser.observe(numbers[-1], *nothing)
    assert numbers == [32, 5, 128 - 32 - 5]


def test_no_chunk_is_cut_short_but_those_that_try_again():
    """A call takes milliseconds before it decodes: short ones cost more than they teach."""
    chooser, lengths = AdaptiveGamma(0.45, G), []
    for _ in range(20):
        gamma, number, _ = chooser.next_chunk(32)
        accepted = np.zeros(COUNTED, int)
        accepted[:gamma] = number // 2
        chooser.observe(number, np.where(np.arange(COUNTED) < gamma, number, 0), accepted)
        lengths.append((gamma > 0, number))
    assert lengths[0] == (True, 32)
    assert {number for _, number in lengths} <= {32, PROBE_ROUNDS}


def test_a_gamma_that_stays_is_chosen_for_longer():
    """The first chunk with a γ ends early where it does not promise most; all others are as long as
    they may be. Plain decoding is left in time to try again."""

    def lengths(cost: float, accepted: int, chunks: int) -> list[tuple[int, int]]:
        chooser, found = AdaptiveGamma(cost, G), []
        for _ in range(chunks):
            chunk = chooser.next_chunk(128)
            gamma = chunk[0]
            number, counts = run(chunk, lambda _, g=gamma: (g, min(g, accepted)))
            chooser.observe(number, *counts)
            found.append((gamma, number))
        return found

    # All four places are accepted: a larger γ promises more, and is chosen once.
    many = lengths(0.2, MOST_DRAFTED, 4)
    assert many[0] == (4, 32)
    other = many[1][0]
    assert other > 4
    assert many[1:] == [(other, 128)] * 3
    # Drafts cost so much that no other one does.
    assert lengths(0.57, MOST_DRAFTED, 3) == [(4, 128)] * 3
    # None is: plain, and tries that come after 64 rounds of it, then 128, then 256.
    none = lengths(0.45, 0, 12)
    assert none[0] == (4, 32)
    tries = [i for i, (gamma, _) in enumerate(none) if i and gamma]
    assert [none[i][1] for i in tries] == [PROBE_ROUNDS] * len(tries)
    assert len(tries) >= 2
    plain = [sum(n for _, n in none[a + 1 : b]) for a, b in itertools.pairwise([0, *tries])]
    assert plain == [64, 128, 256, 512][: len(plain)]


def test_it_begins_with_the_program_of_the_trial():
    """Before anything was seen few per cent are a guess, and another program is compiled first."""
    began = {cost: AdaptiveGamma(cost, G).next_chunk(16)[0] for cost in (0.02, 0.3, 0.57, 0.7, 1.1)}
    assert began == {0.02: MOST_DRAFTED, 0.3: 4, 0.57: 4, 0.7: 4, 1.1: 0}


def test_what_would_not_pay_if_all_were_accepted_is_never_tried():
    """A try compiles a program: of SmolLM2 on two cores, where a draft step takes 1.6 plain ones,
    that took half a minute in the middle of a text."""
    _, _, gammas = simulate(1.6, lambda _: 1.0, 3000)
    assert not gammas.any()
    assert AdaptiveGamma(1.6, G).gammas == (0,)
    assert AdaptiveGamma(0.9, G).gammas == (0, 1, 2, 4, 7)
    assert AdaptiveGamma(0.5, G).gammas == (0, 1, 2, 4, 7, MOST_DRAFTED)


def test_a_small_group_leaves_room_for_fewer():
    assert max(AdaptiveGamma(0.01, 8).gammas) == 7
    assert max(AdaptiveGamma(0.01, 4).gammas) == 2


def test_tries_are_the_proposals_up_to_the_first_rejection():
    chooser = AdaptiveGamma(0.2, G)
    chooser._accepted = chooser._tried = 0.0
    proposed, accepted = np.zeros((2, COUNTED), int)
    # 10 rounds of 3: 8 firsts are right, 5 seconds, 5 thirds.
    proposed[:3], accepted[:3] = 10, (8, 5, 5)
    chooser.observe(10, proposed, accepted)
    assert (chooser._accepted, chooser._tried) == (18, 10 + 8 + 5)


@pytest.mark.parametrize("cost", [0.3, 0.45])
def test_places_that_are_accepted_less_than_the_first_promise_are_not_drafted_for_long(cost):
    """Acceptance that falls with the place: the last places cost more than they yield. (One α for
    all places would go on with the most.)"""
    falling = np.r_[0.97, 0.97, 0.96, 0.95, 0.7, 0.6, np.full(MOST_DRAFTED - 6, 0.5)]
    rng = np.random.default_rng(5)
    chooser = AdaptiveGamma(cost, G)
    tokens, spent, rounds = 0, 0.0, 0
    while rounds < 4000:
        gamma, number, _ = chooser.next_chunk(32)
        proposed, accepted = np.zeros((2, COUNTED), int)
        for _ in range(number):
            right = int(np.cumprod(rng.random(gamma) < falling[:gamma]).sum())
            proposed[:gamma] += 1
            accepted[:right] += 1
            tokens, spent = tokens + right + 1, spent + price(cost, gamma)
        chooser.observe(number, proposed, accepted)
        rounds += number
    reached = np.cumprod(falling)
    best = max((1 + reached[:g].sum()) / price(cost, g) for g in range(MOST_DRAFTED + 1))
    assert tokens / spent >= 0.97 * best


def test_a_dozen_rounds_that_went_badly_do_not_decide_about_later_places():
    """Rejections come in clusters: the first rounds of SmolLM2 after 7,600 tokens accept a third of
    the third places, all others four fifths."""
    chooser = AdaptiveGamma(0.45, G)
    chooser.gamma = 4
    proposed, accepted = np.zeros((2, COUNTED), int)
    proposed[:4], accepted[:4] = 12, (11, 10, 4, 4)
    chooser.observe(12, proposed, accepted)
    later = np.r_[0.96, 0.97, 0.94, 0.97, 0.97, 0.99, np.full(MOST_DRAFTED - 6, 0.97)]
    rng = np.random.default_rng(0)
    gammas: list[int] = []
    while len(gammas) < 150:
        gamma, number, _ = chooser.next_chunk(32)
        proposed, accepted = np.zeros((2, COUNTED), int)
        for _ in range(number):
            right = int(np.cumprod(rng.random(gamma) < later[:gamma]).sum())
            proposed[:gamma] += 1
            accepted[:right] += 1
        chooser.observe(number, proposed, accepted)
        gammas += [gamma] * number
    assert np.mean(np.array(gammas[50:]) >= 4) > 0.8


def test_as_many_are_drafted_as_a_pass_of_16_rows_holds_where_that_pays():
    """Drafts that read little of a long cache: a step costs a tenth of a verification."""
    _, _, gammas = simulate(0.1, lambda _: 0.98, 2000)
    assert (gammas[200:] == MOST_DRAFTED).mean() > 0.9
    _, _, gammas = simulate(0.1, lambda _: 0.7, 2000)
    assert (gammas[200:] < 8).mean() > 0.9
