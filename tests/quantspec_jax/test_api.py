"""`generate` and `stream`: what the host does around the loop."""

from __future__ import annotations

import dataclasses
import re
import sys
import types

import jax
import numpy as np
import pytest

import quantspec_jax as qs
from quantspec_jax import memory
from quantspec_jax.cache import create
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.engine import draft_cost, programs
from quantspec_jax.engine.bucket import bucket
from quantspec_jax.engine.engine import Engine
from quantspec_jax.generate.policies import TopPages
from quantspec_jax.generate.state import SHARES, Look
from quantspec_jax.models.module import init_params
from quantspec_jax.text.detokenize import decode
from quantspec_jax.weights.sizes import draft_bytes


@pytest.fixture(scope="module")
def model(byte_level_tokenizer):
    config = qs.ModelConfig("llama", 320, 32, 64, 1, 4, 2, 16, 1024)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    return qs.Model(config, params, byte_level_tokenizer, qs.DraftConfig(group_size=32))


FAST = {"max_new_tokens": 40, "group_size": 16, "gamma": 4}
AUTO = {**FAST, "gamma": "auto"}


def test_statistics_add_up(model):
    prompts = [[5, 6, 7] * 20, [9, 8] * 35]
    out = qs.generate(model, prompts, qs.GenerateConfig(**FAST))
    for tokens, text, stats in zip(out.tokens, out.text, out.stats, strict=True):
        assert text == model.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert stats["new_tokens"] == len(tokens) == 40
        assert stats["finish_reason"] == "length"
        assert stats["rounds"] <= 39 <= stats["rounds"] + stats["accepted"]
        assert stats["acceptance_rate"] == stats["accepted"] / stats["proposed"]
        assert stats["tokens_per_round"] == 39 / stats["rounds"]
        assert stats["decode_tokens_per_second"] == pytest.approx(39 / stats["decode_seconds"])
        parts = stats["cache_bytes"]
        assert parts["total"] == sum(parts[k] for k in ("upper", "lower", "scales", "buffer"))
    assert [s["prompt_tokens"] for s in out.stats] == [60, 70]


def test_adaptive_gamma_is_reported_and_changes_no_token(model):
    prompt = [[5, 6, 7] * 20]
    out = qs.generate(model, prompt, qs.GenerateConfig(**AUTO, draft_cost=0.1))
    fixed = qs.GenerateConfig(**FAST, mode="autoregressive", kv="int8")
    assert out.tokens == qs.generate(model, prompt, fixed).tokens
    stats = out.stats[0]
    assert stats["gamma"] == "auto"
    assert 0 < stats["mean_gamma"] == stats["proposed"] / stats["rounds"] <= 7
    assert stats["draft_cost"] == 0.1
    assert stats["trial_seconds"] == 0


def test_speculation_switches_itself_off_where_it_does_not_pay(model):
    config = qs.GenerateConfig(**AUTO, draft_cost=3.0, lookup=0)
    out = qs.generate(model, [[5, 6, 7] * 20], config)
    stats = out.stats[0]
    assert (stats["proposed"], stats["rounds"], stats["acceptance_rate"]) == (0, 39, None)


@pytest.fixture
def costs(tmp_path, monkeypatch):
    """A place of its own for what is measured, and nothing known yet."""
    monkeypatch.setenv("QUANTSPEC_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setattr(draft_cost, "_known", {})
    return tmp_path / "xla" / "draft_costs"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_cost_of_a_draft_step_is_measured_once_and_changes_no_token(
    model, costs, temperature, monkeypatch
):
    """Its trial takes everything back: the text is what it is with the same cost given; and it is
    kept for other processes."""
    monkeypatch.setattr(draft_cost, "guessed", lambda *_: None)  # as where kernels run
    config = {**AUTO, "max_new_tokens": 80, "temperature": temperature}
    prompt = [[5, 6, 7] * 20, [9, 8] * 35]
    first = qs.generate(model, prompt, qs.GenerateConfig(**config))
    cost = first.stats[0]["draft_cost"]
    assert 0.01 <= cost <= 100
    assert first.stats[0]["trial_seconds"] > 0
    given = qs.generate(model, prompt, qs.GenerateConfig(**config, draft_cost=cost))
    assert given.tokens == first.tokens
    assert [s["rounds"] for s in given.stats] == [s["rounds"] for s in first.stats]

    monkeypatch.setattr(draft_cost, "measured", lambda *_: pytest.fail("measured again"))
    assert qs.generate(model, prompt, qs.GenerateConfig(**config)).tokens == first.tokens
    draft_cost._known.clear()  # as in another process
    assert qs.generate(model, prompt, qs.GenerateConfig(**config)).tokens == first.tokens
    (file,) = costs.iterdir()
    file.write_text("{")  # damaged: measured again
    draft_cost._known.clear()
    monkeypatch.setattr(draft_cost, "measured", lambda state, *_: (state, cost))
    assert qs.generate(model, prompt, qs.GenerateConfig(**config)).tokens == first.tokens


def test_where_drafts_cannot_pay_no_program_of_theirs_is_made(model, costs, monkeypatch):
    """Passes of one layer say so; it is kept, as what is measured is."""
    monkeypatch.setattr(draft_cost, "guessed", lambda *_: 1.5)
    monkeypatch.setattr(draft_cost, "measured", lambda *_: pytest.fail("a trial"))
    config = qs.GenerateConfig(**AUTO | {"max_new_tokens": 80}, lookup=0)
    out = qs.generate(model, [[5, 6, 7] * 20], config)
    assert (out.stats[0]["draft_cost"], out.stats[0]["proposed"]) == (1.5, 0)
    assert len([*costs.iterdir()]) == 1
    monkeypatch.setattr(draft_cost, "guessed", lambda *_: pytest.fail("again"))
    draft_cost._known.clear()
    assert qs.generate(model, [[5, 6, 7] * 20], config).tokens == out.tokens


def test_of_few_tokens_the_cost_is_guessed(model, costs, monkeypatch):
    """By bytes, else by passes of one layer, once."""
    monkeypatch.setattr(draft_cost, "measured", lambda *_: pytest.fail("a trial"))
    config = qs.GenerateConfig(**AUTO | {"max_new_tokens": 20})
    found = []
    for guess in (None, 0.6, 0.7):
        monkeypatch.setattr(draft_cost, "guessed", lambda *_, guess=guess: guess)
        found += [qs.generate(model, [[5, 6, 7] * 20], config).stats[0]["draft_cost"]]
    assert found == [pytest.approx(0.3, abs=0.29), 0.6, 0.6]
    assert len([*costs.iterdir()]) == 1


def test_a_guess_at_the_cost_of_a_draft_step(model, monkeypatch):
    engine = Engine(model, qs.GenerateConfig(**AUTO), 60)
    engine.add([[5, 6, 7] * 20])
    program, state = engine.program, engine._state
    before = jax.tree.map(np.asarray, state.cache)

    def guess(program):
        return draft_cost.guessed(model, state, program, engine._runner.ready)

    assert 0.01 < guess(program) < 100
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state.cache))
    assert guess(dataclasses.replace(program, policy=TopPages(0.5))) is None
    monkeypatch.setattr(draft_cost.dispatch, "device", lambda: "a GPU")
    assert guess(program) is None


def test_what_a_call_costs_is_no_part_of_a_draft_step(model):
    """A GPU's takes milliseconds before its first round, as long as several plain steps."""
    engine = Engine(model, qs.GenerateConfig(**AUTO), 60)
    engine.add([[5, 6, 7] * 20])
    ran = []

    def decode(state, rounds, trial):
        ran.append(rounds)
        return state, 0.006 + rounds * 0.0013 * (1 + 0.43 * trial.gamma)

    _, cost = draft_cost.measured(engine._state, engine.program, decode)
    assert cost == pytest.approx(0.43)
    assert max(ran) <= draft_cost.MOST_ROUNDS
    ran.clear()

    def slow(state, rounds, trial):
        ran.append(rounds)
        return state, 0.2 * rounds * (1 + 0.43 * trial.gamma)

    _, cost = draft_cost.measured(engine._state, engine.program, slow)
    assert cost == pytest.approx(0.43)
    assert ran == [1] * 4, "where a round takes long, one is enough"


def test_a_second_call_asks_no_program_what_memory_it_takes(model, monkeypatch):
    """XLA's answer takes up to a second for each, as long as some hundred tokens."""
    prompt, config = [[5, 6, 7] * 20], qs.GenerateConfig(**FAST)
    first = qs.generate(model, prompt, config)
    asked = "memory_analysis"
    monkeypatch.setattr(jax.stages.Compiled, asked, lambda _: pytest.fail("asked again"))
    assert qs.generate(model, prompt, config).tokens == first.tokens


def test_another_gamma_or_coupling_compiles_no_prefill(model, monkeypatch):
    """Programs are compiled for what they read."""
    monkeypatch.setattr(programs, "PROGRAMS", programs.Programs())
    prompt = [list(range(1, 90))]
    stats = qs.generate(model, prompt, qs.GenerateConfig(**{**FAST, "gamma": 2})).stats[0]
    kept = len(programs.PROGRAMS)
    most = programs.MOST_PROGRAMS
    assert stats["programs"] == {"kept": kept, "most": most, "made": kept, "bytes": 0}
    before = set(programs.PROGRAMS._by_form)
    qs.generate(model, prompt, qs.GenerateConfig(**{**FAST, "gamma": 3}))
    qs.generate(model, prompt, qs.GenerateConfig(**{**FAST, "gamma": 2}, coupling="invariant"))
    new = set(programs.PROGRAMS._by_form) - before
    assert {key[0] for key in new} == {id(programs.DECODE)}
    assert len(new) == 2


def test_compiled_programs_are_bounded_and_the_last_used_stay():
    kept = programs.Programs(most=2)
    double = jax.jit(lambda x: 2 * x)
    forms = [np.zeros(n, np.float32) for n in (1, 2, 3)]
    for form in (forms[0], forms[1], forms[0], forms[2]):
        kept.compiled(double, form)
    assert len(kept) == 2
    assert kept.compiled(double, forms[0])[1] == 0
    assert kept.compiled(double, forms[2])[1] == 0
    assert kept.compiled(double, forms[1])[1] > 0
    assert kept.statistics() == {"kept": 2, "most": 2, "made": 4, "bytes": 0}


def test_streaming_gives_the_text_in_pieces(model):
    config = qs.GenerateConfig(**FAST, rounds_per_chunk=2)
    whole = qs.generate(model, "The cache", config)
    heard: list[str] = []
    qs.generate(model, "The cache", config, on_text=lambda i, piece: heard.append(piece))
    assert "".join(heard) == "".join(qs.stream(model, "The cache", config)) == whole.text[0]
    assert len(heard) > 3


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": "auto", "draft_cost": 0.3},
        {"gamma": 3},
        {"gamma": 3, "draft_policy": "top-pages", "draft_every": 3},
    ],
)
def test_whoever_waits_for_text_sees_it_soon(model, options):
    """A CPU takes seconds for a chunk. The text is that which nobody waits for."""
    config = qs.GenerateConfig(**FAST | options, temperature=0.8)
    whole = qs.generate(model, "The cache", config)
    heard: list[str] = []
    qs.generate(model, "The cache", config, on_text=lambda i, piece: heard.append(piece))
    assert "".join(heard) == "".join(qs.stream(model, "The cache", config)) == whole.text[0]
    rounds = whole.stats[0]["rounds"]
    assert rounds > 4
    in_pieces = "draft_every" not in options  # where calls choose pages, none are added
    assert len(heard) == 1 + -(-rounds // (4 if in_pieces else 32))


@pytest.mark.parametrize("options", [{"gamma": "auto", "draft_cost": 0.3}, {"gamma": 3}])
def test_where_nobody_waits_calls_are_as_long_as_chunks(model, monkeypatch, options):
    """As on a GPU. The text is that of short calls; a stop string waits for it, too."""
    calls: list[int] = []
    monkeypatch.setattr(Engine, "_most_rounds", lambda self, heard: 3 if heard else None)
    decode = Engine._decode

    def counted(self, state, rounds, *rest):
        calls.append(rounds)
        return decode(self, state, rounds, *rest)

    monkeypatch.setattr(Engine, "_decode", counted)
    config = qs.GenerateConfig(**FAST | options, temperature=0.8, rounds_per_chunk=9)
    whole = qs.generate(model, "The cache", config)
    assert set(calls) == {9}
    calls.clear()
    pieces = list(qs.stream(model, "The cache", config))
    assert "".join(pieces) == whole.text[0]
    assert set(calls) == {3}
    calls.clear()
    never = dataclasses.replace(config, stop=("\0",))
    assert qs.generate(model, "The cache", never).text == whole.text
    assert set(calls) == {3}


@pytest.mark.parametrize(
    ("options", "most", "asked"),
    [
        ({"gamma": "auto", "draft_cost": 0.3}, 20, 6),
        ({"gamma": 3}, 20, 20),
        ({"gamma": 3}, None, 6),  # a first call
        ({"gamma": 3}, 4, 4),
        ({"gamma": 3, "rounds_per_chunk": 7}, 20, 7),
        ({"mode": "autoregressive"}, 20, 20),
    ],
)
def test_calls_are_as_long_as_they_may_be(model, monkeypatch, options, most, asked):
    """But where γ is chosen anew, and where nobody knows how long that takes."""
    monkeypatch.setattr(Engine, "_most_rounds", lambda self, heard: most)
    monkeypatch.setattr("quantspec_jax.engine.engine.CHUNK", 6)
    calls: list[int] = []
    decode = Engine._decode

    def counted(self, state, rounds, *rest):
        calls.append(rounds)
        return decode(self, state, rounds, *rest)

    monkeypatch.setattr(Engine, "_decode", counted)
    qs.generate(model, "The cache", qs.GenerateConfig(**FAST | options, ignore_eos=True))
    assert set(calls) == {asked}


@pytest.mark.parametrize("well", [True, False])
def test_a_text_whose_drafts_pay_is_one_call(model, monkeypatch, well):
    """Of a GPU: where γ adapts, what the first rounds accept ends it or does not. The text is that
    of looks by the host."""
    asked, kept = 64, []
    config = qs.GenerateConfig(
        **FAST | {"gamma": "auto", "draft_cost": 0.3, "max_new_tokens": asked}, ignore_eos=True
    )
    by_host = qs.generate(model, "The cache", config)
    monkeypatch.setattr(Engine, "_most_rounds", lambda self, heard: None)
    bounds = (0, SHARES) if well else (SHARES + 1, 0)
    monkeypatch.setattr("quantspec_jax.engine.adaptive.stays_best", lambda *args: Look(5, *bounds))
    decode = Engine._decode

    def counted(self, state, rounds, program, look):
        before = int(state.rounds.max())
        out = decode(self, state, rounds, program, look)
        kept.append(int(out[0].rounds.max()) - before)
        return out

    monkeypatch.setattr(Engine, "_decode", counted)
    out = qs.generate(model, "The cache", config)
    assert out.tokens == by_host.tokens
    assert (len(kept) == 1) == well
    assert (kept[0] == 5) == (not well)
    assert sum(kept) == out.stats[0]["rounds"]


def test_calls_of_more_rounds_make_no_program(model):
    """What the host looks at after a call has one form, however many rounds it had."""
    config = qs.GenerateConfig(**FAST | {"max_new_tokens": 400}, ignore_eos=True)
    engine = Engine(model, config, 20)
    engine.add([[5, 6, 7] * 6])
    engine.advance(2)
    made = programs.PROGRAMS.made
    for rounds in (8, 32):  # up to 40 and 160 tokens
        engine.advance(rounds)
    assert engine.running
    assert programs.PROGRAMS.made == made


@pytest.mark.parametrize(
    ("backend", "processes", "heard", "seconds", "most"),
    [
        ("cpu", 1, True, None, 4),
        ("cpu", 1, False, 0.01, 32),
        ("gpu", 1, True, 0.01, 32),
        ("gpu", 1, True, 0.004, 75),
        ("gpu", 1, True, None, 32),
        ("gpu", 2, True, 0.004, 32),
        ("gpu", 1, False, None, None),
        ("gpu", 1, False, 0.01, 200),
        ("gpu", 1, False, 0.5, 32),  # an interruption is noticed soon where rounds take long
        ("gpu", 2, False, 0.5, None),  # all ask for as many, whatever their clocks say
    ],
)
def test_how_many_rounds_a_call_has_at_most(monkeypatch, backend, processes, heard, seconds, most):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    engine = types.SimpleNamespace(seconds_a_round=seconds)
    assert Engine._most_rounds(engine, heard) == most


def test_a_stop_string_cuts_text_and_tokens(model):
    free = qs.generate(model, [[5, 6, 7] * 20], qs.GenerateConfig(**FAST))
    stop = free.text[0][10:13]
    out = qs.generate(model, [[5, 6, 7] * 20], qs.GenerateConfig(**FAST, stop=(stop,)))
    assert out.stats[0]["finish_reason"] == "stop"
    assert out.text[0] == free.text[0][: free.text[0].index(stop)]
    assert out.tokens[0] == free.tokens[0][: len(out.tokens[0])]
    assert stop in model.tokenizer.decode(out.tokens[0])


def test_stop_ids_end_a_sequence_beside_the_models_own(model):
    """Also where these are ignored; the text has no special token's."""
    free = qs.generate(model, [[5, 6, 7] * 20], qs.GenerateConfig(**FAST))
    token = free.tokens[0][5]
    cut = free.tokens[0][: free.tokens[0].index(token) + 1]
    for ignore in (False, True):
        config = qs.GenerateConfig(**FAST | {"ignore_eos": ignore}, stop_ids=(token,))
        out = qs.generate(model, [[5, 6, 7] * 20], config)
        assert out.tokens[0] == cut
        assert out.stats[0]["finish_reason"] == "eos"
    assert config.end_ids((3, token), 320) == (token,)
    assert qs.GenerateConfig(stop_ids=[4, 3]).end_ids((3, 9), 320) == (3, 9, 4)
    for wrong in ((-1,), (1.0,), ("a",), (True,)):
        with pytest.raises(ValueError, match="stop_ids is"):
            qs.GenerateConfig(stop_ids=wrong)
    beyond = qs.GenerateConfig(stop_ids=(10**6,))
    with pytest.raises(ValueError, match="a token id of stop_ids is 1000000"):
        qs.generate(model, [5, 6], beyond)


def test_a_completion_begins_with_its_space(model, byte_fallback_tokenizer):
    """Which a tokenizer of SentencePiece's kind drops at the beginning of a text."""
    model = qs.Model(model.config, model.params, byte_fallback_tokenizer, model.draft)
    config = qs.GenerateConfig(**FAST, rounds_per_chunk=1)
    prompt = byte_fallback_tokenizer("the cat")["input_ids"]
    out = qs.generate(model, prompt, config)
    both = decode(byte_fallback_tokenizer, prompt + out.tokens[0])
    assert out.text[0] == both.removeprefix("the cat")
    assert both.startswith("the cat")
    assert "".join(qs.stream(model, prompt, config)) == out.text[0]


def test_an_interruption_returns_what_there_is(model):
    config = qs.GenerateConfig(**FAST, rounds_per_chunk=1)
    whole = qs.generate(model, [[1, 2, 3]], config)

    def interrupt(index, piece, heard=[]):  # noqa: B006
        heard.append(piece)
        if len(heard) == 3:
            raise KeyboardInterrupt

    out = qs.generate(model, [[1, 2, 3]], config, on_text=interrupt)
    assert out.stats[0]["finish_reason"] == "interrupted"
    assert 0 < len(out.tokens[0]) < 40
    assert out.tokens[0] == whole.tokens[0][: len(out.tokens[0])]


def test_the_same_key_gives_the_same_tokens_and_sequences_have_their_own(model):
    config = qs.GenerateConfig(**FAST, temperature=1.0)
    prompt = [5, 6, 7] * 20
    key = jax.random.key(3)
    pair = qs.generate(model, [prompt, prompt], config, key)
    again = qs.generate(model, [prompt, prompt], config, key)
    assert pair.tokens == again.tokens
    assert pair.tokens[0] != pair.tokens[1]
    keys = jax.random.split(key, 2)
    both = qs.generate(model, [prompt, prompt], config, keys)
    alone = qs.generate(model, [prompt], config, keys[1:])
    assert alone.tokens[0] == both.tokens[1]


def test_one_compilation_serves_a_bucket(model):
    """Prompts of the bucket, seeds, temperature, filters, penalty, EOS: nothing is compiled."""
    prompt = list(range(1, 130))
    qs.generate(model, [prompt], qs.GenerateConfig(max_new_tokens=9))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    try:
        for i, options in enumerate(
            [
                {},
                {"temperature": 0.7},
                {"temperature": 1.1, "top_p": 0.8, "top_k": 7, "min_p": 0.02},
                {"repetition_penalty": 1.3},
                {"ignore_eos": True},
            ]
        ):
            config = qs.GenerateConfig(max_new_tokens=9 + i, **options)
            out = qs.generate(model, [[*prompt[: 140 + 9 * i], i]], config, jax.random.key(i))
            assert out.stats[0]["compile_seconds"] == 0
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled


@pytest.mark.parametrize("length", [1, 128, 129, 192, 193, 1000, 4000, 131072])
def test_buckets_hold_their_lengths_and_waste_at_most_half(length):
    size = bucket(length)
    assert length <= size <= max(128, 1.5 * length)
    assert bucket(size) == size


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[]], {}, "prompt"),
        ("", {}, "prompt"),
        ([[1, 320]], {}, "320"),
        ([[1, -1]], {}, "-1"),
        ([[1] * 1000], {"max_new_tokens": 25}, "1024"),
        ([[1] * 100], {"max_new_tokens": 40, "max_length": 128}, "max_length = 128"),
        ([[1]], {"max_length": 4096}, "1024"),
    ],
)
def test_bad_input_is_refused_before_any_work(model, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        qs.generate(model, prompts, qs.GenerateConfig(**options))


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma": 0},
        {"gamma": 128},
        {"gamma": "many"},
        {"draft_cost": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"mode": "fast"},
        {"kv": "full"},
        {"pass_width": 4},
        {"backend": "triton"},
        {"stop": ("",)},
    ],
)
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is .*; allowed: "):
        qs.GenerateConfig(**wrong)


@pytest.mark.parametrize("given", ["a number", "an array", "a key's data"])
def test_what_is_no_key_is_refused(model, given):
    """None is one (`key(0)`); a seed, numbers, and the untyped keys of old are not."""
    data = jax.random.key_data(jax.random.key(0))
    key = {"a number": 0, "an array": np.zeros(1, np.int32), "a key's data": data}[given]
    with pytest.raises(ValueError, match=r"key is .*typed key"):
        qs.generate(model, [[1]], qs.GenerateConfig(**FAST), key)


def test_without_a_key_it_is_the_seed_0s(model):
    config = qs.GenerateConfig(**FAST, temperature=1.0)
    without, other = (
        qs.generate(model, [[1, 2]], config, key).tokens for key in (None, jax.random.key(1))
    )
    assert without == qs.generate(model, [[1, 2]], config, jax.random.key(0)).tokens != other


def test_keys_are_one_or_one_a_sequence(model):
    with pytest.raises(ValueError, match="key shape"):
        qs.generate(model, [[1]], qs.GenerateConfig(**FAST), jax.random.split(jax.random.key(0), 3))


def test_the_named_backend_is_never_replaced(model):
    if jax.default_backend() == "gpu":
        pytest.skip("the backend exists here")
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        qs.generate(model, [[1]], qs.GenerateConfig(**FAST, backend="mosaic_gpu"))


def test_progress_of_the_prompt_is_shown_on_a_terminal(model, capsys, monkeypatch):
    config = qs.GenerateConfig(max_new_tokens=2)
    silent = qs.generate(model, [[1] * 60], config, progress=True).tokens
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert qs.generate(model, [[1] * 60], config, progress=True).tokens == silent
    layers = model.config.num_layers
    shown = capsys.readouterr().err
    assert "prompt" in shown
    assert f"/{layers} " in shown


def test_logits_refuse_ids_outside_the_vocabulary(model):
    with pytest.raises(ValueError, match="tokens"):
        model.logits([[0, 320]])
    assert model.logits([[0, 319]]).shape == (1, 2, 320)


@pytest.mark.parametrize("beside", [-1, 0, 1 << 30])
def test_a_context_that_does_not_fit_is_refused_before_it_is_allocated(model, monkeypatch, beside):
    """The cache does not fit; it does, but nothing beside it; all of it does."""
    draft = qs.DraftConfig(group_size=32)
    fresh = qs.Model(model.config, model.params, model.tokenizer, draft)
    weights, drafted = memory.tree_bytes(model.params), draft_bytes(model.config, draft)
    config = qs.GenerateConfig(max_new_tokens=5, max_length=1024)
    shape = CacheConfig(1024)
    cache = memory.tree_bytes(jax.eval_shape(lambda: create(model.config, shape, 1)))
    limit = weights + drafted + cache + beside

    def memory_stats():
        in_use = weights + (drafted if "draft_params" in vars(fresh) else 0)
        return {"bytes_in_use": in_use, "bytes_limit": limit}

    device = types.SimpleNamespace(device_kind="a device", memory_stats=memory_stats)
    monkeypatch.setattr(memory, "device", lambda: device)
    if beside > 0:
        assert len(qs.generate(fresh, [[1] * 60], config).tokens[0]) == 5
        return
    with pytest.raises(ValueError, match="a context of 1024 tokens") as error:
        qs.generate(fresh, [[1] * 60], config)
    numbers = re.findall(r"(?:needs|has) ([\d,]+) bytes", str(error.value))
    needed, there = (int(number.replace(",", "")) for number in numbers)
    assert there == limit
    if beside < 0:
        assert needed == there + 1
        assert "draft_params" not in vars(fresh)
    else:
        assert f"temporaries {needed - there:,}" in str(error.value)
