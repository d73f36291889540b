"""Prompts read in tiles: each alone or beside others, from the start or from what was kept."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantspec_jax as qs
from quantspec_jax.cache.tiles import get_tile
from quantspec_jax.engine.engine import Engine, Progress
from quantspec_jax.engine.prefixes import Prefixes
from quantspec_jax.models.module import init_params

G = 16
TILES = {
    "max_new_tokens": 24,
    "group_size": G,
    "prefill": "tiles",
    "max_length": 192,
    "logprobs": 2,
}
PROMPTS = [[5, 6, 7] * 20, [9, 8] * 35, [11] * 33, list(range(1, 120)), [3, 1, 4, 1, 5]]
MODES = [
    {"gamma": 3, "coupling": "invariant"},
    {"mode": "autoregressive", "kv": "full"},
]
TILE = jax.jit(get_tile, static_argnums=3)


@pytest.fixture(scope="module")
def model():
    config = qs.ModelConfig("llama", 320, 32, 64, 2, 4, 2, 16, 1024)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    return qs.Model(config, params, None, qs.DraftConfig(group_size=32))


def finished(engine: Engine, prompt: list[int], wishes=None, key=None) -> Progress:
    """What one request gets of an engine that has no other."""
    (slot,) = engine.add([prompt], wishes, key)
    while engine.running:
        engine.step()
    progress = engine.read(slot)
    engine.remove(slot)
    return progress


@pytest.mark.parametrize("mode", MODES, ids=["quantspec", "full"])
def test_requests_that_come_while_others_decode_get_what_they_get_alone(model, mode):
    """Sampled beside greedy; a step reads one tile at most, and cancelled slots are free."""
    config = qs.GenerateConfig(**TILES, **mode)
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    wishes = [
        dataclasses.replace(
            config, temperature=0.9 * (i % 2), max_new_tokens=9 + 3 * i, logprobs=2 * (i % 2)
        )
        for i in range(len(PROMPTS))
    ]
    alone = {}
    for i, prompt in enumerate(PROMPTS):
        alone[i] = finished(Engine(model, config, 150, slots=2), prompt, wishes[i], keys[i : i + 1])
    engine = Engine(model, config, 150, slots=2)
    (cancelled,) = engine.add([[2] * 90])
    engine.step()
    engine.remove(cancelled)
    waiting, running, found = list(range(len(PROMPTS))), {}, {}
    while waiting or running:
        while waiting and engine.free_slots:
            i = waiting.pop(0)
            (slot,) = engine.add([PROMPTS[i]], wishes[i], keys[i : i + 1])
            running[slot] = i
        before = {p.slot: p.position for p in engine._prompts}
        engine.step(2)
        left = {p.slot: p.position for p in engine._prompts}
        assert sum(left[slot] != before[slot] for slot in left) <= 1
        assert all(left[slot] <= before[slot] + G for slot in left)
        for slot in list(running):
            progress = engine.read(slot)
            if progress.finished:
                found[running.pop(slot)] = progress
                engine.remove(slot)
    for i, one in alone.items():
        assert found[i].tokens == one.tokens
        assert [len(s.top) for s in found[i].logprobs] == [2 * (i % 2)] * len(one.tokens)
        np.testing.assert_allclose(
            [s.own for s in found[i].logprobs], [s.own for s in one.logprobs], atol=2e-4
        )


@pytest.mark.parametrize("mode", MODES, ids=["quantspec", "full"])
def test_what_is_kept_is_what_a_fresh_prefill_makes_bit_for_bit(model, mode):
    config = qs.GenerateConfig(**TILES, **mode)
    prefixes = Prefixes(1 << 20)
    reusing = Engine(model, config, 150, slots=2, prefixes=prefixes)
    long, other = list(range(1, 120)), [*range(1, 90), *[4] * 50]
    answer = finished(reusing, long).tokens
    for prompt in ([7] * 30, other, long[:60], long + answer):
        fresh = Engine(model, config, 150, slots=2)
        kept = finished(reusing, prompt)
        assert kept.tokens == finished(fresh, prompt).tokens
        pairs = enumerate(zip(prompt, long, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(long)))
        assert shared - 2 * G < kept.kept <= shared
        layers = [engine._state.cache.layers for engine in (reusing, fresh)]
        for number in range(len(prompt) // G):
            tiles = [TILE(each, jnp.int32(0), jnp.int32(number), G) for each in layers]
            for name, x in tiles[0].items():
                assert np.asarray(x).tobytes() == np.asarray(tiles[1][name]).tobytes()


def test_the_oldest_tiles_go_first_and_ends_before_beginnings(model):
    tile = {"x": np.zeros(10, np.uint8)}
    prefixes = Prefixes(60)
    old, new = [1] * 12, [2] * 12
    for tokens in (old, new):
        for end in (4, 8, 12):
            prefixes.keep(tokens[:end], 4, tile)
    assert len(prefixes) == 6
    assert len(prefixes.find(old, 4, 3)) == 3  # used: the newer one is the older now
    prefixes.keep([3] * 4, 4, tile)
    assert [len(prefixes.find(x, 4, 3)) for x in (old, new, [3] * 4)] == [3, 2, 1]
    assert prefixes.bytes == 60
    prefixes.keep([9] * 4, 4, {"x": np.zeros(61, np.uint8)})
    assert len(prefixes) == 6


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logprobs_are_the_targets_with_and_without_speculation(model, temperature):
    """Those of the raw distribution, as a pass over the whole text in full precision has them
    (up to what the cache's codes change)."""
    wants = {"max_new_tokens": 30, "group_size": G, "temperature": temperature, "logprobs": 3}
    speculative = qs.GenerateConfig(**wants, gamma=3, coupling="invariant")
    plain = qs.GenerateConfig(**wants, mode="autoregressive", kv="int8", pass_width=4)
    out, same = (qs.generate(model, [PROMPTS[0]], config) for config in (speculative, plain))
    assert out.tokens == same.tokens
    (scores,), (others,), (tokens,) = out.logprobs, same.logprobs, out.tokens
    np.testing.assert_allclose([s.own for s in scores], [s.own for s in others], atol=1e-5)
    assert [[i for i, _ in s.top] for s in scores] == [[i for i, _ in s.top] for s in others]
    text = np.array([PROMPTS[0] + tokens])
    raw = jax.nn.log_softmax(model.logits(text)[0, len(PROMPTS[0]) - 1 : -1])
    np.testing.assert_allclose([s.own for s in scores], raw[np.arange(30), tokens], atol=0.15)
    for score, row in zip(scores, np.asarray(raw), strict=True):
        np.testing.assert_allclose([p for _, p in score.top], np.sort(row)[::-1][:3], atol=0.15)
    assert out.stats[0]["accepted"] - 4 <= sum(out.drafted[0]) <= out.stats[0]["accepted"]
    assert not any(same.drafted[0])


def test_a_short_prompt_is_read_alike_in_tiles_and_whole(model):
    config = qs.GenerateConfig(
        max_new_tokens=30, group_size=G, logprobs=3, gamma=3, coupling="invariant"
    )
    tiles = dataclasses.replace(config, prefill="tiles")
    for prompt in ([3, 1, 4, 1, 5, 9], [2] * G):
        whole, tiled = (qs.generate(model, [prompt], c) for c in (config, tiles))
        assert whole.tokens == tiled.tokens


@pytest.mark.parametrize("bad", [{"logprobs": 21}, {"logprobs": -1}, {"prefill": "half"}])
def test_settings_that_are_none_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; allowed: "):
        qs.GenerateConfig(**bad)
