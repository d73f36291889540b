"""Losslessness of the couplings: by simulation, by enumeration, and token for token."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tiny import OPTIMIZED

from quantspec_jax.generate import couplings, sampling
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.couplings import COUPLINGS, Verdict, coupling
from quantspec_jax.generate.requests import sampling_arrays
from quantspec_jax.generate.sampling import (
    Role,
    choose,
    draw,
    draw_keys,
    warp,
)

N = 5
GAMMA = 3
START = 0  # the token before the first
DRAWS = 40_000
POSITIONS = 3  # whose joint distribution is compared
# How many proposals count, by the position of the first: rounds as long as they can be, cut short
# as the flush does it, and of each length.
LIMITS = {
    "all count": (3, 3, 3, 3),
    "none counts": (0, 0, 0, 0),
    "one counts": (1, 1, 1, 1),
    "two count": (2, 2, 2, 2),
    "fewer and fewer": (3, 3, 1, 0),
    "after a flush": (3, 0, 3, 2),
}


def tables(n: int = N, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """[n, n] probabilities, float64, of the target's and the draft's next token by the token
    before; each has zeros where the other has none."""
    random = np.random.default_rng(seed)
    p = random.gamma(0.7, size=(n, n)) + 0.02
    q = p * random.gamma(1.0, size=(n, n)) + 0.1 * random.random((n, n))
    rows = np.arange(n)
    p[rows, (rows + 2) % n] = 0
    q[rows, (rows + 1) % n] = 0
    return tuple(x / x.sum(-1, keepdims=True) for x in (p, q))


def one_round(name: str, tokens, length, keys, proposed):
    """Draft γ tokens and judge the first `proposed`; tokens [B, P] are filled up to length [B]."""
    target, draft = (jnp.asarray(x, jnp.float32) for x in tables())
    rule, sequence = coupling(name), jnp.arange(tokens.shape[0])
    draft_keys = rule.draft_keys(keys, length)

    def step(last, i):
        token = draw(draft[last], draft_keys, length + i, rule.draft_role)
        return token, token

    last = tokens[sequence, length - 1]
    _, proposals = jax.lax.scan(step, last, jnp.arange(GAMMA))
    proposals = proposals.swapaxes(0, 1)
    context = jnp.concatenate([last[:, None], proposals], 1)
    verdict = rule.verdict(
        target[context], draft[context[:, :-1]], proposals, proposed, keys, length
    )
    row, accepted = jnp.arange(GAMMA + 1)[None], verdict.accepted[:, None]
    new = jnp.concatenate([proposals, proposals[:, :1]], 1)
    new = jnp.where(row == accepted, verdict.token[:, None], new)
    # Slots past the end are dropped, and so is what was not kept.
    slot = jnp.where(row <= accepted, length[:, None] + row, tokens.shape[1])
    tokens = tokens.at[sequence[:, None], slot].set(new, mode="drop")
    return tokens, length + verdict.accepted + 1, verdict.accepted


class Simulation(NamedTuple):
    tokens: np.ndarray  # [draws, POSITIONS]
    accepted: np.ndarray  # [draws], in the first round


def rounds(name: str, keys: jax.Array, limits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds until POSITIONS tokens stand, and what the first accepted. limits [draws, 4]."""
    draws = len(keys)
    tokens = jnp.full((draws, 1 + POSITIONS), START, jnp.int32)

    def step(state, _):
        tokens, length = state
        at = jnp.minimum(length - 1, limits.shape[1] - 1)
        proposed = jnp.take_along_axis(limits, at[:, None], 1)[:, 0]
        *state, accepted = one_round(name, tokens, length, keys, proposed)
        return tuple(state), accepted

    # A round gives at least one token.
    state, accepted = jax.lax.scan(step, (tokens, jnp.ones(draws, jnp.int32)), length=POSITIONS)
    return state[0], accepted[0]


compiled = jax.jit(rounds, static_argnums=0, compiler_options=OPTIMIZED)


def simulate(name: str, limits: tuple[int, ...], run: Callable = compiled) -> Simulation:
    keys = jax.random.split(jax.random.key(23), DRAWS)
    each = jnp.broadcast_to(jnp.asarray(limits, jnp.int32), (DRAWS, len(limits)))
    tokens, accepted = run(name, keys, each)
    return Simulation(np.asarray(tokens)[:, 1:], np.asarray(accepted))


def anew() -> Callable:
    """`rounds`, to be compiled anew for a rule that a test has just replaced."""
    return jax.jit(lambda name, keys, limits: rounds(name, keys, limits), static_argnums=0)


def exact() -> np.ndarray:
    """[N, N, N] joint distribution of the three tokens after START."""
    p, _ = tables()
    return p[START][:, None, None] * p[:, :, None] * p[None]


def p_value(outcomes: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square of outcomes [draws, ...] against their probabilities; those expected less than 5
    times are counted together, and those that cannot be must not be."""
    draws = len(outcomes)
    index = np.ravel_multi_index(outcomes.reshape(draws, -1).T, expected.shape)
    observed = np.bincount(index, minlength=expected.size)
    expected = expected.reshape(-1) * draws
    if np.any(observed[expected == 0]):
        return 0.0
    rare = expected < 5
    together = [(observed[rare].sum(), expected[rare].sum())] if expected[rare].sum() >= 5 else []
    counts = np.array([*zip(observed[~rare], expected[~rare], strict=True), *together])
    statistic = ((counts[:, 0] - counts[:, 1]) ** 2 / counts[:, 1]).sum()
    return float(scipy.stats.chi2.sf(statistic, len(counts) - 1))


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", COUPLINGS)
def test_rounds_follow_the_target_distribution(name: str, limits: str) -> None:
    simulation = simulate(name, LIMITS[limits])
    assert p_value(simulation.tokens, exact()) > 0.01
    if LIMITS[limits][0] == GAMMA:
        assert set(simulation.accepted) == set(range(GAMMA + 1))


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_number_of_proposals_that_differs_from_sequence_to_sequence(name: str) -> None:
    limits = jnp.stack([(jnp.arange(DRAWS) + i) % (GAMMA + 1) for i in (0, 2, 1, 3)], 1)
    keys = jax.random.split(jax.random.key(29), DRAWS)
    tokens, _ = compiled(name, keys, limits)
    assert p_value(np.asarray(tokens)[:, 1:], exact()) > 0.01


def _unclamped(p, q):
    ratios = jnp.where(q > 0, p / q, 0.0)
    return jnp.cumprod(jnp.pad(ratios, ((0, 0), (1, 0)), constant_values=1.0), 1)


def _ratio_alone(p, q):
    return jnp.pad(jnp.minimum(p / q, 1.0), ((0, 0), (1, 0)), constant_values=1.0)


def _every_row_is_final(w, excess, proposed):
    return w


def _no_row_is_final(w, excess, proposed):
    return chances(w, excess, jnp.full_like(proposed, -1))


def _always_gamma(w, excess, proposed):
    return chances(w, excess, jnp.full_like(proposed, GAMMA))


def _excess_over_all(w, excess, proposed):
    after = jnp.pad(excess, ((0, 0), (0, 1)))
    final = jnp.arange(1, GAMMA + 1)[None] == proposed[:, None]
    return jnp.where(final, w, after / (after + 1))


def _without_w(w, p, q):
    return excess(jnp.ones_like(w), p, q)


chances, excess = couplings._chances, couplings._excess
MUTANTS = {
    "ends at the first failure": ("_last", couplings.leading),
    "the product is not clamped": ("_carried", _unclamped),
    "each proposal by its own ratio": ("_carried", _ratio_alone),
    "h is w everywhere": ("_chances", _every_row_is_final),
    "the last proposal as those between": ("_chances", _no_row_is_final),
    "the last of γ, not of those that count": ("_chances", _always_gamma),
    "1 for 1 − w in h": ("_chances", _excess_over_all),
    "p − q for w p − q in h": ("_excess", _without_w),
    "the target's distribution for the residual": ("_residual", lambda p, q: p),
    "the residual upside down": ("_residual", lambda p, q: jnp.maximum(q - p, 0) + 1e-9 * p),
    "p − q for w p − q in the residual": (
        "_residual",
        lambda p, q: jnp.maximum(p / jnp.sum(p, -1, keepdims=True) - q, 0),
    ),
    "p of another row at the end": ("row", lambda x, i: couplings_row(x, jnp.maximum(i - 1, 0))),
}
couplings_row = couplings.row


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_block_verification_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, broken = MUTANTS[name]
    monkeypatch.setattr(couplings, part, broken)
    run, joint = anew(), exact()
    assert any(p_value(simulate("block", x, run).tokens, joint) < 1e-6 for x in LIMITS.values())


def test_block_verification_needs_draws_of_its_own_in_each_round(monkeypatch) -> None:
    """A round that keeps few proposals has seen draws for positions that come again. Were they the
    same ones, the text would not follow the target; rejection sampling does not mind."""
    monkeypatch.setattr(couplings.Block, "draft_keys", lambda self, keys, position: keys)
    assert p_value(simulate("block", LIMITS["all count"], anew()).tokens, exact()) < 1e-6


@pytest.mark.parametrize("role", [Role.DRAFT, Role.ACCEPT])
def test_shared_noise_is_what_makes_invariant_drafts_accepted(role: Role, monkeypatch) -> None:
    """With noise of its own the draft is right by chance alone; the text stays the target's."""
    shared = simulate("invariant", LIMITS["all count"])
    monkeypatch.setattr(couplings.Invariant, "draft_role", role)
    own = simulate("invariant", LIMITS["all count"], anew())
    assert np.array_equal(own.tokens, shared.tokens)
    assert own.accepted.mean() < 0.6 * shared.accepted.mean()


# By enumeration: the equations in float64, over all proposals of a round.


def run_probabilities(proposed: int, ps, qs) -> np.ndarray:
    """[proposed + 1] chance that block verification keeps 0, 1, … proposals, given them: from
    their own p and q [proposed, N], in float64 (arXiv 2403.10444, algorithm 2)."""
    w, h = [1.0], []
    for i in range(proposed):
        p, q, x = ps[i], qs[i], qs[i].proposal
        w.append(min(w[-1] * p[x] / q[x], 1.0))
    for i in range(1, proposed + 1):
        if i == proposed:
            h.append(w[i])
            continue
        a = np.maximum(w[i] * ps[i] - qs[i], 0).sum()
        h.append(a / (a + 1 - w[i]) if a + 1 - w[i] > 0 else 1.0)
    found, none_later = np.zeros(proposed + 1), 1.0
    for i in range(proposed, 0, -1):
        found[i] = h[i - 1] * none_later
        none_later *= 1 - h[i - 1]
    found[0] = none_later
    return found


class Row(np.ndarray):
    """A row of probabilities that knows which token was drawn from it."""

    proposal: int


def kept_by_block(p: np.ndarray, q: np.ndarray, proposed: int) -> np.ndarray:
    """[proposed + 1] chances of how many proposals a round keeps, for tables p and q."""
    found = np.zeros(proposed + 1)
    for proposals in itertools.product(range(len(p)), repeat=proposed):
        context = (START, *proposals)
        chance = np.prod([q[a, b] for a, b in itertools.pairwise(context)])
        if not chance:
            continue
        qs = []
        for before, token in itertools.pairwise(context):
            row = q[before].view(Row)
            row.proposal = token
            qs.append(row)
        found += chance * run_probabilities(proposed, [p[a] for a in context], qs)
    return found


def kept_by_rejection(p: np.ndarray, q: np.ndarray, proposed: int) -> np.ndarray:
    """As `kept_by_block`."""
    reached = [1.0]
    overlap = np.minimum(p, q)
    reaching = np.eye(len(p))[START]
    for _ in range(proposed):
        reaching = reaching @ overlap
        reached.append(reaching.sum())
    return np.array(reached) - np.array([*reached[1:], 0.0])


def mean(chances: np.ndarray) -> float:
    return float(chances @ np.arange(len(chances)))


def test_the_example_of_the_paper() -> None:
    """Two tokens, p = (1/3, 2/3), q = (2/3, 1/3), two proposals: 10/9 are kept a token at a time,
    11/9 as a block (arXiv 2403.10444, section 2)."""
    p, q = (np.tile(row, (2, 1)) for row in ([1 / 3, 2 / 3], [2 / 3, 1 / 3]))
    assert mean(kept_by_rejection(p, q, 2)) == pytest.approx(10 / 9)
    assert mean(kept_by_block(p, q, 2)) == pytest.approx(11 / 9)


def test_block_verification_keeps_at_least_as_many() -> None:
    gains = []
    for seed in range(20):
        p, q = tables(4, seed)
        for proposed in range(4):
            gains.append(
                mean(kept_by_block(p, q, proposed)) - mean(kept_by_rejection(p, q, proposed))
            )
            assert gains[-1] > -1e-12
            if proposed < 2:  # a block of one is a proposal alone
                assert gains[-1] < 1e-12
    assert max(gains) > 0.05


@pytest.mark.parametrize("proposed", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "kept"), [("rejection", kept_by_rejection), ("block", kept_by_block)]
)
def test_as_many_are_kept_as_the_equations_say(name: str, kept: Callable, proposed: int) -> None:
    accepted = simulate(name, (proposed,) * 4).accepted
    assert p_value(accepted[:, None], kept(*tables(), proposed)) > 0.01


def test_invariant_accepts_as_often_as_the_noise_agrees() -> None:
    """Σᵢ 1 / Σⱼ max(pⱼ/pᵢ, qⱼ/qᵢ), between (1 − d)/(1 + d) and 1 − d."""
    p, q = (x[START] for x in tables())
    both = np.flatnonzero((p > 0) & (q > 0))
    agree = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in both)
    overlap = np.minimum(p, q).sum()
    assert overlap / (2 - overlap) <= agree <= overlap
    accepted = simulate("invariant", (1,) * 4).accepted
    assert p_value(accepted[:, None], np.array([1 - agree, agree])) > 0.01


# Token for token.

WIDE = 40  # tokens of the vocabulary in what follows


def logits_tables() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(2))
    target = 2 * jax.random.normal(keys[0], (WIDE, WIDE))
    return target, target + jax.random.normal(keys[1], (WIDE, WIDE))


def seen_rows(seen, proposals):
    """[B, γ+1, N] bool: row i has also seen the proposals before it."""
    rows = [seen]
    for i in range(proposals.shape[1]):
        rows.append(rows[-1].at[jnp.arange(len(seen)), proposals[:, i]].set(True))
    return jnp.stack(rows, 1)


def plain_text(config: GenerateConfig, keys: jax.Array, number: int) -> np.ndarray:
    """[B, number] tokens decoded one at a time, as the loop does with γ = 0."""
    target, b = logits_tables()[0], len(keys)
    settings = sampling_arrays(config, b)
    last = jnp.full(b, START, jnp.int32)
    seen = jnp.zeros((b, WIDE), bool).at[:, START].set(True)
    step = jax.jit(choose, static_argnums=5)
    text = []
    for i in range(number):
        last, _ = step(target[last], seen, settings, keys, jnp.full(b, 1 + i), Role.TARGET)
        seen = seen.at[jnp.arange(b), last].set(True)
        text.append(last)
    return np.stack(text, 1)


def speculated_text(
    name: str, config: GenerateConfig, keys: jax.Array, number: int, gamma: int, better: float
) -> tuple[np.ndarray, float]:
    """The same in rounds of γ proposals, 0 to γ of which count, drafted from a mixture of the
    target's logits and others; and the share that was accepted."""
    target, other = logits_tables()
    draft = better * target + (1 - better) * other
    rule, b = coupling(name), len(keys)
    settings = sampling_arrays(config, b)
    sequence = jnp.arange(b)

    @jax.jit
    def one(last, seen, length, proposed):
        draft_keys = rule.draft_keys(keys, length)

        def step(carry, i):
            before, known = carry
            token, q = choose(
                draft[before], known, settings, draft_keys, length + i, rule.draft_role
            )
            return (token, known.at[sequence, token].set(True)), (token, q)

        _, drafted = jax.lax.scan(step, (last, seen), jnp.arange(gamma))
        proposals, q = (x.swapaxes(0, 1) for x in drafted)
        context = jnp.concatenate([last[:, None], proposals], 1)
        p = warp(target[context], seen_rows(seen, proposals), settings)
        return proposals, rule.verdict(p, q, proposals, proposed, keys, length)

    texts: list[list[int]] = [[START] for _ in range(b)]
    accepted = tried = 0
    while min(map(len, texts)) <= number:
        length = np.array([len(text) for text in texts])
        seen = np.zeros((b, WIDE), bool)
        for i, text in enumerate(texts):
            seen[i, text] = True
        proposed = jnp.asarray((length + np.arange(b)) % (gamma + 1), jnp.int32)
        last = jnp.asarray([text[-1] for text in texts], jnp.int32)
        proposals, verdict = one(last, jnp.asarray(seen), jnp.asarray(length, jnp.int32), proposed)
        for i, text in enumerate(texts):
            kept = int(verdict.accepted[i])
            text += [*np.asarray(proposals[i, :kept]).tolist(), int(verdict.token[i])]
        accepted, tried = accepted + int(verdict.accepted.sum()), tried + int(proposed.sum())
    return np.array([text[1 : number + 1] for text in texts]), accepted / tried


SAMPLED = GenerateConfig(temperature=0.8, top_p=0.95, top_k=30, repetition_penalty=1.1)


@pytest.mark.parametrize(("gamma", "better"), [(1, 0.7), (4, 0.0), (7, 0.7)])
def test_an_invariant_text_is_the_plain_one(gamma: int, better: float) -> None:
    keys = jax.random.split(jax.random.key(31), 6)
    text, share = speculated_text("invariant", SAMPLED, keys, 40, gamma, better)
    assert np.array_equal(text, plain_text(SAMPLED, keys, 40))
    assert share > 0.15


@pytest.mark.parametrize("name", COUPLINGS)
def test_greedy_texts_are_the_same_under_every_coupling(name: str) -> None:
    """Among sampled sequences a greedy one has one-hot rows."""
    config = GenerateConfig(repetition_penalty=1.1)
    keys = jax.random.split(jax.random.key(31), 5)
    plain = plain_text(config, keys, 30)
    with pytest.MonkeyPatch.context() as patch:
        # All sequences are greedy, and the path of sampled ones is taken all the same.
        patch.setattr(sampling, "any_sampled", lambda _: jnp.bool_(True))
        text, share = speculated_text(name, config, keys, 30, 4, 0.5)
    assert np.array_equal(text, plain)
    assert 0.3 < share < 1


@pytest.mark.parametrize("name", COUPLINGS)
def test_sampled_texts_differ_from_the_plain_one_unless_invariant(name: str) -> None:
    """What `invariant` promises is not kept by chance."""
    keys = jax.random.split(jax.random.key(31), 6)
    text, _ = speculated_text(name, SAMPLED, keys, 40, 4, 0.7)
    assert np.array_equal(text, plain_text(SAMPLED, keys, 40)) == (name == "invariant")


class Round(NamedTuple):
    """Arguments of `verdict`."""

    p: jax.Array
    q: jax.Array
    proposals: jax.Array
    proposed: jax.Array
    keys: jax.Array
    position: jax.Array


@functools.lru_cache
@functools.partial(jax.jit, static_argnames=("name", "b", "n", "gamma", "noise"))
def random_round(name: str, b: int, n: int = 37, gamma: int = 4, noise: float = 1.0) -> Round:
    """Proposals drawn from q as the draft draws them; `noise` 0: q is p."""
    rule = coupling(name)
    keys = jax.random.split(jax.random.key(3), 3)
    logits = 2 * jax.random.normal(keys[0], (b, gamma + 1, n))
    p = jax.nn.softmax(logits)
    q = jax.nn.softmax(logits + noise * jax.random.normal(keys[1], logits.shape))[:, :-1]
    position = 100 + 3 * jnp.arange(b)
    own = jax.random.split(keys[2], b)
    draft_keys, positions = (
        rule.draft_keys(own, position),
        position[:, None] + jnp.arange(gamma)[None],
    )
    drawn = jax.vmap(lambda q, at: draw(q, draft_keys, at, rule.draft_role), 1, 1)
    proposals = drawn(q, positions) if gamma else jnp.zeros((b, 0), jnp.int32)
    return Round(p, q, proposals, jnp.arange(b) % (gamma + 1), own, position)


JITTED = {name: jax.jit(coupling(name).verdict) for name in COUPLINGS}


def judge(name: str, round_: Round) -> Verdict:
    return JITTED[name](*round_)


def same(a: Verdict, b: Verdict) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_rejection_draws_what_it_always_drew() -> None:
    """Bit for bit from the definition: u of role ACCEPT and the token of role TARGET, each at the
    position that it decides, from the sequence's own key."""
    round_ = random_round("rejection", 60)
    verdict = judge("rejection", round_)

    @jax.jit
    def noise(offset):
        accept, target = (
            draw_keys(round_.keys, round_.position + offset, role)
            for role in (Role.ACCEPT, Role.TARGET)
        )
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (37,)))(target)
        return jax.vmap(jax.random.uniform)(accept), gumbel

    u, gumbel = zip(*(jax.device_get(noise(i)) for i in range(5)), strict=True)
    p, q, proposals, proposed = jax.device_get(round_[:4])
    for i, x in enumerate(proposals):
        accepted = 0
        while accepted < proposed[i]:
            if not u[accepted][i] * q[i, accepted, x[accepted]] < p[i, accepted, x[accepted]]:
                break
            accepted += 1
        left = p[i, accepted]
        if accepted < proposed[i]:
            left = np.maximum(left - q[i, accepted], 0)
        with np.errstate(divide="ignore"):
            token = np.argmax(np.log(left) + gumbel[accepted][i])
        assert (verdict.accepted[i], verdict.token[i]) == (accepted, token)


@pytest.mark.parametrize("name", COUPLINGS)
def test_without_proposals_the_token_is_the_target_s_own(name: str) -> None:
    for gamma in (0, 4):
        round_ = random_round(name, 60, gamma=gamma)._replace(proposed=jnp.zeros(60, jnp.int32))
        plain = draw(round_.p[:, 0], round_.keys, round_.position, Role.TARGET)
        assert same(judge(name, round_), Verdict(jnp.zeros(60, jnp.int32), plain))


@pytest.mark.parametrize("name", COUPLINGS)
def test_an_identical_draft_is_always_accepted(name: str) -> None:
    round_ = random_round(name, 60, noise=0.0)
    assert np.array_equal(judge(name, round_).accepted, round_.proposed)


@pytest.mark.parametrize("name", COUPLINGS)
def test_what_was_not_proposed_changes_nothing(name: str) -> None:
    round_ = random_round(name, 60)
    counts = jnp.arange(4)[None] < round_.proposed[:, None]
    other = round_._replace(
        p=round_.p.at[:, 1:].set(jnp.where(counts[..., None], round_.p[:, 1:], 1 / 37)),
        proposals=jnp.where(counts, round_.proposals, 11),
        q=jnp.where(counts[..., None], round_.q, 0.0),
    )
    assert same(judge(name, round_), judge(name, other))


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_sequence_is_judged_in_a_batch_as_it_is_alone(name: str) -> None:
    round_ = random_round(name, 60)
    batch = judge(name, round_)
    for i in range(20):
        alone = judge(name, Round(*(x[np.array([i])] for x in round_)))
        assert (alone.accepted[0], alone.token[0]) == (batch.accepted[i], batch.token[i])


def sparse(random: np.random.Generator, scale: float, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of probabilities, half of them zero and some as small as `scale`."""
    x = random.random(shape)
    x = np.where(x < 0.5, 0, x * np.where(random.random(shape) < 0.3, scale, 1))
    x[x.sum(-1) < 1e-6] = 1
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0])
@pytest.mark.parametrize("name", COUPLINGS)
def test_nothing_is_kept_that_the_target_cannot_produce(name: str, scale: float) -> None:
    """Zeros in p and in q, tiny numbers, and proposals that q itself calls impossible."""
    b, n, gamma, random = 200, 8, 4, np.random.default_rng(7)
    p = sparse(random, scale, (b, gamma + 1, n))
    q = sparse(random, scale, (b, gamma, n))
    proposals = random.integers(0, n, (b, gamma), np.int32)
    proposed = np.arange(b, dtype=np.int32) % (gamma + 1)
    keys = jax.random.split(jax.random.key(4), b)
    verdict = judge(name, Round(p, q, proposals, proposed, keys, np.arange(b, dtype=np.int32)))
    accepted, token = (np.asarray(x) for x in verdict)
    assert np.all(accepted <= proposed)
    for i in range(b):
        kept = [*proposals[i, : accepted[i]], token[i]]
        assert all(p[i, row, x] > 0 for row, x in enumerate(kept))


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-4])
def test_block_verification_in_float32_is_that_of_float64(scale: float) -> None:
    """A large vocabulary and a draft that is nearly the target: w and h are nearly 0/0, and what
    follows from them, the chances of each length, is right to what rounding does to a sum."""
    b, n, gamma = 4, 20_000, 3
    keys = jax.random.split(jax.random.key(5), 3)
    logits = 3 * jax.random.normal(keys[0], (b, gamma, n))
    p = jax.nn.softmax(logits)
    q = jax.nn.softmax(logits + scale * jax.random.normal(keys[1], logits.shape))
    x = jax.random.categorical(keys[2], jnp.log(q))
    w = couplings._carried(couplings._at(p, x), couplings._at(q, x))
    a = couplings._excess(w[:, 1:gamma], p[:, 1:], q[:, 1:])
    h = couplings._chances(w[:, 1:], a, jnp.full(b, gamma))
    reach = np.zeros(b)
    for i in reversed(range(gamma)):
        reach = np.asarray(h[:, i], np.float64) * (1 - reach) + reach
    wide_p, wide_q = (np.asarray(y, np.float64) for y in (p, q))
    for i in range(b):
        rows = []
        for s in range(gamma):
            row = (wide_q[i, s] / wide_q[i, s].sum()).view(Row)
            row.proposal = int(x[i, s])
            rows.append(row)
        targets = wide_p[i] / wide_p[i].sum(-1, keepdims=True)
        kept = run_probabilities(gamma, targets, rows)
        assert reach[i] == pytest.approx(1 - kept[0], abs=1e-3 if scale else 1e-12)


def test_names() -> None:
    assert COUPLINGS == ("rejection", "block", "invariant")
    with pytest.raises(ValueError, match="coupling is 'greedy'; allowed: rejection, block"):
        coupling("greedy")
