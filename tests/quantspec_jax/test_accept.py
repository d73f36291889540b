"""Losslessness of the acceptance rule, by simulation against the exact distribution."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from tiny import OPTIMIZED, program, state_of
from transformers.generation import logits_process as hf

from quantspec_jax.generate import accept as rule
from quantspec_jax.generate import couplings
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.draft import Proposals
from quantspec_jax.generate.requests import sampling_arrays
from quantspec_jax.generate.sampling import Role, Sampling, choose, draw

N = 24
GAMMA = 4
START = 3  # the prompt is this one, pending token
DRAWS = 25_000
FEW = 5_000  # to notice what is broken
POSITIONS = 3  # whose joint distribution is compared
CONFIGS = {
    "temperature": GenerateConfig(temperature=0.7),
    "top-p": GenerateConfig(temperature=0.7, top_p=0.9),
    "top-k": GenerateConfig(temperature=0.7, top_k=20),
    "min-p": GenerateConfig(temperature=0.7, min_p=0.1),
    "penalty": GenerateConfig(temperature=0.7, repetition_penalty=1.3),
    "all": GenerateConfig(temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.3),
}


def tables() -> tuple[np.ndarray, np.ndarray]:
    """[N, N] logits of the target's and the draft's next token by the token before.

    Three tokens lead on to one another, so that they repeat within a round and the penalty bites.
    """
    random = np.random.default_rng(7)
    target = random.normal(size=(N, N)).astype(np.float32) * 1.5
    target[:, [2, 3, 5]] += 2.5
    return target, target + random.normal(size=(N, N)).astype(np.float32) * 1.2


PROGRAM = program(GAMMA)


def accept(target_logits, q, proposals, proposed, seen, sampling, keys, position):
    """`rule.accept` of arrays, the coupling being rejection."""
    state = state_of(seen, sampling, keys, position - 1)
    return rule.accept(target_logits, Proposals(proposals, q), proposed, state, PROGRAM)


def one_round(tokens, length, seen, sampling: Sampling, keys, proposed):
    """Draft γ tokens and judge the first `proposed`; tokens [B, P] filled up to `length` [B]."""
    target, draft = (jnp.asarray(x) for x in tables())
    sequence = jnp.arange(tokens.shape[0])

    def step(carry, i):
        last, seen = carry
        token, q = choose(draft[last], seen, sampling, keys, length + i, Role.DRAFT)
        return (token, seen.at[sequence, token].set(True)), (token, q)

    last = tokens[sequence, length - 1]
    _, (proposals, q) = jax.lax.scan(step, (last, seen), jnp.arange(GAMMA))
    proposals, q = proposals.swapaxes(0, 1), q.swapaxes(0, 1)
    context = jnp.concatenate([last[:, None], proposals], 1)
    verdict = accept(target[context], q, proposals, proposed, seen, sampling, keys, length)

    new = jnp.concatenate([proposals, proposals[:, :1]], 1)
    row = jnp.arange(GAMMA + 1)[None]
    new = jnp.where(row == verdict.accepted[:, None], verdict.token[:, None], new)
    kept = row <= verdict.accepted[:, None]
    # Slots past the end are dropped, and so is what was not kept.
    slot = jnp.where(kept, length[:, None] + row, tokens.shape[1])
    tokens = tokens.at[sequence[:, None], slot].set(new, mode="drop")
    seen = seen.at[sequence[:, None], jnp.where(kept, new, N)].set(True, mode="drop")
    return tokens, length + verdict.accepted + 1, seen, verdict.accepted


class Simulation(NamedTuple):
    tokens: np.ndarray  # [draws, POSITIONS]
    acceptance: float


def rounds(keys: jax.Array, sampling: Sampling, limit: int) -> tuple[jax.Array, jax.Array]:
    """Rounds until POSITIONS tokens stand, and the first round's acceptance; positions divisible
    by `limit` + 1 end a round, as the flush does.
    """
    draws = len(keys)
    tokens = jnp.full((draws, 1 + POSITIONS), START, jnp.int32)
    length = jnp.ones(draws, jnp.int32)
    seen = jnp.zeros((draws, N), bool).at[:, START].set(True)

    def step(state, _):
        tokens, length, seen = state
        proposed = jnp.minimum(GAMMA, limit - length % (limit + 1))
        *state, accepted = one_round(tokens, length, seen, sampling, keys, proposed)
        return tuple(state), accepted.sum() / proposed.sum()

    # A round gives at least one token.
    state, acceptance = jax.lax.scan(step, (tokens, length, seen), length=POSITIONS)
    return state[0], acceptance[0]


compiled_rounds = jax.jit(rounds, static_argnums=2, compiler_options=OPTIMIZED)


def simulate(
    config: GenerateConfig,
    limit: int = GAMMA,
    rounds: Callable = compiled_rounds,
    draws: int = DRAWS,
) -> Simulation:
    keys = jax.random.split(jax.random.key(11), draws)
    tokens, acceptance = rounds(keys, sampling_arrays(config, draws), limit)
    return Simulation(np.asarray(tokens)[:, 1:], float(acceptance))


def broken_rounds(keys: jax.Array, sampling: Sampling, limit: int) -> tuple[jax.Array, jax.Array]:
    """`rounds`, compiled anew for a rule that a test has just replaced."""
    return jax.jit(lambda *arguments: rounds(*arguments, limit))(keys, sampling)


def next_distribution(prefixes: np.ndarray, config: GenerateConfig) -> np.ndarray:
    """[R, N] float64: the target's after each of [R, length] prefixes, by transformers' own."""
    ids = torch.tensor(prefixes)
    processors = [
        hf.RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)),
        hf.TemperatureLogitsWarper(config.temperature),
    ]
    if config.top_k:
        processors.append(hf.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(hf.TopPLogitsWarper(config.top_p))
    if config.min_p:
        processors.append(hf.MinPLogitsWarper(config.min_p))
    scores = torch.tensor(tables()[0])[ids[:, -1]]
    for process in processors:
        scores = process(ids, scores)
    return torch.softmax(scores.double(), -1).numpy()


@functools.cache
def exact(config: GenerateConfig) -> np.ndarray:
    """[N, N, N] joint distribution of the three tokens after START."""
    prefixes = np.full((1, 1), START)
    joint = np.ones(1)
    for _ in range(POSITIONS):
        joint = (joint[:, None] * next_distribution(prefixes, config)).reshape(-1)
        following = np.tile(np.arange(N), len(prefixes))[:, None]
        prefixes = np.concatenate([np.repeat(prefixes, N, 0), following], 1)
    return joint.reshape((N,) * POSITIONS)


def p_value(tokens: np.ndarray, joint: np.ndarray) -> float:
    """Chi-square of observed triples; those expected less than 5 times are counted together."""
    draws = len(tokens)
    observed = np.bincount(np.ravel_multi_index(tokens.T, joint.shape), minlength=joint.size)
    expected = joint.reshape(-1) * draws
    if np.any(observed[expected == 0]):
        return 0.0
    rare = expected < 5
    together = [(observed[rare].sum(), expected[rare].sum())] if expected[rare].sum() >= 5 else []
    counts = np.array([*zip(observed[~rare], expected[~rare], strict=True), *together])
    statistic = ((counts[:, 0] - counts[:, 1]) ** 2 / counts[:, 1]).sum()
    return float(scipy.stats.chi2.sf(statistic, len(counts) - 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_rounds_follow_the_target_distribution(name: str) -> None:
    simulation = simulate(CONFIGS[name])
    assert 0.3 < simulation.acceptance < 0.8
    assert p_value(simulation.tokens, exact(CONFIGS[name])) > 0.01


def test_rounds_cut_short_follow_the_target_distribution() -> None:
    config = CONFIGS["all"]
    assert p_value(simulate(config, limit=2).tokens, exact(config)) > 0.01


def _residual_is_p(p, q):
    return p


def _draft_is_q(p, q):
    return jnp.where(jnp.sum(q, -1, keepdims=True) > 0, q, p)


BROKEN = {
    "everything is accepted": ("_accepts", lambda u, p, q: u < 2),
    "ratio upside down": ("_accepts", lambda u, p, q: u * p < q),
    "accepted where p > q only": ("_accepts", lambda u, p, q: q < p),
    "the target's distribution for the residual": ("_residual", _residual_is_p),
    "the draft's distribution for the residual": ("_residual", _draft_is_q),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, broken = BROKEN[name]
    monkeypatch.setattr(couplings, part, broken)
    config = CONFIGS["temperature"]
    assert p_value(simulate(config, rounds=broken_rounds, draws=FEW).tokens, exact(config)) < 1e-6


def test_forgetting_the_tokens_of_the_round_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen_before_the_round(seen, proposals):
        return jnp.repeat(seen[:, None], proposals.shape[1] + 1, 1)

    monkeypatch.setattr(rule, "_seen_by_row", seen_before_the_round)
    config = CONFIGS["penalty"]
    assert p_value(simulate(config, rounds=broken_rounds, draws=FEW).tokens, exact(config)) < 1e-6


jitted_accept = jax.jit(accept)


class Round(NamedTuple):
    """Arguments of `accept` but the sampling."""

    target_logits: jax.Array
    draft_probabilities: jax.Array
    proposals: jax.Array
    proposed: jax.Array
    seen: jax.Array
    keys: jax.Array
    position: jax.Array

    def judge(self, sampling: Sampling, accept: Callable = jitted_accept) -> couplings.Verdict:
        return accept(*self[:5], sampling, *self[5:])


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_round(b: int, n: int = 97) -> Round:
    keys = jax.random.split(jax.random.key(3), 6)
    logits = jax.random.normal(keys[0], (b, GAMMA + 1, n)) * 2
    q = jax.nn.softmax(logits[:, :-1] + jax.random.normal(keys[1], (b, GAMMA, n)))
    same = jax.random.bernoulli(keys[2], 0.8, (b, GAMMA))
    proposals = jnp.where(same, jnp.argmax(logits[:, :-1], -1), 5).astype(jnp.int32)
    return Round(
        logits,
        q,
        proposals,
        jnp.arange(b) % (GAMMA + 1),
        jax.random.bernoulli(keys[3], 0.3, (b, n)),
        jax.random.split(keys[4], b),
        100 + 3 * jnp.arange(b),
    )


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_accepts_while_the_draft_is_the_argmax(penalty: float) -> None:
    b = 40
    round_ = random_round(b)
    config = GenerateConfig(repetition_penalty=penalty)
    verdict = round_.judge(sampling_arrays(config, b))
    counts = set()
    for i in range(b):
        seen, accepted = np.array(round_.seen[i]), 0
        while True:
            x = np.array(round_.target_logits[i, accepted])
            x[seen] = np.where(x[seen] < 0, x[seen] * penalty, x[seen] / penalty)
            best = int(x.argmax())
            if accepted == round_.proposed[i] or best != round_.proposals[i, accepted]:
                break
            seen[best] = True
            accepted += 1
        assert verdict.accepted[i] == accepted
        assert verdict.token[i] == best
        counts.add(accepted)
    assert len(counts) >= GAMMA


def test_a_greedy_sequence_among_sampled_ones() -> None:
    """With one-hot draft probabilities the general rule is the greedy one."""
    b = 20
    round_ = random_round(b)
    n = round_.seen.shape[1]
    round_ = round_._replace(draft_probabilities=jax.nn.one_hot(round_.proposals, n))
    greedy = round_.judge(sampling_arrays(GenerateConfig(), b))
    sampling = sampling_arrays(GenerateConfig(), b)
    mixed = sampling._replace(temperature=sampling.temperature.at[-1].set(0.7))
    among = round_.judge(mixed)
    assert np.array_equal(greedy.accepted[:-1], among.accepted[:-1])
    assert np.array_equal(greedy.token[:-1], among.token[:-1])


def test_a_sequence_is_judged_in_a_batch_as_it_is_alone() -> None:
    b = 12
    round_ = random_round(b)
    sampling = sampling_arrays(CONFIGS["all"], b)
    batch = round_.judge(sampling)
    for i in range(b):
        alone = Round(*(x[i : i + 1] for x in round_)).judge(sampling_arrays(CONFIGS["all"], 1))
        assert (alone.accepted[0], alone.token[0]) == (batch.accepted[i], batch.token[i])


def test_an_identical_draft_is_always_accepted() -> None:
    """p = q in every bit: u q < p always, and nothing is left of the residual."""
    b = 64
    round_ = random_round(b)
    sampling = sampling_arrays(CONFIGS["temperature"], b)
    rows = rule._seen_by_row(round_.seen, round_.proposals)
    p = jax.jit(rule.warp)(round_.target_logits, rows, sampling)
    proposals = jnp.stack(
        [draw(p[:, i], round_.keys, round_.position + i, Role.DRAFT) for i in range(GAMMA)], 1
    )
    round_ = round_._replace(draft_probabilities=p[:, :-1], proposals=proposals)
    verdict = round_.judge(sampling)
    assert np.array_equal(verdict.accepted, round_.proposed)


def test_what_was_not_proposed_changes_nothing() -> None:
    b = 20
    round_ = random_round(b)
    counts = jnp.arange(GAMMA)[None] < round_.proposed[:, None]
    other = round_._replace(
        proposals=jnp.where(counts, round_.proposals, 11),
        draft_probabilities=jnp.where(counts[..., None], round_.draft_probabilities, 0.0),
    )
    for config in (GenerateConfig(repetition_penalty=1.3), CONFIGS["all"]):
        sampling = sampling_arrays(config, b)
        one, two = round_.judge(sampling), other.judge(sampling)
        assert np.array_equal(one.accepted, two.accepted)
        assert np.array_equal(one.token, two.token)


def test_without_proposals_the_token_is_the_target_s_own() -> None:
    """With γ 0 (autoregressive decoding) a token is drawn as `choose` draws it."""
    b = 12
    round_ = random_round(b)
    for config in (GenerateConfig(repetition_penalty=1.3), CONFIGS["all"]):
        sampling = sampling_arrays(config, b)
        verdict = round_._replace(
            target_logits=round_.target_logits[:, :1],
            draft_probabilities=round_.draft_probabilities[:, :0],
            proposals=round_.proposals[:, :0],
            proposed=jnp.zeros(b, jnp.int32),
        ).judge(sampling)
        token, _ = jax.jit(choose, static_argnums=5)(
            round_.target_logits[:, 0],
            round_.seen,
            sampling,
            round_.keys,
            round_.position,
            Role.TARGET,
        )
        assert not np.any(verdict.accepted)
        assert np.array_equal(verdict.token, token)


def test_nothing_left_of_the_residual_falls_back_to_the_target() -> None:
    p = jnp.asarray([[0.25, 0.75], [0.5, 0.5]])
    q = jnp.asarray([[0.5, 0.75], [0.25, 0.75]])
    np.testing.assert_array_equal(couplings._residual(p, q), [[0.25, 0.75], [0.25, 0.0]])


def test_other_parameters_compile_nothing() -> None:
    traces = []

    @jax.jit
    def judge(*arguments):
        traces.append(1)
        return accept(*arguments)

    round_ = random_round(3)
    for config in (GenerateConfig(), *CONFIGS.values()):
        round_.judge(sampling_arrays(config, 3), judge)
    assert len(traces) == 1


def test_greedy_does_no_sampling_work() -> None:
    """What is computed for draws (random bits, exp) stands inside the conditional alone."""
    round_ = random_round(2)
    jaxpr = jax.make_jaxpr(accept)(*round_[:5], sampling_arrays(GenerateConfig(), 2), *round_[5:])
    conditionals = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert len(conditionals) == 1
    n = round_.seen.shape[1]
    outside = [e for e in jaxpr.eqns if any(n in v.aval.shape for v in e.outvars)]
    assert not outside
    greedy, sampled = (str(branch) for branch in conditionals[0].params["branches"])
    assert "exp" in sampled
    assert "random" in sampled
    for work in ("exp ", "random", "cumsum", "while"):
        assert work not in greedy
