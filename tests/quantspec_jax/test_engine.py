"""The engine: slots that come and go, each as if it were alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import quantspec_jax as qs
from quantspec_jax.engine import engine as module
from quantspec_jax.engine.engine import Engine
from quantspec_jax.generate.state import insert
from quantspec_jax.models.module import init_params

SHORT = {"max_new_tokens": 40, "group_size": 16, "gamma": 3}
PROMPTS = [[5, 6, 7] * 20, [9, 8] * 35, [11] * 33, list(range(1, 120)), [3, 1, 4, 1, 5]]


@pytest.fixture(scope="module")
def model():
    config = qs.ModelConfig("llama", 320, 32, 64, 1, 4, 2, 16, 1024)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    return qs.Model(config, params, None, qs.DraftConfig(group_size=32))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8},
        {"mode": "autoregressive", "kv": "full", "temperature": 0.8},
    ],
)
def test_requests_that_come_and_go_get_what_they_get_alone(model, options):
    """Two slots, five requests; each enters when a slot is free, while the other decodes."""
    config = qs.GenerateConfig(**SHORT, **options)
    key = jax.random.key(4)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(PROMPTS)))
    alone = [
        qs.generate(model, [p], config, keys[i : i + 1]).tokens[0] for i, p in enumerate(PROMPTS)
    ]
    engine = Engine(model, config, max(map(len, PROMPTS)), slots=2)
    waiting, running, found = list(range(len(PROMPTS))), {}, {}
    while waiting or running:
        while waiting and len(running) < 2:
            i = waiting.pop(0)
            (slot,) = engine.add([PROMPTS[i]], config, keys[i : i + 1])
            running[slot] = i
        engine.step(5)
        for slot in list(running):
            progress = engine.read(slot)
            if progress.finished:
                found[running.pop(slot)] = progress.tokens
                engine.remove(slot)
    assert [found[i] for i in range(len(PROMPTS))] == alone


def step_to_the_end(engine: Engine) -> None:
    while engine.running:
        engine.step(2)


@pytest.mark.parametrize("options", [{}, {"mode": "autoregressive", "kv": "full"}])
def test_logits_that_are_not_finite_are_an_error(model, options):
    """It names the sequence; the other one goes on, and slots can be freed."""
    config = qs.GenerateConfig(**SHORT, **options)
    alone = [qs.generate(model, [p], config).tokens[0] for p in PROMPTS[:2]]
    poison = next(t for t in alone[1][3:] if t not in {*alone[0], *PROMPTS[0], *PROMPTS[1]})
    params = model.params | {"embedding": model.params["embedding"].at[poison].set(np.nan)}
    damaged = qs.Model(model.config, params, None, model.draft)
    engine = Engine(damaged, config, max(map(len, PROMPTS)), slots=2)
    engine.add(PROMPTS[:2], config)
    words = r"logits are not finite .* sequence 1 \(after \d+ new tokens\)\. The weights may be"
    with pytest.raises(ValueError, match=words):
        step_to_the_end(engine)
    with pytest.raises(ValueError, match=words):
        engine.step(2)
    engine.remove(1)
    with pytest.raises(ValueError, match=r"sequence 1 \(after 0 new tokens\)"):
        engine.add([[poison]], config)
    step_to_the_end(engine)
    assert engine.read(0).tokens == alone[0]
    assert engine.add([PROMPTS[0]], config) == [1]
    with pytest.raises(ValueError, match="The weights may be damaged"):
        qs.generate(damaged, PROMPTS[1:2], config)


def test_each_request_has_its_own_wishes(model):
    """Greedy beside sampled, another limit, another end: in one batch."""
    wishes = [
        qs.GenerateConfig(**SHORT),
        qs.GenerateConfig(**{**SHORT, "max_new_tokens": 17}, temperature=1.0, top_k=9),
    ]
    keys = jax.random.split(jax.random.key(2), 2)
    alone = [
        qs.generate(model, [PROMPTS[i]], wish, keys[i : i + 1]).tokens[0]
        for i, wish in enumerate(wishes)
    ]
    end = alone[0][12]
    wishes[0] = qs.GenerateConfig(**SHORT, stop_ids=(end,))
    engine = Engine(model, qs.GenerateConfig(**SHORT), 128, slots=2)
    for i, wish in enumerate(wishes):
        assert engine.add([PROMPTS[i]], wish, keys[i : i + 1]) == [i]
    while engine.running:
        engine.step()
    assert engine.read(0).tokens == alone[0][: alone[0].index(end) + 1]
    assert engine.read(1).tokens == alone[1]


def test_the_host_looks_at_new_tokens_alone(model, monkeypatch):
    """Of a text of thousands: what a few rounds can have made, and no token twice. After many
    rounds, at all."""
    config = qs.GenerateConfig(**SHORT, logprobs=2)
    whole = qs.generate(model, PROMPTS[:2], config)
    most = 3 * (SHORT["gamma"] + 1)  # of three rounds
    monkeypatch.setattr(module, "LOOKED_AT", most)
    looked = []
    original = module._seen

    def seen(state, width):
        looked.append(width)
        return original(state, width)

    monkeypatch.setattr(module, "SEEN", jax.jit(seen, static_argnames="width"))
    engine = Engine(model, config, max(map(len, PROMPTS)), slots=2)
    engine.add([PROMPTS[0]], config)
    engine.step(3)
    engine.add([PROMPTS[1]], config)
    while engine.running:
        engine.step(3)
    rows = [engine.read(slot) for slot in range(2)]
    assert [row.tokens for row in rows] == whole.tokens
    for row, scores in zip(rows, whole.logprobs, strict=True):
        found, expected = ([x.own for x in each] for each in (row.logprobs, scores))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert set(looked) == {most}
    engine.remove(0)
    engine.add([PROMPTS[0]], config)
    engine.step(4)
    assert looked[-1] == engine.capacity
    step_to_the_end(engine)
    assert engine.read(0).tokens == whole.tokens[0]


def test_insertion_writes_its_rows_alone(model):
    """A pure function: every other row of every array stays as it is, bit for bit."""
    config = qs.GenerateConfig(**SHORT)

    def state(prompts):
        ready = qs.prepare(model, prompts, config, jax.random.key(1))
        run = jax.jit(qs.prefill, static_argnames=("program", "capacity"))
        program = ready.program.prompt
        return run(model.params, *ready.inputs, program=program, capacity=ready.capacity)

    three, one = state([p[:60] for p in PROMPTS[:3]]), state([PROMPTS[3][:60]])
    both = jax.jit(insert)(three, 1, one)
    raw = [
        jax.tree.leaves(
            jax.tree.map(lambda x: jax.random.key_data(x) if "key" in str(x.dtype) else x, each)
        )
        for each in (three, one, both)
    ]
    for before, new, after in zip(*raw, strict=True):
        np.testing.assert_array_equal(np.asarray(after)[[0, 2]], np.asarray(before)[[0, 2]])
        np.testing.assert_array_equal(after[1], new[0])


def test_a_slot_that_was_ended_stands_still(model):
    engine = Engine(model, qs.GenerateConfig(**SHORT), 128, slots=2)
    engine.add([PROMPTS[0], PROMPTS[1]])
    engine.step(2)
    engine.finish(0)
    before = engine.read(0).tokens
    engine.step(3)
    assert engine.read(0).tokens == before
    assert engine.read(0).finished
    assert len(engine.read(1).tokens) > len(before) - 5
    assert not engine.read(1).finished


def test_what_does_not_fit_is_refused_by_name(model):
    config = qs.GenerateConfig(**SHORT)
    with pytest.raises(ValueError, match="slots is 0"):
        Engine(model, config, 100, slots=0)
    engine = Engine(model, config, 100, slots=2)
    assert not engine.running
    with pytest.raises(ValueError, match="no sequence"):
        engine.step()
    with pytest.raises(ValueError, match=r"prompt is .*; allowed: 1 to 128"):
        engine.add([[1] * 200])
    with pytest.raises(ValueError, match="max_new_tokens is 500"):
        engine.add([[1] * 20], qs.GenerateConfig(**{**SHORT, "max_new_tokens": 500}))
    with pytest.raises(ValueError, match="3 prompts"):
        engine.add(PROMPTS[:1] * 3)
    engine.add([[1, 2]])
    with pytest.raises(ValueError, match="1 free"):
        engine.add([[1], [2]])


def test_six_lines_of_ones_own(model):
    """The pure functions in a user's jit, as README shows them."""
    config = qs.GenerateConfig(**SHORT)
    ready = qs.prepare(model, PROMPTS[:2], config)

    @jax.jit
    def decode(params, draft_params, inputs):
        program = ready.program
        state = qs.prefill(params, *inputs, program=program.prompt, capacity=ready.capacity)
        return qs.generate_tokens(params, draft_params, state, program=program).tokens

    tokens = np.asarray(decode(model.params, model.draft_params, ready.inputs))
    assert tokens[:, :40].tolist() == qs.generate(model, PROMPTS[:2], config).tokens
