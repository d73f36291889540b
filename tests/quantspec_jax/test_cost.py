"""The cost model against counts by hand, the arrays themselves, and simulated rounds."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from quantspec_jax.cache import cache_bytes, create
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.cost import (
    ALL_PAGES,
    LAYER_BYTES,
    MOST_GAMMA,
    READINGS,
    WORTH,
    Costs,
    Reading,
    best_reading,
    bytes_read,
    cache_read_bytes,
    draft_weight_bytes,
    expected_tokens,
    linear_weights,
    operations,
    target_weight_bytes,
    tokens_a_round,
    weight_bytes,
)
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.module import init_params
from quantspec_jax.models.parameters import parameter_count
from quantspec_jax.models.presets import PRESETS
from quantspec_jax.weights.entries import merge, quantize_params, with_first
from quantspec_jax.weights.formats import DraftConfig, WeightFormat
from quantspec_jax.weights.sizes import bits_per_weight

TINY = ModelConfig("llama", 300, 64, 128, 2, 4, 2, 32, 4096)
TIED = ModelConfig("qwen3", 300, 64, 120, 2, 4, 2, 32, 4096, tie_embeddings=True, qk_norm=True)
DRAFTS = (
    DraftConfig(group_size=32),
    DraftConfig(bits=8, group_size=32, symmetric=True),
    DraftConfig(group_size=48, layers="mlp"),
    DraftConfig(group_size=32, formats=(("layers.1.q", WeightFormat(8, 16)),)),
    DraftConfig(bits=None),
    DraftConfig(group_size=32, lm_head_bits=4),
    DraftConfig(group_size=32, lm_head_bits=4, lm_head_first=100),
    DraftConfig(group_size=32, lm_head_bits=4, lm_head_first=1000),  # more than there are
)


@pytest.mark.parametrize("model", [TINY, TIED])
def test_weight_bytes_are_those_of_the_arrays(model):
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), "bfloat16"))
    read = [params["layers"], params["final_norm"]]
    read.append(params["embedding"] if model.tie_embeddings else params["lm_head"])
    by_hand = sum(2 * x.size for x in jax.tree.leaves(read))
    assert weight_bytes(params) == target_weight_bytes(model) == by_hand
    for draft in DRAFTS:

        def made(params, draft=draft):
            return with_first(params, quantize_params(params, draft), draft)

        own = jax.eval_shape(made, params)
        assert weight_bytes(merge(params, own)) == draft_weight_bytes(model, draft)


def test_weights_counted_by_hand():
    block = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 128  # q, k and v, o, MLP
    assert linear_weights(TINY) == 2 * block
    norms = 5 * 64
    assert target_weight_bytes(TINY) == 2 * (2 * block + norms + 64 * 300)
    # 4 bits and two bf16 numbers a group of 32: 5 bits
    assert bits_per_weight(TINY, DRAFTS[0]) == 5
    assert draft_weight_bytes(TINY, DRAFTS[0]) == 2 * block * 5 // 8 + 2 * (norms + 64 * 300)


@pytest.mark.parametrize(("view", "planes"), [("int8", 2), ("int4", 1)])
@pytest.mark.parametrize("head_dim", [32, 192])
def test_a_long_context_reads_the_planes_and_three_quarters_of_the_buffer(view, planes, head_dim):
    model = ModelConfig("llama", 300, 64, 128, 2, 4, 2, head_dim, 4096)
    group = 64
    context = 16 * group
    allocate = functools.partial(create, model, CacheConfig(context, group, dtype="bfloat16"), 1)
    sizes = cache_bytes(jax.eval_shape(allocate), context)
    lengths = 2 * 4
    buffer = sizes["buffer"] - lengths
    in_planes = (context - 1.5 * group) / context
    by_arrays = in_planes * (planes * sizes["upper"] + sizes["scales"]) + 0.75 * buffer
    assert cache_read_bytes(model, view, context, 2, group) == pytest.approx(by_arrays)


def test_a_short_context_is_in_full_precision():
    a_token = 2 * 2 * 2 * 32 * 2
    for view in ("full", "int8", "int4"):
        assert cache_read_bytes(TINY, view, 100) == 100 * a_token
    assert cache_read_bytes(TINY, "full", 4096) == 4096 * a_token


def test_passes_read_weights_once_and_the_cache_of_every_sequence():
    draft = DRAFTS[0]
    one, four = (bytes_read(TINY, draft, 1024, batch=batch) for batch in (1, 4))
    assert four.plain - one.plain == 3 * cache_read_bytes(TINY, "full", 1024)
    assert four.draft - one.draft == 3 * cache_read_bytes(TINY, "int4", 1024)
    assert four.verify - one.verify == 3 * cache_read_bytes(TINY, "int8", 1024)
    assert one.plain - cache_read_bytes(TINY, "full", 1024) == target_weight_bytes(TINY)
    assert one.draft - cache_read_bytes(TINY, "int4", 1024) == draft_weight_bytes(TINY, draft)


def test_of_a_share_the_buffer_is_read_whole():
    draft = DRAFTS[0]
    whole, half, none = (
        bytes_read(TINY, draft, 1024, share=share).draft for share in (1, 0.5, 1e-9)
    )
    assert half == pytest.approx((whole + none) / 2, abs=1)
    buffer = 1.5 * 128 * 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 2
    assert none - draft_weight_bytes(TINY, draft) == pytest.approx(buffer, abs=1)
    assert bytes_read(TINY, draft, 1024, view="int8").draft > whole


def test_less_is_read_where_it_pays_and_short_contexts_whole():
    """What is chosen promises most of all, and something over all pages: less acceptance is not
    forgiven where the cache is a small part of what a draft reads, or launches take its time."""
    model, draft, alpha = PRESETS["llama-2-7b"], DraftConfig(), 0.93
    shares = []
    for context in (512, 2048, 8192, 32768, 131072):
        chosen = best_reading(model, draft, context, alpha)

        def promised(reading, context=context):
            costs = bytes_read(model, draft, context, share=reading.share)
            costs = Costs(*(x + LAYER_BYTES * model.num_layers for x in dataclasses.astuple(costs)))
            expected = alpha * reading.kept
            return costs.speed_up(expected, costs.best_gamma(expected))

        best = max(map(promised, READINGS))
        if best < WORTH * promised(ALL_PAGES):
            assert chosen == ALL_PAGES
        else:
            assert promised(chosen) == best
        shares.append(chosen.share)
    assert shares[0] == 1
    assert shares[-1] < 1
    assert shares == sorted(shares, reverse=True)
    worthless = [ALL_PAGES, Reading("top-pages", 0.25, 0.3)]
    assert best_reading(model, draft, 131072, alpha, readings=worthless) == ALL_PAGES
    assert best_reading(PRESETS["smollm2-135m"], draft, 8192, alpha) == ALL_PAGES


def test_llama_2_7b_at_131072_tokens():
    """Floors in milliseconds at 4,390 GB/s, counted elsewhere."""
    costs = bytes_read(PRESETS["llama-2-7b"], DraftConfig(group_size=128, symmetric=True), 131072)
    milliseconds = [x / 4390e6 for x in (costs.plain, costs.draft, costs.verify)]
    assert milliseconds == pytest.approx([18.7, 5.0, 11.1], rel=0.01)


def test_operations_by_hand():
    products = target_weight_bytes(TINY) // 2
    assert operations(TINY, 0, rows=3, batch=2) == 6 * 2 * products
    scores_and_values = 2 * (2 * 4 * 32) * 1000  # layers, heads, channels, tokens
    assert operations(TINY, 1000, rows=1) == 2 * products + 2 * scores_and_values


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.93, 1.0])
@pytest.mark.parametrize("gamma", [0, 1, 4])
def test_expected_tokens_is_the_closed_form(acceptance, gamma):
    closed = (1 - acceptance ** (gamma + 1)) / (1 - acceptance) if acceptance < 1 else gamma + 1
    assert expected_tokens(acceptance, gamma) == pytest.approx(closed)
    # Far from flushes nothing else matters.
    assert tokens_a_round(acceptance, gamma, 8192) == pytest.approx(closed, rel=2e-3)
    assert tokens_a_round(acceptance, gamma, 128) <= closed + 1e-9


@pytest.mark.parametrize(("acceptance", "gamma", "group"), [(0.8, 4, 16), (0.95, 7, 32), (1, 4, 8)])
def test_tokens_a_round_is_what_simulated_rounds_yield(acceptance, gamma, group):
    rng = np.random.default_rng(0)
    position = rounds = 0
    while position < 60_000:
        proposed = min(gamma, group - 1 - position % group)
        accepts = rng.random(proposed) < acceptance
        position += 1 + int(np.cumprod(accepts).sum())
        rounds += 1
    assert tokens_a_round(acceptance, gamma, group) == pytest.approx(position / rounds, rel=0.01)


@pytest.mark.parametrize("acceptance", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("draft", [0.05, 0.3, 0.9])
def test_best_gamma_is_that_of_trying_all(acceptance, draft):
    costs = Costs(plain=1.6, draft=draft, verify=1.0)
    seconds_a_token = [
        (gamma * draft + 1) / tokens_a_round(acceptance, gamma)
        for gamma in range(1, MOST_GAMMA + 1)
    ]
    best = costs.best_gamma(acceptance)
    assert best == 1 + int(np.argmin(seconds_a_token))
    assert costs.speed_up(acceptance, best) == pytest.approx(1.6 / min(seconds_a_token))
    assert costs.best_gamma(acceptance, most=2) <= 2


def test_better_drafts_are_given_more_tokens():
    costs = Costs(plain=1.6, draft=0.3, verify=1.0)
    gammas = [costs.best_gamma(a) for a in (0.2, 0.6, 0.8, 0.9, 0.97)]
    assert gammas == sorted(gammas)
    assert gammas[0] < gammas[-1]


def test_wrong_acceptance_is_named():
    with pytest.raises(ValueError, match="acceptance is 2; allowed: 0 to 1"):
        tokens_a_round(2, 4)


@pytest.fixture(scope="module")
def rounds_script():
    path = Path(__file__).parents[2] / "benchmarks" / "draft_acceptance.py"
    spec = importlib.util.spec_from_file_location("draft_acceptance", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("gamma", [1, 4])
def test_rounds_followed_over_a_text_are_those_of_decoding(rounds_script, gamma):
    """Where every position is accepted or not, rounds are certain: count them one by one."""
    group, first = 16, 5
    chance = (np.random.default_rng(0).random(400) < 0.8).astype(float)
    expected = rounds_script.Rounds(gamma)
    rounds_script.follow(chance, first, expected, group)
    proposed, accepted = np.zeros(gamma), np.zeros(gamma)
    position = first
    while position < len(chance) - gamma:
        tried = chance[position : position + min(gamma, group - 1 - position % group)]
        run = np.cumprod(tried)
        proposed[: len(tried)] += 1
        accepted[: len(tried)] += run
        position += 1 + int(run.sum())
    np.testing.assert_allclose(expected.proposed, proposed)
    np.testing.assert_allclose(expected.accepted, accepted)


def test_a_constant_chance_gives_its_powers(rounds_script):
    rounds = rounds_script.Rounds(4)
    rounds_script.follow(np.full(3000, 0.8), 0, rounds, 1024)
    np.testing.assert_allclose(rounds.by_position, 0.8 ** np.arange(1, 5))
    # The share that counts what follows a rejection as rejected, and tokens a round.
    assert rounds.rate == pytest.approx((expected_tokens(0.8, 4) - 1) / 4, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, count):
    assert parameter_count(PRESETS[name]) == count
