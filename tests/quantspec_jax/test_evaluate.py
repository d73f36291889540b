"""Evaluation sees at each position what decoding would: whole texts against real steps."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layout import QuantizedWeight, TiledWeight, can_tile, tile
from quantspec_jax import DraftConfig, Model, ModelConfig, Program, evaluate
from quantspec_jax.cache import create, flush
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.evaluate.pages import pages_at_positions
from quantspec_jax.evaluate.teacher_forced import _block, compare, compare_drafts, score
from quantspec_jax.generate.cache_pass import cache_pass
from quantspec_jax.generate.policies import TopPages, Window
from quantspec_jax.models.attention import Tokens, sequence_attention
from quantspec_jax.models.module import init_params
from quantspec_jax.weights.formats import WeightFormat
from quantspec_jax.weights.rounding import quantize_linear
from quantspec_jax.weights.sizes import bits_per_weight

G = 8
LENGTH = 5 * G + 3  # four flushes, and a block that the text does not fill
VOCABULARY = 97
# Sums in another order, and codes that they flip; a wrong mask or flush is far above (below).
NOISE = 1e-4


@pytest.fixture(scope="module")
def model():
    """Random weights, large enough that attention and the codes matter."""
    config = ModelConfig("llama", VOCABULARY, 32, 64, 2, 4, 2, 16, max_context=64)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    return Model(config, params, draft=DraftConfig(group_size=16))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, VOCABULARY, LENGTH).tolist()


@functools.partial(jax.jit, static_argnames=("program", "read"))
def one_token(params, cache, token, program, read):
    """A pass of one row; logits [N] and the cache, as long as before."""
    logits, cache = cache_pass(params, program, cache, token, cache.length, read)
    return logits[0, 0], cache


@jax.jit
def advance(cache):
    return flush(dataclasses.replace(cache, length=cache.length + 1))


def decode(model, ids, view, group_size=G, draft_params=None):
    """One token at a time: logits of the target [T, N], and of a draft step at each position."""
    config = CacheConfig(len(ids), group_size, view, pass_width=1)
    program = Program(model.config, config, 0)
    cache = jax.jit(lambda: create(model.config, config, 1))()
    target, drafted = [], []
    for token in jnp.asarray(ids, jnp.int32).reshape(-1, 1, 1):
        if draft_params is not None:
            # As in a round: the draft writes its slot, and the target writes it again.
            logits, cache = one_token(draft_params, cache, token, program, program.draft_read)
            drafted.append(logits)
        logits, cache = one_token(model.params, cache, token, program, program.read)
        target.append(logits)
        cache = advance(cache)
    return np.stack(target), np.stack(drafted) if drafted else None


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(logits))


def following(logits, ids):
    """Log-probability of each next token."""
    return log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("view", ["full", "int8", "int4"])
def test_scores_are_those_of_decoding_one_token_at_a_time(model, ids, view):
    logits, _ = decode(model, ids, view)
    scores = score(model, ids, view, group_size=G)
    np.testing.assert_allclose(scores.log_prob[:-1], following(logits, ids), atol=NOISE)
    np.testing.assert_array_equal(scores.top, logits.argmax(-1))


def test_scores_depend_on_where_flushes_are(model, ids):
    """What the test above would see of a position that read too much or too little as planes."""
    scores = score(model, ids, "int4", group_size=G)
    others = following(decode(model, ids, "int4", 2 * G)[0], ids)
    difference = np.abs(scores.log_prob[:-1] - others)
    assert difference[: 2 * G].max() < NOISE  # both read no planes there
    assert np.median(difference[2 * G :]) > 10 * NOISE


def test_full_scores_are_the_models_logits(model, ids):
    logits = model.logits([ids])[0]
    scores = score(model, ids, "full", group_size=G)
    np.testing.assert_allclose(scores.log_prob[:-1], following(logits, ids), atol=NOISE)


@pytest.mark.parametrize("bits", [4, None])
def test_comparison_is_that_of_real_draft_steps(model, ids, bits):
    model = Model(model.config, model.params, draft=DraftConfig(bits=bits, group_size=16))
    target, drafted = decode(model, ids, "int8", draft_params=model.draft_params)
    overlap = np.minimum(np.exp(log_softmax(target)), np.exp(log_softmax(drafted))).sum(-1)
    seen = compare(model, ids, group_size=G)
    np.testing.assert_array_equal(seen.top, target.argmax(-1))
    np.testing.assert_array_equal(seen.draft_top, drafted.argmax(-1))
    np.testing.assert_allclose(seen.overlap, overlap, atol=NOISE)


def test_own_token_joins_the_softmax():
    """softmax over the past's tokens before the own one, and the own one; the first row too."""
    keys = jax.random.split(jax.random.key(1), 5)
    q = jax.random.normal(keys[0], (1, 5, 4, 8))
    own, past = (
        Tokens(*(jax.random.normal(key, (1, 5, 2, 8)) for key in pair))
        for pair in (keys[1:3], keys[3:5])
    )
    out = sequence_attention(q, own, past, sm_scale=0.3, exact=jax.lax.Precision.HIGHEST)

    def scores(keys):
        return np.einsum("bshd,bthd->bhst", q, np.repeat(keys, 2, 2)) * 0.3

    itself = np.eye(5, dtype=bool)[None, None]
    seen = np.where(np.tri(5, k=-1, dtype=bool), scores(past.keys), -np.inf)
    weights = jax.nn.softmax(jnp.where(itself, scores(own.keys), seen), -1)
    wanted = np.einsum(
        "bhst,bthd->bshd", np.where(itself, 0, weights), np.repeat(past.values, 2, 2)
    )
    wanted += np.einsum(
        "bhst,bthd->bshd", np.where(itself, weights, 0), np.repeat(own.values, 2, 2)
    )
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_all_layers_are_one_program(model, ids):
    """Two streams, each compiled once for both layers and never again for another text."""
    compare(model, ids, group_size=G)
    before = _block._cache_size()
    compare(model, ids[::-1], group_size=G)
    assert _block._cache_size() == before
    longer = ModelConfig("llama", VOCABULARY, 32, 64, 5, 4, 2, 16, max_context=64)
    other = Model(longer, init_params(longer, jax.random.key(1)), draft=DraftConfig(group_size=16))
    compare(other, ids, group_size=G)
    assert _block._cache_size() == before + 2


def test_a_draft_as_a_device_holds_it_is_the_same_draft(ids):
    """Tiled weights, 8 bits, channels in another order, a 4-bit lm_head: what evaluation unpacks is
    what the products multiply with."""
    config = ModelConfig("llama", VOCABULARY, 64, 64, 2, 4, 2, 16, max_context=64)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    weights = DraftConfig(bits=8, group_size=32, lm_head_bits=4, lm_head_first=20)
    draft = Model(config, params, draft=weights).draft_params
    block = dict(draft["layers"]["1"])
    order = jnp.asarray(np.random.default_rng(1).permutation(64), jnp.int32)
    moved = params["layers"]["1"]["down"]["kernel"][order]
    block["down"] = quantize_linear(moved, WeightFormat(8, 32)) | {"order": order}
    draft = draft | {"layers": draft["layers"] | {"1": block}}

    def tiled(leaf):
        return tile(leaf) if isinstance(leaf, QuantizedWeight) and can_tile(leaf) else leaf

    arranged = jax.tree.map(tiled, draft, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))
    kinds = jax.tree.leaves(arranged, is_leaf=lambda leaf: isinstance(leaf, TiledWeight))
    assert sum(isinstance(leaf, TiledWeight) for leaf in kinds) == 2 * 7 * 2
    model = Model(config, params)
    _, drafted = decode(model, ids, "int8", draft_params=draft)
    for tree in (draft, arranged):
        (seen,) = compare_drafts(model, [tree], ids, group_size=G)
        np.testing.assert_allclose(seen.draft_log_prob[:-1], following(drafted, ids), atol=NOISE)
        np.testing.assert_array_equal(seen.draft_top, drafted.argmax(-1))


def test_perplexity_counts_from_a_quarter_on(model, ids):
    result = evaluate.perplexity(model, [*ids, 1, 2, 3], context=LENGTH, group_size=G)
    counted = slice(LENGTH // 4, LENGTH - 1)
    assert result["tokens"] == counted.stop - counted.start
    tops = {}
    for view, value in result["perplexity"].items():
        logits, _ = decode(model, ids, view)
        tops[view] = logits.argmax(-1)[counted]
        wanted = math.exp(-following(logits, ids)[counted].mean())
        assert value == pytest.approx(wanted, rel=NOISE)
    same = {view: (tops[view] == tops["full"]).mean() for view in ("int8", "int4")}
    assert result["same_top_token"] == pytest.approx(same)


@pytest.mark.parametrize("first", [None, 0, LENGTH - 1])
def test_acceptance_counts_from_first_on(model, ids, first):
    result = evaluate.acceptance(model, ids, first=first, group_size=G)
    begin = LENGTH // 4 if first is None else first
    seen = compare(model, ids, group_size=G)
    assert result == {
        "greedy_acceptance": pytest.approx((seen.top == seen.draft_top)[begin:].mean()),
        "sampled_acceptance": pytest.approx(seen.overlap[begin:].mean()),
        "positions": LENGTH - begin,
        "draft": model.draft.describe(),
        "draft_policy": "all",
        "draft_share": 1,
        "draft_view": "int4",
        "draft_bits_per_weight": bits_per_weight(model.config, model.draft),
    }


def test_the_target_accepts_itself(model, ids):
    """Full weights before anything is in the planes: the draft is the target."""
    model = Model(model.config, model.params, draft=DraftConfig(bits=None))
    result = evaluate.acceptance(model, ids[: 2 * G], group_size=G)
    assert result["greedy_acceptance"] == 1
    assert result["sampled_acceptance"] == pytest.approx(1, abs=1e-5)


def test_progress_goes_to_standard_error(model, ids, capsys):
    evaluate.acceptance(model, ids, group_size=G, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{LENGTH}/{LENGTH}" in captured.err
    evaluate.acceptance(model, ids, group_size=G)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        ([1] * 20, {"context": 21}, "tokens is '20 tokens'; allowed: 21"),
        ([1] * 70, {}, "context is 70; allowed: 8 to 64"),
        ([1] * 20, {"context": 7}, "context is 7; allowed: 8 to 64"),
        ([1] * 20 + [VOCABULARY], {}, "0 to 96"),
        ([[1] * 20] * 2, {}, "one text"),
        ([], {}, "prompts is"),
        ([1] * 20, {"group_size": 12}, "group_size is 12; allowed: a multiple of 8"),
    ],
)
def test_wrong_arguments_are_named(model, tokens, options, words):
    for measure in (evaluate.perplexity, evaluate.acceptance):
        with pytest.raises(ValueError, match=words):
            measure(model, tokens, **options)


def test_first_beyond_the_text_is_named(model, ids):
    with pytest.raises(ValueError, match=f"first is {LENGTH}; allowed: a position from 0"):
        evaluate.acceptance(model, ids, first=LENGTH)


@pytest.mark.parametrize("chosen", [Window(0.4), TopPages(0.4)], ids=str)
def test_a_position_reads_the_pages_of_the_rows_before_it(chosen):
    """Against a softmax written out, over the view that the target reads."""
    length, first, kv_heads = 9 * G + 3, 2 * G, 2
    q, k = (jax.random.normal(jax.random.key(i), (1, length, n, 16)) for i, n in ((0, 4), (1, 2)))
    target, coded = Tokens(2 * k, k), Tokens(2 * k + 0.1 * k**2, k)
    found = pages_at_positions(
        q, target, coded, policy=chosen, first=first, group_size=G, sm_scale=0.3
    )
    assert found.shape == (1, length, kv_heads, 10)

    def masses(t, h):  # by page
        bound = G * max(0, t // G - 1)
        keys = np.concatenate(
            [coded.keys[0, :bound, h // 2], target.keys[0, bound : t + 1, h // 2]]
        )
        weights = np.exp(0.3 * (keys.astype(np.float64) @ np.asarray(q[0, t, h])))
        return (weights / weights.sum())[:bound].reshape(-1, G).sum(-1)

    for t in (4 * G + 6, 6 * G + 1, 9 * G + 2):
        n = t // G - 1
        count = max(int(np.ceil(0.4 * n)), 2)
        for head in range(kv_heads):
            votes = np.zeros(n)
            for row in range(t - 5, t):
                for h in (2 * head, 2 * head + 1):
                    seen = masses(row, h)
                    votes[: len(seen)] += seen
            best = np.argsort(-votes[1:-1])[: count - 2] + 1
            if isinstance(chosen, Window):
                best = np.arange(n - count + 1, n - 1)
            expected = sorted({0, n - 1, *best.tolist()})
            assert np.flatnonzero(found[0, t, head]).tolist() == expected


def test_a_draft_that_reads_less_agrees_less_and_one_that_reads_all_as_before(model, ids):
    whole = compare(model, ids, group_size=G)
    listed = compare(model, ids, policy=TopPages(1.0), group_size=G)
    np.testing.assert_allclose(listed.overlap, whole.overlap, atol=NOISE)
    least = compare(model, ids, policy=TopPages(1e-6), group_size=G)
    assert least.overlap[4 * G :].mean() < whole.overlap[4 * G :].mean() - NOISE
