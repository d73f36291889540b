"""Prompt lookup: what is copied, and that tokens are those without it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_session import DOCUMENT, make_model
from tiny import G, decode, new_tokens, prompts, start, total

import quantspec_jax as qs
from quantspec_jax.cli import make_parser
from quantspec_jax.commands.generate import generate_config
from quantspec_jax.engine.engine import Engine
from quantspec_jax.generate import lookup
from quantspec_jax.generate.lookup import LEAST, LONGEST, look
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.policies import ALL, TopPages
from quantspec_jax.generate.sampling import GREEDY

LENGTHS = [67, 50, 96]
NEW = 90


def by_hand(text: list[int], number: int) -> list[int] | None:
    """What is to be copied after a text; None: nothing."""

    def run(place: int) -> int:
        same = 0
        while same < LONGEST and same <= place and text[place - same] == text[-1 - same]:
            same += 1
        return same

    place = max(range(len(text) - 1), key=lambda i: (run(i), i), default=-1)
    if place < 0 or run(place) < LEAST:
        return None
    again = text[place + 1 :]
    return [again[i % len(again)] for i in range(number)]


@pytest.mark.parametrize("length", [lookup.CHUNK - 3, lookup.CHUNK, 2 * lookup.CHUNK + 5])
def test_what_followed_the_longest_and_latest_run_is_copied(length):
    rng = np.random.default_rng(length)
    texts = [
        rng.integers(0, 2, length - 7),  # many runs of `LONGEST` and more
        rng.integers(0, 3, length),
        rng.integers(0, 3, 40),
        rng.integers(0, 1000, length - 1),  # none
        np.tile(rng.integers(0, 1000, 5), 9),  # which overlaps itself
        np.concatenate([np.arange(20), rng.integers(50, 99, 300), np.arange(20)[:5]]),
        np.zeros(LEAST),  # one token too few
        np.zeros(LEAST + 1),
        np.arange(1),
    ]
    rows = rng.integers(0, 3, (len(texts), length))  # what lies beyond the text does not matter
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    last = jnp.asarray([len(text) - 1 for text in texts], jnp.int32)
    made = jax.jit(look, static_argnums=2)(jnp.asarray(rows, jnp.int32), last, 7)
    expected = [by_hand(text.astype(int).tolist(), 7) for text in texts]
    assert sum(each is None for each in expected) >= 3
    for row, (tokens, found) in enumerate(zip(made.tokens.tolist(), made.found, strict=True)):
        assert bool(found) == (expected[row] is not None), row
        if found:
            assert tokens == expected[row], row


def program(*args, **options):
    return tiny.program(*args, layers=1, warpers=GREEDY, **options)


@functools.cache
def repeating() -> np.ndarray:
    """Prompts whose second half is the first one's: the tiny model goes on as it likes."""
    rows = prompts(LENGTHS)
    for row, length in zip(rows, LENGTHS, strict=True):
        row[length // 2 : length] = row[: length - length // 2]
    return rows


def run(p, new=NEW, rows=slice(None), **options):
    lengths = LENGTHS[rows]
    return decode(p, start(p, repeating()[rows], lengths, new, **options))


@functools.cache
def plain() -> list[list[int]]:
    return new_tokens(run(program(0, width=5)))


@pytest.mark.parametrize(
    ("gamma", "policy"), [(4, ALL), (0, ALL), (4, TopPages(0.25)), (4, TopPages(0.25, every=4))]
)
@pytest.mark.parametrize("row", [0, 2])
def test_greedy_tokens_are_those_of_autoregressive_decoding(gamma, policy, row):
    """Five flushes; rounds of both kinds, which keep some proposals and reject others."""
    p = program(gamma, width=5, lookup=4, policy=policy)
    state = run(p, rows=slice(row, row + 1))
    assert new_tokens(state) == plain()[row : row + 1]
    rounds, proposed, accepted = np.asarray(state.copied)[0]
    assert 0 < accepted < proposed < 5 * rounds
    assert rounds < int(state.rounds[0]), "rounds that copy nothing are a part of it"
    made = int(state.cache.length[0]) - LENGTHS[row]
    assert made == int(state.rounds[0]) + int(total(state.accepted)[0]) + accepted


def test_a_batch_copies_where_all_of_its_sequences_can():
    state = run(program(4, lookup=4))
    assert new_tokens(state) == plain()
    copied = np.asarray(state.copied)
    assert (copied[:, 0] > 0).any()
    # One after the other they copy more.
    alone = [np.asarray(run(program(4, lookup=4), rows=slice(i, i + 1)).copied)[0] for i in (0, 2)]
    assert copied[0, 0] + copied[2, 0] < sum(each[0] for each in alone)


def test_the_text_is_written_down_whatever_program_ran():
    """Plain rounds, other γ, chunks: afterwards the state knows the text by position."""
    p = program(4, lookup=4)
    state = start(p, repeating(), LENGTHS, NEW)
    for other in (program(0), program(2), p, program(0, lookup=4)):
        state = decode(other, state, max_rounds=5)
    state = decode(p, state)
    assert new_tokens(state) == plain()
    for row, length in enumerate(LENGTHS):
        text = np.asarray(state.lookup.text[row])
        np.testing.assert_array_equal(text[:length], repeating()[row, :length])
        assert text[length : length + NEW].tolist() == plain()[row]


def test_a_state_without_a_text_copies_nothing():
    state = start(program(4), repeating(), LENGTHS, NEW)
    assert state.lookup is None
    state = decode(program(4, lookup=4), state)
    assert new_tokens(state) == plain()
    assert not np.asarray(state.copied).any()


# As users have it.


@pytest.fixture(scope="module")
def model(byte_level_tokenizer):
    return make_model(byte_level_tokenizer)


def config(**options) -> qs.GenerateConfig:
    return qs.GenerateConfig(
        **{"max_new_tokens": 60, "group_size": G, "max_length": 384, "ignore_eos": True} | options
    )


def test_sampled_text_is_the_same_with_copies_where_it_is_plain_samplings(model, monkeypatch):
    monkeypatch.setattr(lookup, "LEAST", 2)
    options = {"temperature": 0.5, "top_k": 4, "gamma": 2, "coupling": "invariant"}
    key = jax.random.key(3)
    alone = qs.generate(model, DOCUMENT, config(**options), key)
    copied = qs.generate(model, DOCUMENT, config(**options, lookup=2), key)
    assert copied.tokens == alone.tokens
    assert alone.stats[0]["lookup_rounds"] == 0
    stats = copied.stats[0]
    assert 0 < stats["lookup_accepted"] < stats["lookup_proposed"]
    assert stats["proposed"] > stats["lookup_proposed"]
    new = stats["new_tokens"] - 1
    assert new <= stats["rounds"] + stats["accepted"] <= new + 2


def test_sessions_and_slots_copy_what_generate_copies(model):
    """Prompts in tiles, one of them kept; and a sequence that comes into a slot beside another."""
    wants = config(gamma=3, lookup=3, prefill="tiles")
    expected = qs.generate(model, DOCUMENT, wants)
    session = qs.Session(model, wants)
    for _ in range(2):
        turn = session.generate(DOCUMENT)
        assert turn.tokens == expected.tokens[0]
        for name in ("rounds", "lookup_rounds", "lookup_accepted"):
            assert turn.stats[name] == expected.stats[0][name]
    whole = config(gamma=3, lookup=3)
    ids = model.tokenizer.encode(DOCUMENT)
    engine = Engine(model, whole, len(ids), slots=2)
    (first,) = engine.add([ids])
    engine.step(4)
    (second,) = engine.add([ids[:-9]])
    while engine.running:
        engine.step()
    made = [engine.read(slot).tokens for slot in (first, second)]
    alone = [qs.generate(model, x, whole).tokens[0] for x in (ids, ids[:-9])]
    assert made == alone


def test_what_stands_for_what():
    assert qs.GenerateConfig().copies == 7
    assert qs.GenerateConfig(gamma=4).copies == 0
    assert qs.GenerateConfig(gamma=4, lookup=9).copies == 9
    assert qs.GenerateConfig(lookup=0).copies == 0
    assert qs.GenerateConfig(mode="autoregressive").copies == 0
    assert qs.GenerateConfig(group_size=8, prefill="tiles").copies == 7
    parsed = make_parser().parse_args(["generate", "--model", "m", "--prompt", "p", "--lookup=5"])
    assert generate_config(parsed).copies == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lookup": -1}, "lookup is -1; allowed: an integer from 0 to 127, or None"),
        ({"lookup": 128}, "lookup is 128; allowed: an integer from 0 to 127, or None"),
        ({"lookup": 2.0}, "lookup is 2.0; allowed: an integer"),
        (
            {"lookup": 3, "mode": "autoregressive"},
            "lookup is 3; allowed: None or 0 in mode autoregressive",
        ),
    ],
)
def test_what_is_not_possible_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        qs.GenerateConfig(**options)


def test_a_state_for_another_number_of_copies_is_refused():
    state = jax.eval_shape(lambda: start(program(4, lookup=3), repeating(), LENGTHS, NEW))
    other = program(4, lookup=4)
    with pytest.raises(ValueError, match=r"tokens of state.lookup is 3; allowed: 4"):
        jax.eval_shape(lambda x: generate_tokens({}, {}, x, program=other), state)
