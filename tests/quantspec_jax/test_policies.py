"""Draft policies: a draft may read as little as it likes, the text is the target's."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import G, decode, new_tokens, program, prompts, start, tiny_model, total

import quantspec_jax as qs
from pallas_kernels.kv_attention.read import Pages
from quantspec_jax.cache import rollback
from quantspec_jax.commands import serve
from quantspec_jax.cost import best_reading
from quantspec_jax.engine.adaptive import PRIOR
from quantspec_jax.engine.prepare import draft_policy
from quantspec_jax.generate.cache_pass import cache_pass, observed_pass
from quantspec_jax.generate.loop import pages_to_read, read_round
from quantspec_jax.generate.policies import (
    ALL,
    Policy,
    Sizes,
    SnapKV,
    TopPages,
    Window,
    policy,
    prompt,
)
from quantspec_jax.generate.policies.policy import budget, most_pages
from quantspec_jax.generate.policies.prompt import by_page, last_queries_mass
from quantspec_jax.generate.sampling import GREEDY
from quantspec_jax.models.presets import PRESETS

LENGTHS = [67, 50, 130]  # 3, 2 and 7 pages coded
NEW = 60
CHOOSING = (Window, SnapKV, TopPages)
SELDOM, ONCE = TopPages(0.5, every=2), TopPages(1.0, every=1000)


@dataclasses.dataclass(frozen=True)
class Nothing(Policy):
    """The buffer alone."""

    name = "nothing"

    def pages(self, memory, coded, sizes, backend="auto"):
        tiles = jnp.zeros((len(coded), sizes.kv_heads, 1), jnp.int32)
        return (Pages(tiles, jnp.zeros_like(coded)),) * sizes.layers


def cut(layers):
    """The tiny model's (config, params, draft params) with its first layers alone: what is compiled
    here is compiled for every policy."""
    config, *trees = tiny_model()
    first = [{**tree, "layers": {str(i): tree["layers"][str(i)] for i in range(layers)}}
             for tree in trees]  # fmt: skip
    return dataclasses.replace(config, num_layers=layers), *first


def layers_of(chosen):
    """Both where pages are looked at layer by layer."""
    return 2 if chosen == TopPages(0.5) else 1


@functools.cache
def begun(chosen, layers=None, gamma=3):
    """(program, state after the prompts)."""
    config, params, _ = cut(layers or layers_of(chosen))
    p = program(gamma, width=4, policy=chosen, warpers=GREEDY)
    p = dataclasses.replace(p, model=config)
    return p, start(p, prompts(LENGTHS), LENGTHS, NEW, params=params)


def go(p, state, max_rounds=10_000):
    _, params, draft = cut(p.model.num_layers)
    return decode(p, state, max_rounds, params=params, draft=draft)


@functools.cache
def run(chosen, view=None):
    p, state = begun(chosen)
    return go(dataclasses.replace(p, draft_view=view), state)


@functools.cache
def plain(layers):
    return new_tokens(go(*begun(ALL, layers, gamma=0)))


def listed(pages, tiles):
    """[L, B, K, tiles] bool: what lists name, each page once and in order."""
    found = np.zeros((len(pages), *pages[0].tiles.shape[:2], tiles), bool)
    for layer, page in enumerate(pages):
        for b, k in np.ndindex(*page.tiles.shape[:2]):
            row = np.asarray(page.tiles[b, k, : page.count[b]])
            assert (np.diff(row) > 0).all()
            found[layer, b, k, row] = True
    return found


@pytest.mark.parametrize(
    "chosen", [Nothing(), *(kind(0.5) for kind in CHOOSING), SELDOM, ONCE], ids=str
)
def test_greedy_tokens_do_not_depend_on_what_the_draft_reads(chosen):
    assert new_tokens(run(chosen)) == plain(layers_of(chosen))


def test_nor_on_the_view_that_it_reads():
    found = run(Window(0.5), "int8")
    assert new_tokens(found) == plain(1)
    assert (total(found.accepted) != total(run(Window(0.5)).accepted)).any()


def test_less_is_accepted_where_less_is_read():
    """Nothing, and all pages (as a test below says)."""
    assert total(run(Nothing()).accepted).sum() < total(run(ONCE).accepted).sum()


@pytest.mark.parametrize("kind", CHOOSING)
def test_a_share_of_1_is_everything(kind):
    chosen, coded, sizes = kind(1.0), jnp.array([3, 0, 6, 1]), Sizes(2, 2, 6)
    votes = [jax.random.uniform(jax.random.key(i), (4, 2, 6)) for i in range(2)]
    found = listed(chosen.pages(chosen.start(votes, coded), coded, sizes), 6)
    for b, n in enumerate(coded):
        assert found[:, b, :, :n].all()
        assert not found[:, b, :, n:].any()


@pytest.mark.parametrize("kind", CHOOSING)
def test_lists_are_as_long_as_the_share_says_and_name_coded_pages(kind):
    """And what is counted as read is what lists name."""
    p, state = begun(kind(0.5))
    read = 0
    for _ in range(3):
        coded = np.asarray(state.cache.quantized_length) // G
        found = listed(pages_to_read(state, p), p.cache.num_tiles)
        for b, n in enumerate(coded):
            assert not found[:, b, :, n:].any()
            assert (found[:, b].sum(-1) == max(np.ceil(n / 2), 2 if kind is TopPages else 1)).all()
        read = read + np.stack([found[0, :, 0].sum(-1), coded], 1)
        state = go(p, state, max_rounds=1)
        np.testing.assert_array_equal(state.draft_pages, read)


def test_a_window_is_the_sinks_and_what_is_recent():
    p, state = begun(Window(0.5))
    coded = np.asarray(state.cache.quantized_length) // G
    assert coded.tolist() == [3, 2, 7]
    found = listed(pages_to_read(state, p), p.cache.num_tiles)
    for b, n in enumerate(coded):
        recent = int(np.ceil(0.5 * n)) - 1
        expected = [t < 1 or n - recent <= t for t in range(n)]
        assert (found[:, b, :, :n] == expected).all()


@pytest.mark.parametrize("chunk", [40, 4096])
def test_the_mass_of_a_prompts_last_queries_is_attention_s(chunk, monkeypatch):
    """Against a softmax written out, in chunks that overlap, and where a prompt has fewer."""
    monkeypatch.setattr(prompt, "CHUNK", chunk)
    lengths, queries = np.array([37, 3, 90]), 5
    q, k = (jax.random.normal(jax.random.key(i), (3, 90, n, 8)) for i, n in ((0, 4), (1, 2)))
    whole = jax.jit(last_queries_mass, static_argnums=3)(q, k, jnp.asarray(lengths), queries, 0.3)
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    expected = np.zeros((3, 2, 90))
    for b, n in enumerate(lengths):
        for t in range(max(n - queries, 0), n):
            for h in range(4):
                scores = k[b, : t + 1, h // 2] @ q[b, t, h]
                weights = np.exp(0.3 * scores)
                expected[b, h // 2, : t + 1] += weights / weights.sum()
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    pages = by_page(whole, 32, 3)
    np.testing.assert_allclose(pages[..., 1], expected[..., 32:64].sum(-1), atol=1e-5)


def test_snapkv_keeps_its_choice_and_adds_what_comes():
    p, state = begun(SnapKV(0.5))
    before = listed(pages_to_read(state, p), p.cache.num_tiles)
    prompt = np.asarray(state.cache.quantized_length) // G
    state = go(p, state)
    coded = np.asarray(state.cache.quantized_length) // G
    assert (coded >= prompt + 3).all()
    after = listed(pages_to_read(state, p), p.cache.num_tiles)
    for b, (old, new) in enumerate(zip(prompt, coded, strict=True)):
        np.testing.assert_array_equal(after[:, b, :, :old], before[:, b, :, :old])
        assert after[:, b, :, old:new].all()


def test_snapkv_chooses_the_pages_whose_pooled_tokens_have_most():
    """From attention of one kv head that lies in page 2, at its border to page 1, which pooling
    lets see more of it than page 3."""
    masses = jnp.zeros((1, 1, 4 * G)).at[0, 0, 2 * G].set(1.0)
    chosen = SnapKV(0.5)
    pooled = jax.lax.reduce_window(masses, -jnp.inf, jax.lax.max, (1, 1, 7), (1, 1, 1), "SAME")
    memory = chosen.start([by_page(pooled, G, 6)], jnp.array([4]))
    (page,) = chosen.pages(memory, jnp.array([4]), Sizes(1, 1, 6))
    assert page.tiles[0, 0, : page.count[0]].tolist() == [1, 2]


def test_top_pages_are_those_of_the_last_verifications_accepted_rows():
    """Recomputed for each layer and kv head from the pass that the round made."""
    p, state = begun(TopPages(0.5))
    sizes = Sizes(p.model.num_layers, p.model.num_kv_heads, p.cache.num_tiles)
    params, after = tiny_model()[1], go(p, state, max_rounds=1)
    pages = pages_to_read(after, p)
    moved = np.asarray(after.cache.length - state.cache.length)
    rows = np.concatenate([state.pending[:, None], np.asarray(after.tokens)[:, 1:4]], 1)
    # Rejected proposals never reach `tokens`; what stands there instead does not vote.
    cache = rollback(after.cache, state.cache.length)
    call = (params, p, cache, jnp.asarray(rows), cache.length, p.read)
    _, _, masses = jax.jit(lambda: observed_pass(*call, masses=True))()
    found = listed(pages, sizes.tiles)
    coded = np.asarray(cache.quantized_length) // G
    checked = 0
    for layer, mass in enumerate(np.asarray([x.masses for x in masses])):  # [B, S, H, tiles]
        for b, n in enumerate(coded):
            votes = mass[b, : moved[b]].sum(0).reshape(sizes.kv_heads, -1, sizes.tiles).sum(1)
            count = max(int(np.ceil(0.5 * n)), 2)
            for k in range(sizes.kv_heads):
                best = np.argsort(-votes[k, 1 : n - 1])[: count - 2] + 1
                expected = sorted({0, n - 1, *best.tolist()})
                assert np.flatnonzero(found[layer, b, k]).tolist() == expected
                checked += len(best)
    assert checked


def test_rounds_between_two_choices_read_the_same_pages():
    """As by hand: two rounds, the second of which votes, and one with the pages chosen then."""
    p, state = begun(SELDOM)
    _, params, draft = cut(p.model.num_layers)
    a_round = jax.jit(lambda state, pages: read_round(params, draft, state, p, pages))
    pages = pages_to_read(state, p)
    first = a_round(state, pages)
    after = a_round(first, pages)
    expected = a_round(after, pages_to_read(after, p))
    assert (expected.cache.quantized_length == state.cache.quantized_length).all(), "no flush"
    found = go(p, state, max_rounds=3)
    for name in ("tokens", "count", "proposed", "accepted", "draft_pages"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    memory = go(p, state, max_rounds=2).memory
    np.testing.assert_allclose(memory, after.memory, rtol=1e-5, atol=1e-7)
    assert np.abs(memory - first.memory).max() > 1e-3


def test_pages_that_are_coded_end_a_choice():
    """However many rounds it is for: who reads all pages reads those that came since, too."""
    read, coded = np.asarray(run(ONCE).draft_pages).T
    assert (read == coded).all()
    flushes = run(ONCE).cache.quantized_length // G - begun(ONCE)[1].cache.quantized_length // G
    assert (flushes >= 3).all()


def test_each_kv_head_and_layer_has_pages_of_its_own():
    p, state = begun(TopPages(0.5))
    found = listed(pages_to_read(go(p, state, max_rounds=3), p), p.cache.num_tiles)
    rows = found[:, 2].reshape(-1, found.shape[-1])
    assert len(np.unique(rows, axis=0)) > 1


def test_a_page_that_is_not_read_changes_no_draft_logit():
    """Bit for bit; one that is read does."""
    p, state = begun(TopPages(0.5))
    pages = pages_to_read(state, p)
    chosen = listed(pages, p.cache.num_tiles)
    draft_params = tiny_model()[2]

    def logits(scrambled):
        def scramble(planes, which):
            mask = which.reshape(*which.shape, 1, 1)
            return planes._replace(upper=jnp.where(mask, planes.upper ^ 0x5A, planes.upper))

        layers = tuple(
            dataclasses.replace(x, keys=scramble(x.keys, s), values=scramble(x.values, s))
            for x, s in zip(state.cache.layers, scrambled, strict=True)
        )
        cache = dataclasses.replace(state.cache, layers=layers)
        tokens, at, read = state.pending[:, None], cache.length, p.draft_read
        return np.asarray(call(cache, tokens, at, read))

    @functools.partial(jax.jit, static_argnums=3)
    def call(cache, tokens, at, read):
        return cache_pass(draft_params, p, cache, tokens, at, read, pages)[0]

    unread = logits(np.zeros_like(chosen))
    np.testing.assert_array_equal(logits(~chosen), unread)
    assert (np.abs(logits(chosen) - unread).max((1, 2)) > 1e-3).all()


@pytest.mark.parametrize("share", [0.1, 0.3, 1 / 3, 0.7, 1.0])
def test_a_share_of_a_number_is_the_same_on_device_and_host(share):
    coded = np.arange(1, 3000)
    read = np.asarray(budget(share, jnp.asarray(coded), 1))
    assert read.tolist() == [most_pages(share, int(n), 1) for n in coded]
    assert (np.abs(read - share * coded) < 1).all()


def test_generate_takes_a_policy_by_name_and_says_what_was_read(one_layer_llama_dir):
    model = qs.load(str(one_layer_llama_dir))
    options = {"max_new_tokens": 20, "group_size": 16, "gamma": 2}
    prompt = [list(range(5, 150))]
    whole = qs.generate(model, prompt, qs.GenerateConfig(**options))
    chosen = qs.generate(model, prompt, qs.GenerateConfig(**options, draft_policy="top-pages"))
    assert chosen.tokens == whole.tokens
    whole, stats = whole.stats[0], chosen.stats[0]
    assert (whole["draft_policy"], whole["draft_read_share"]) == ("all", 1)
    assert stats["draft_policy"] == "top-pages"
    assert 2 / 8 <= stats["draft_read_share"] <= 3 / 9  # of 8 or 9 coded pages, 2 or 3


def test_auto_is_what_promises_most_at_the_caches_length():
    model = types.SimpleNamespace(
        config=PRESETS["llama-2-7b"], draft=qs.DraftConfig(), dtype=np.dtype(jnp.bfloat16)
    )
    config = qs.GenerateConfig(draft_policy="auto")
    assert draft_policy(model, config, 1024, 7) == ALL
    found = draft_policy(model, config, 131072, 7)
    reading = best_reading(model.config, model.draft, 131072, PRIOR[0], most=7)
    assert found == policy(reading.policy, reading.share) != ALL


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), True, "half"])
def test_shares_outside_their_range_are_refused_by_name(share):
    with pytest.raises(ValueError, match=r"^draft_share is .*; allowed: "):
        qs.GenerateConfig(draft_policy="top-pages", draft_share=share)


def test_what_is_no_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="draft_policy is 'best'; allowed: all, window, snapkv"):
        policy("best", None)
    with pytest.raises(ValueError, match=r"draft_share is 0\.5; allowed: 1 \(draft_policy all"):
        qs.GenerateConfig(draft_policy="all", draft_share=0.5)
    with pytest.raises(ValueError, match=r"draft_share is 0\.5; allowed: None with draft_policy"):
        qs.GenerateConfig(draft_policy="auto", draft_share=0.5)
    with pytest.raises(ValueError, match="draft_every is 2; allowed: None with a policy whose"):
        qs.GenerateConfig(draft_policy="window", draft_every=2)
    with pytest.raises(ValueError, match="draft_every is 0; allowed: an integer ≥ 1"):
        qs.GenerateConfig(draft_policy="top-pages", draft_every=0)
    with pytest.raises(ValueError, match="draft_every is 2; allowed: None with draft_policy auto"):
        qs.GenerateConfig(draft_policy="auto", draft_every=2)
    with pytest.raises(ValueError, match="draft_view is 'full'; allowed: int8, int4"):
        qs.GenerateConfig(draft_view="full")
    with pytest.raises(ValueError, match="draft_policy is 'window'; allowed: all in mode auto"):
        qs.GenerateConfig(mode="autoregressive", draft_policy="window")


def test_what_a_draft_reads_is_chosen_unless_it_is_said():
    """By the length of the text; a server's texts are of all lengths, and it reads all pages."""
    assert qs.GenerateConfig().draft_policy == "auto"
    assert qs.GenerateConfig(mode="autoregressive").draft_policy == "auto"
    parser = argparse.ArgumentParser()
    serve.add(parser.add_subparsers())
    for words, chosen in (([], "all"), (["--draft-policy", "auto"], "auto")):
        args = parser.parse_args(["serve", "--model", "m", *words])
        assert serve.decoding_config(args).draft_policy == chosen
