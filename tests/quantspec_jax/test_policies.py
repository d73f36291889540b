"""Draft policies: a draft may read as little as it likes, the text is the target's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import G, decode, new_tokens, program, prompts, start, tiny_model, total

import quantspec_jax as qs
from quantspec_jax.generate.cache_pass import cache_pass
from quantspec_jax.generate.policies import ALL, POLICIES, Window, policy

LENGTHS = [67, 50, 130]  # 3, 2 and 7 pages coded
NEW = 60


def run(chosen, gamma=3):
    p = program(gamma, policy=chosen)
    return decode(p, start(p, prompts(LENGTHS), LENGTHS, NEW))


@pytest.mark.parametrize("share", [1e-6, 0.25, 0.5, 1.0])
def test_greedy_tokens_do_not_depend_on_what_the_draft_reads(share):
    plain = decode(program(0, width=4), start(program(0, width=4), prompts(LENGTHS), LENGTHS, NEW))
    assert new_tokens(run(Window(share))) == new_tokens(plain)


def test_all_of_a_window_is_everything():
    whole, window = run(ALL), run(Window(1.0))
    np.testing.assert_array_equal(whole.accepted, window.accepted)
    np.testing.assert_array_equal(whole.proposed, window.proposed)


def test_less_is_accepted_where_less_is_read():
    assert total(run(Window(1e-6)).accepted).sum() < total(run(ALL).accepted).sum()


def test_a_window_is_the_sinks_and_what_is_recent():
    p = program(1, policy=Window(0.5))
    cache = start(p, prompts(LENGTHS), LENGTHS, NEW).cache
    pages = p.policy.pages((), cache)
    coded = np.asarray(cache.quantized_length) // G
    assert coded.tolist() == [3, 2, 7]
    for row, count, n in zip(np.asarray(pages.tiles), pages.count, coded, strict=True):
        recent = int(np.ceil(0.5 * n)) - 1
        expected = [t for t in range(n) if t < 1 or n - recent <= t]
        for head in row:
            assert head[:count].tolist() == expected


def test_a_page_that_is_not_read_changes_no_draft_logit():
    """Bit for bit; one that is read does."""
    p = program(1, policy=Window(0.5))
    state = start(p, prompts(LENGTHS), LENGTHS, NEW)
    pages = p.policy.pages((), state.cache)
    draft_params = tiny_model()[2]
    tiles = np.arange(state.cache.layers[0].keys.scale.shape[2])
    listed = np.arange(pages.tiles.shape[2]) < np.asarray(pages.count)[:, None, None]
    chosen = ((np.asarray(pages.tiles)[..., None] == tiles) & listed[..., None]).any(2)

    def logits(scrambled):
        def scramble(planes):
            mask = scrambled.reshape(*scrambled.shape, 1, 1)
            return planes._replace(upper=jnp.where(mask, planes.upper ^ 0x5A, planes.upper))

        layers = tuple(
            dataclasses.replace(x, keys=scramble(x.keys), values=scramble(x.values))
            for x in state.cache.layers
        )
        cache = dataclasses.replace(state.cache, layers=layers)
        tokens, at, read = state.pending[:, None], cache.length, p.draft_read
        call = jax.jit(lambda c: cache_pass(draft_params, p, c, tokens, at, read, pages)[0])
        return np.asarray(call(cache))

    plain = logits(np.zeros_like(chosen))
    np.testing.assert_array_equal(logits(~chosen), plain)
    assert (np.abs(logits(chosen) - plain).max((1, 2)) > 1e-3).all()


@pytest.mark.parametrize("name", POLICIES)
def test_generate_takes_them_by_name(name, tiny_llama_dir):
    model = qs.load(str(tiny_llama_dir))
    options = {"max_new_tokens": 20, "group_size": 16, "gamma": 2}
    prompt = [list(range(5, 150))]
    plain = qs.generate(model, prompt, qs.GenerateConfig(**options))
    chosen = qs.generate(model, prompt, qs.GenerateConfig(**options, draft_policy=name))
    assert chosen.tokens == plain.tokens


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), True, "half"])
def test_shares_outside_their_range_are_refused_by_name(share):
    with pytest.raises(ValueError, match=r"^draft_share is .*; allowed: "):
        qs.GenerateConfig(draft_policy="window", draft_share=share)


def test_what_is_no_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="draft_policy is 'best'; allowed: all, window"):
        policy("best", None)
    with pytest.raises(ValueError, match=r"draft_share is 0\.5; allowed: 1 \(draft_policy all"):
        qs.GenerateConfig(draft_share=0.5)
