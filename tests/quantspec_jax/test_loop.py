"""The speculative loop: lossless, each sequence on its own, nothing copied, compiled once."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from tiny import (
    OPTIMIZED,
    VOCABULARY,
    G,
    _decode,
    decode,
    new_tokens,
    prompts,
    start,
    total,
)

from pallas_kernels.kv_attention.read import Read
from quantspec_jax.cache.codecs import EXACT_TILES
from quantspec_jax.engine.prepare import KINDS
from quantspec_jax.generate import lookup
from quantspec_jax.generate.cache_pass import cache_pass
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.couplings import COUPLINGS, coupling
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.policies import ALL, Policy, TopPages
from quantspec_jax.generate.requests import sampling_arrays
from quantspec_jax.generate.sampling import GREEDY
from quantspec_jax.generate.state import NEVER, SHARES
from quantspec_jax.weights.entries import merge, quantize_params
from quantspec_jax.weights.formats import DraftConfig

LENGTHS = [67, 50, 96]  # all beyond 3 G, none a multiple of it but the last
NEW = 90  # five flushes
# To compile takes time by the layer, and the loop knows of none: two tests have two.
tiny_model = functools.partial(tiny.tiny_model, layers=1)


def program(*args, layers=1, warpers=GREEDY, **options):
    """For greedy tokens, unless asked otherwise: that is a third less to compile."""
    return tiny.program(*args, layers=layers, warpers=warpers, **options)


def run(gamma, width=None, view="int8", new=NEW, draft=None, layers=1, **options):
    p = program(gamma, view, width, layers=layers)
    rows = prompts(LENGTHS)
    return decode(p, start(p, rows, LENGTHS, new, **options), draft=draft)


@pytest.mark.parametrize(("gamma", "layers"), [(1, 1), (3, 1), (4, 2), (8, 1)])
def test_greedy_tokens_are_those_of_autoregressive_decoding(gamma, layers):
    speculative = run(gamma, layers=layers)
    alone = run(0, width=gamma + 1, layers=layers)
    assert new_tokens(speculative) == new_tokens(alone)
    accepted, proposed = total(speculative.accepted), total(speculative.proposed)
    assert (accepted < proposed).all(), "a draft that is never wrong tests nothing"
    assert (accepted > 0).all()
    assert (np.asarray(speculative.rounds) < np.asarray(alone.rounds)).all()


def test_a_program_for_argmax_or_for_draws_makes_the_tokens_that_branches_make():
    """Greedy ones, penalties included; the one for argmax does not look at penalties."""

    def made(warpers, penalty):
        p = program(4, warpers=warpers)
        sampling = sampling_arrays(GenerateConfig(repetition_penalty=penalty), len(LENGTHS))
        state = start(p, prompts(LENGTHS), LENGTHS, 40, sampling=sampling)
        return new_tokens(decode(p, state))

    plain, penalized = made(None, 1.0), made(None, 1.3)
    assert plain != penalized
    for kind in KINDS:
        assert made(kind, 1.0) == plain
    for kind in KINDS[1:]:
        assert made(kind, 1.3) == penalized
    # The prefill has made the first token, with its penalty.
    assert made(GREEDY, 1.3) != penalized


def test_proposals_are_counted_by_their_place():
    """Each place's proposals are those of rounds that reach it; what is accepted has no gap."""
    state = run(4)
    proposed, accepted = np.asarray(state.proposed), np.asarray(state.accepted)
    rounds = np.asarray(state.rounds)
    assert (proposed[:, 4:] == 0).all()
    assert (accepted <= proposed).all()
    assert (np.diff(proposed[:, :4], axis=1) <= 0).all()
    assert (np.diff(accepted[:, :4], axis=1) <= 0).all()
    assert (proposed[:, 0] <= rounds).all()
    # Without the limit's cut, tokens are one a round and the accepted proposals.
    made = np.asarray(state.cache.length) - np.array(LENGTHS)
    np.testing.assert_array_equal(made, rounds + total(accepted))


def test_a_programs_other_gamma_goes_on_from_the_same_state():
    """As adaptive decoding does between chunks of rounds."""
    alone = new_tokens(run(0, width=5))
    state = start(program(4), prompts(LENGTHS), LENGTHS, NEW)
    for gamma in (4, 0, 1, 8, 0, 3):
        state = decode(program(gamma), state, max_rounds=5)
    assert new_tokens(decode(program(1), state)) == alone


def test_only_proposals_inside_the_half_of_the_buffer_count():
    gamma = 8
    p = program(gamma)
    state = start(p, prompts(LENGTHS), LENGTHS, 250)
    for _ in range(20):
        before = state
        state = decode(p, state, max_rounds=1)
        n = np.asarray(before.cache.length)
        counted = total(state.proposed) - total(before.proposed)
        assert (counted == np.minimum(gamma, G - 1 - n % G)).all()
        crossed = np.asarray(state.cache.length) // G - n // G
        assert (crossed <= 1).all()


@pytest.mark.parametrize("gamma", [0, 4])
def test_a_sequence_decodes_in_a_batch_as_it_does_alone(gamma):
    rows = prompts(LENGTHS)
    together = new_tokens(run(gamma))
    for i, length in enumerate(LENGTHS):
        p = program(gamma)
        alone = decode(p, start(p, rows[i : i + 1], [length], NEW))
        assert new_tokens(alone)[0] == together[i]


def test_sampled_draws_depend_on_a_sequences_own_key_alone():
    config = GenerateConfig(temperature=0.9, top_p=0.95)
    keys = jax.random.split(jax.random.key(3), 3)
    rows = prompts(LENGTHS)
    p = program(4, warpers=None)
    state = start(p, rows, LENGTHS, NEW, sampling_arrays(config, 3), keys)
    together = new_tokens(decode(p, state))
    for i, length in enumerate(LENGTHS):
        one = sampling_arrays(config, 1)
        state = start(p, rows[i : i + 1], [length], NEW, one, keys[i : i + 1])
        assert new_tokens(decode(p, state))[0] == together[i]


def test_chunks_of_rounds_give_what_one_call_gives():
    p = program(4)
    whole = decode(p, start(p, prompts(LENGTHS), LENGTHS, NEW))
    state = start(p, prompts(LENGTHS), LENGTHS, NEW)
    for _ in range(200):
        state = decode(p, state, max_rounds=7)
    assert new_tokens(state) == new_tokens(whole)
    for name in ("rounds", "proposed", "accepted"):
        np.testing.assert_array_equal(getattr(state, name), getattr(whole, name))


def test_a_call_ends_early_where_the_accepted_share_says_so():
    """After the rounds of a `Look`, if the share lies outside its bounds; later it does not look.
    Counts of earlier calls do not matter."""
    p = program(4)
    begun = decode(p, start(p, prompts(LENGTHS), LENGTHS, 250), max_rounds=3)
    six = decode(p, begun, max_rounds=6)
    proposed, accepted = (
        int((total(getattr(six, x)) - total(getattr(begun, x))).sum())
        for x in ("proposed", "accepted")
    )
    share = SHARES * accepted // proposed
    assert 0 < share < SHARES

    def rounds(*look: int) -> int:
        state = decode(p, begun, max_rounds=(9, *look))
        return int((state.rounds - begun.rounds).max())

    assert rounds(*NEVER) == 9
    assert rounds(6, share, share + 1) == 9
    assert rounds(6, share + 1, SHARES) == 6
    assert rounds(6, 0, share - 1) == 6
    assert rounds(20, SHARES + 1, 0) == 9
    early = decode(p, begun, max_rounds=(9, 6, share + 1, SHARES))
    for name in ("tokens", "count", "rounds", "statistics"):
        np.testing.assert_array_equal(getattr(early, name), getattr(six, name))
    # And where rounds copy, too.
    copying = program(4, lookup=3)
    state = start(copying, prompts(LENGTHS), LENGTHS, 250)
    early = decode(copying, state, max_rounds=(9, 6, SHARES + 1, 0))
    assert int(early.rounds.max()) == 6


def test_a_sequence_stops_at_its_eos_and_the_others_go_on():
    free = new_tokens(run(4))
    eos = free[0][20]
    stopped = run(4, eos=(VOCABULARY + 5, eos))
    for with_eos, without in zip(new_tokens(stopped), free, strict=True):
        end = without.index(eos) + 1 if eos in without else NEW
        assert with_eos == without[:end]
    assert np.asarray(stopped.finished).all()


def damaged_for(rows, tokens: list[list[int]], params):
    """Parameters that make NaN of a token that one sequence alone produces, which, and when."""
    own = [set(row[1:]) for row in tokens]
    for i, row in enumerate(tokens):
        others = set.union({row[0], *rows.reshape(-1).tolist()}, *own[:i], *own[i + 1 :])
        for at, token in enumerate(row):
            if token not in others:
                return params | {"embedding": params["embedding"].at[token].set(jnp.nan)}, i, at
    raise AssertionError("no such token")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("gamma", [0, 3])
def test_logits_that_are_not_finite_end_their_sequence_alone(gamma, temperature):
    """In the middle of a text; of the others not a token changes."""
    _, params, draft = tiny.tiny_model(layers=2)
    sampling = sampling_arrays(GenerateConfig(temperature=temperature), 3)
    p = program(gamma, layers=2, warpers=None)
    rows = prompts(LENGTHS) % 60
    whole = decode(p, start(p, rows, LENGTHS, 30, sampling))
    assert not np.asarray(whole.broken).any()
    expected = new_tokens(whole)
    bad, i, at = damaged_for(rows, expected, params)
    own = draft | {"embedding": bad["embedding"]}
    state = decode(p, start(p, rows, LENGTHS, 30, sampling, params=bad), params=bad, draft=own)
    assert np.flatnonzero(state.broken).tolist() == [i]
    assert np.asarray(state.finished).all()
    found = new_tokens(state)
    cut = len(found[i])
    assert at + 1 - gamma <= cut <= at + 1
    assert found == [row[:cut] if j == i else row for j, row in enumerate(expected)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_prompt_after_which_logits_are_not_finite_gives_no_token(value):
    _, params, _ = tiny_model()
    rows = prompts(LENGTHS)
    last = rows[1, LENGTHS[1] - 1]
    bad = params | {"embedding": params["embedding"].at[last, 3].set(value)}
    state = start(program(0), rows, LENGTHS, NEW, params=bad)
    which = [last in row[:length] for row, length in zip(rows, LENGTHS, strict=True)]
    assert np.asarray(state.broken).tolist() == which
    assert np.asarray(state.finished).tolist() == which
    assert np.asarray(state.count).tolist() == [0 if broken else 1 for broken in which]


def test_max_new_tokens_is_exact():
    for new in (1, 2, 7):
        assert [len(t) for t in new_tokens(run(4, new=new))] == [new] * 3


def test_padding_of_prompts_changes_nothing():
    p = program(4)
    rows = prompts(LENGTHS)
    padded = np.concatenate([rows, prompts([64, 64, 64], seed=5)[:, :64]], 1)
    other = rows.copy()
    for i, length in enumerate(LENGTHS):
        other[i, length:] = 1
    tokens = [new_tokens(decode(p, start(p, x, LENGTHS, NEW))) for x in (rows, padded, other)]
    assert tokens[0] == tokens[1] == tokens[2]


def test_the_lower_plane_is_the_targets_alone():
    """Random codes in the lower plane leave every draft logit as it is, bit for bit, and change the
    target's: the draft reads the upper plane, the target both. Of the first tile the draft reads
    both, unless it is told to read none so."""
    p = program(4)
    state = start(p, prompts(LENGTHS), LENGTHS, NEW)
    state = decode(p, state, max_rounds=6)
    assert (np.asarray(state.cache.quantized_length) >= 2 * G).all()

    def scramble(planes, tiles):
        bits = jax.random.bits(jax.random.key(1), planes.lower.shape, jnp.uint8)
        return planes._replace(lower=planes.lower.at[:, :, tiles].set(bits[:, :, tiles]))

    def scrambled(tiles):
        return tuple(
            dataclasses.replace(x, keys=scramble(x.keys, tiles), values=scramble(x.values, tiles))
            for x in state.cache.layers
        )

    _, params, draft_params = tiny_model()

    @functools.partial(jax.jit, static_argnames="read")
    def run_pass(weights, layers, read):
        cache = dataclasses.replace(state.cache, layers=layers)
        tokens, at = state.pending[:, None], state.cache.length
        return cache_pass(weights, p, cache, tokens, at, read)[0]

    def difference(tiles, read, weights):
        before, after = (run_pass(weights, x, read) for x in (state.cache.layers, scrambled(tiles)))
        return np.abs(before - after).max(-1)

    later, whole = slice(EXACT_TILES, None), slice(None)
    np.testing.assert_array_equal(difference(later, p.draft_read, draft_params), 0)
    np.testing.assert_array_equal(difference(whole, Read("int4"), draft_params), 0)
    assert (difference(slice(EXACT_TILES), p.draft_read, draft_params) > 1e-3).all()
    assert (difference(later, p.read, params) > 1e-3).all()


def test_planes_never_change_once_written():
    p = program(4)
    state = start(p, prompts(LENGTHS), LENGTHS, NEW)
    rejected = False
    for _ in range(25):
        before, state = state, decode(p, state, max_rounds=1)
        rejected |= bool(
            np.any(
                total(state.accepted - before.accepted) < total(state.proposed - before.proposed)
            )
        )
        for old, new in zip(before.cache.layers, state.cache.layers, strict=True):
            for i, quantized in enumerate(np.asarray(before.cache.quantized_length)):
                for a, b in zip((*old.keys, *old.values), (*new.keys, *new.values), strict=True):
                    tiles = quantized // G
                    np.testing.assert_array_equal(a[i, :, :tiles], b[i, :, :tiles])
    assert rejected


def held(cache, length):
    """What of a cache means something where every sequence has `length` tokens: codes, scales and
    minima of their tiles, and the slots of those in full precision."""
    quantized = G * (length // G - 1)
    slots = np.arange(quantized, length) % (2 * G)
    planes = [x[:, :, : quantized // G] for y in cache for x in (*y.keys, *y.values)]
    return planes, [x[:, :, slots] for y in cache for x in (y.key_buffer, y.value_buffer)]


def test_what_is_exact_depends_on_the_position_alone():
    """However the rounds went, the cache at a given length is the same: planes and scales bit for
    bit, the buffer up to float32's rounding, for a token may be another row of its pass."""
    length = 8 * G + 3  # a round that begins below it and ends beyond it crosses no flush
    limits = np.array([length + 1 - n for n in LENGTHS])
    found, rounds = [], []
    for gamma in (0, 2, 4):
        p = program(gamma, width=5)
        state = decode(p, start(p, prompts(LENGTHS), LENGTHS, limits))
        beyond = np.asarray(state.cache.length) - length
        assert ((beyond >= 0) & (beyond <= gamma)).all()
        np.testing.assert_array_equal(state.cache.quantized_length, 7 * G)
        found.append(held(state.cache.layers, length))
        rounds.append(tuple(state.rounds.tolist()))
    assert len(set(rounds)) == 3, "rounds that fall alike test nothing"
    for planes, buffers in found[1:]:
        for ours, theirs in zip(planes, found[0][0], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for ours, theirs in zip(buffers, found[0][1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@functools.cache
def hlo_of_the_loop(
    gamma: int, view: str, batch: int, policy: Policy = ALL, copies: int = 0
) -> tuple[str, int, dict]:
    """The compiled loop's text, its temporary bytes, and the shapes of the cache's arrays."""
    p = program(gamma, view, max_length=2048, policy=policy, lookup=copies)
    _, params, draft_params = tiny_model()
    lengths = [64] * batch
    state = jax.eval_shape(lambda: start(p, prompts(lengths), lengths, NEW))
    step = jax.jit(generate_tokens, static_argnames="program", donate_argnames="state")
    compiled = step.lower(
        params,
        draft_params if gamma else {},
        state,
        jnp.zeros(4, jnp.int32) if gamma else jnp.int32(5),  # as where γ adapts
        program=p,
    ).compile()
    return compiled.as_text(), compiled.memory_analysis(), state


@pytest.mark.parametrize(
    ("gamma", "view", "batch", "policy", "copies"),
    [
        (4, "int8", 1, ALL, 0),
        (4, "int8", 3, TopPages(0.25), 0),
        (4, "int8", 1, TopPages(0.25, every=4), 7),
        (0, "full", 2, ALL, 0),
    ],
)
def test_the_compiled_loop_copies_no_plane_and_no_buffer(gamma, view, batch, policy, copies):
    text, memory, state = hlo_of_the_loop(gamma, view, batch, policy, copies)
    names = {"uint8": "u8", "float32": "f32", "bfloat16": "bf16"}
    layer = state.cache.layers[0]
    big = [layer.key_buffer]
    if layer.keys is not None:
        big += [layer.keys.upper, layer.values.upper]
    shapes = {f"{names[str(x.dtype)]}[{','.join(map(str, x.shape))}]" for x in big}
    copied = {
        shape for shape in re.findall(r"= (\w+\[[\d,]+\])\S* copy\(", text) if shape in shapes
    }
    assert not copied
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache.layers))
    assert memory.alias_size_in_bytes >= cache_bytes, "the cache is updated where it lies"


def test_the_draft_unpacks_no_more_than_a_group_at_a_time():
    """XLA moves what is constant out of a loop: unpacked weights would be carried through it."""
    text, _, _ = hlo_of_the_loop(4, "int8", 1)
    _, _, draft_params = tiny_model()
    for name in ("q", "gate", "down"):
        groups, half, n = draft_params["layers"]["0"][name]["kernel"].packed.shape
        assert f"u8[{groups},{half},{n}]" in text
        assert f"f32[{groups},{2 * half},{n}]" not in text
        assert f"s8[{groups},{2 * half},{n}]" not in text


def test_nothing_is_compiled_for_other_values():
    """Other prompts of a bucket, other keys, temperatures, limits and EOS ids: the same program."""
    p = program(4, warpers=None)
    known, sizes = _decode._cache_size(), []
    for i, (temperature, top_p) in enumerate([(0.0, 1.0), (0.7, 0.9), (1.3, 0.5)]):
        sampling = sampling_arrays(GenerateConfig(temperature=temperature, top_p=top_p), 3)
        lengths = [70 + i, 50 - i, 81]
        state = start(p, prompts(lengths, i), lengths, 5 + i, sampling, eos=[i, VOCABULARY + 5])
        decode(p, state, max_rounds=i)
        sizes.append(_decode._cache_size())
    assert len(set(sizes)) == 1
    assert sizes[0] - known <= 1  # a test before this one may have had it


def test_what_xla_does_for_a_layer_is_in_the_program_once_however_many_there_are():
    """As kernels are: nothing is traced and written again for each layer."""

    def functions(layers: int) -> Counter[str]:
        p = program(4, layers=layers)
        state = jax.eval_shape(lambda: start(p, prompts(LENGTHS), LENGTHS, NEW))
        _, params, own = tiny.tiny_model(layers=layers)
        text = _decode.trace(params, own, state, jnp.int32(9), program=p).lower().as_text()
        return Counter(re.findall(r"func\.func private @(\w+?)(?:_\d+)?\(", text))

    one, three = functions(1), functions(3)
    assert one["kv_attention"] == one["_finished"] == 2  # the draft's and the verification's
    for name in ("kv_attention", "_finished", "int4_matmul", "add_rms_norm", "quantize_keys"):
        assert 0 < one[name] == three[name]


def test_generate_tokens_can_be_called_inside_another_jit():
    p = program(4)
    _, params, draft_params = tiny_model()

    @jax.jit
    def mine(state):
        state = generate_tokens(params, draft_params, state, program=p)
        return state.tokens, state.count

    tokens, count = mine(start(p, prompts(LENGTHS), LENGTHS, NEW))
    assert [t[:c].tolist() for t, c in zip(tokens, count, strict=True)] == new_tokens(run(4))


def test_a_draft_with_the_full_weights_is_rejected_only_for_its_cache():
    _, params, _ = tiny_model()
    full = run(4, draft=params)
    assert new_tokens(full) == new_tokens(run(0, width=5))
    assert (total(full.accepted) > total(run(4).accepted)).all()


@pytest.mark.parametrize(
    ("gamma", "name", "policy", "copies"),
    [
        (2, "rejection", TopPages(1e-6), 2),
        (2, "block", ALL, 2),
        *((4, name, ALL, 0) for name in COUPLINGS),
    ],
)
def test_a_round_of_sampling_follows_the_target(gamma, name, policy, copies, monkeypatch):
    """Joint distribution of three new positions over many keys, against ancestral sampling from the
    target's own logits at temperature 0.8 with top-k 4: chi-square. Whatever the draft reads, and
    where some rounds copy."""
    monkeypatch.setattr(lookup, "LEAST", 2)
    config, params, _ = tiny.tiny_model()
    vocabulary, draws = 6, 20_000
    small = dataclasses.replace(config, vocab_size=vocabulary, num_layers=1)
    cut = {**params, "layers": {"0": params["layers"]["0"]}}
    cut["embedding"] = params["embedding"][:vocabulary]
    cut["lm_head"] = {"kernel": params["lm_head"]["kernel"][:, :vocabulary]}
    noise = iter(jax.random.split(jax.random.key(5), 100))
    noisy = jax.tree.map(
        lambda x: x + 0.3 * x.std() * jax.random.normal(next(noise), x.shape) if x.ndim > 1 else x,
        cut,
    )
    draft = merge(cut, quantize_params(noisy, DraftConfig(group_size=32)))
    # Every draw has a cache.
    p = program(gamma, max_length=128, coupling=coupling(name), policy=policy, warpers=None)
    p = dataclasses.replace(p, model=small, lookup=copies)
    generate = GenerateConfig(temperature=0.8, top_k=4)
    length = 3 * G + 5
    rows = np.random.default_rng(2).integers(0, vocabulary, (1, 4 * G)).astype(np.int32)
    one = sampling_arrays(generate, 1)
    state = start(p, rows, [length], 200, one, params=cut)

    def draw(key):
        # The pending token stays what it is: only the round's own draws differ.
        wants = dataclasses.replace(state.requests, keys=key[None])

        begun = dataclasses.replace(state, requests=wants)
        third = generate_tokens(cut, draft, begun, 3, program=p)
        counts = (third.accepted.sum(), third.proposed.sum(), third.copied[0])
        return third.tokens[0, 1:4], *counts

    keys = jax.random.split(jax.random.key(12), draws)
    draw_all = jax.jit(lambda k: jax.lax.map(draw, k, batch_size=500), compiler_options=OPTIMIZED)
    tokens, accepted, proposed, copied = draw_all(keys)
    rate = accepted.sum() / proposed.sum()
    assert 0.3 < rate < 0.8
    rounds, tried, kept = np.asarray(copied).sum(0) / draws
    if copies:
        assert 0.3 < rounds < 2.7
        assert 0.05 < kept / tried < 0.95

    def target_logits(state, fed):
        fed = jnp.asarray(fed, jnp.int32)[None]
        return cache_pass(cut, p, state.cache, fed, state.cache.length, p.read)[0][0]

    pending = int(state.pending[0])
    counts = np.zeros((vocabulary,) * 3)
    np.add.at(counts, tuple(np.asarray(tokens).T), 1)
    expected = np.zeros_like(counts)
    step = jax.jit(target_logits)

    def warped(logits):
        logits = np.asarray(logits, np.float64) / 0.8
        kept = logits >= np.sort(logits)[-4]
        weights = np.where(kept, np.exp(logits - logits.max()), 0)
        return weights / weights.sum()

    for a in range(vocabulary):
        for b in range(vocabulary):
            rows_ = step(state, [pending, a, b])
            pa, pb, pc = warped(rows_[0]), warped(rows_[1]), warped(rows_[2])
            expected[a, b] = draws * pa[a] * pb[b] * pc
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum())
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 0.01


def test_quantize_params_leaves_embedding_and_lm_head_alone():
    config, params, _ = tiny.tiny_model()
    own = quantize_params(params, DraftConfig(group_size=32, layers="mlp"))
    assert set(own) == {"layers"}
    assert set(own["layers"]["0"]) == {"gate", "up", "down"}
    tree = merge(params, own)
    assert tree["embedding"] is params["embedding"]
    assert tree["layers"]["1"]["q"]["kernel"] is params["layers"]["1"]["q"]["kernel"]
    assert config.num_layers == len(own["layers"])
