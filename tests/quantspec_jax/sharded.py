"""What test_sharding.py runs in a process of its own, which has 8 devices: prints a JSON object, of
each check what went wrong, or nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import quantspec_jax as qs
from pallas_kernels.layout import QuantizedWeight, TiledWeight, tile
from quantspec_jax import sharding
from quantspec_jax.cache import KVCache, create
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.engine.engine import Engine
from quantspec_jax.generate import prefill as stages
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.prefill import prefill
from quantspec_jax.generate.requests import requests
from quantspec_jax.generate.state import Program, PromptProgram
from quantspec_jax.loading import Model, full_logits
from quantspec_jax.models.attention import _pairs_of_parts
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import block_params
from quantspec_jax.models.module import init_params
from quantspec_jax.models.parameters import flatten, nest, parameter_shapes
from quantspec_jax.weights.formats import DraftConfig, WeightFormat

CONFIG = ModelConfig("qwen2", 96, 64, 128, 2, 8, 4, 16, 2048, qkv_bias=True)
# What each logical axis is split over, said again.
OVER = {"heads": "tp", "kv_heads": "tp", "mlp": "tp", "vocab": "tp", "tiles": "cp", "batch": "dp"}


def mesh(**sizes: int) -> Mesh:
    """So many devices an axis."""
    number = int(np.prod(list(sizes.values())))
    devices = np.array(jax.devices()[:number])
    return Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))


def check_split(x: jax.Array, axes: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    """Every device holds the part that the axes say, and no two parts that should differ agree."""
    parts = [sizes.get(OVER.get(name, ""), 1) for name in axes]
    own = tuple(size // n for size, n in zip(x.shape, parts, strict=True))
    places = {
        tuple((s.start or 0) for s in shard.index)
        for shard in x.addressable_shards
        if shard.data.shape == own
    }
    assert {shard.data.shape for shard in x.addressable_shards} == {own}, (axes, x.sharding)
    assert len(places) == np.prod(parts), (axes, x.sharding)
    assert len(x.addressable_shards) == np.prod(list(sizes.values()))


@functools.cache
def model(draft: DraftConfig | None = None) -> Model:
    return Model(CONFIG, init_params(CONFIG, jax.random.key(0)), draft=draft)


def parameters() -> None:
    sizes = {"dp": 2, "tp": 4}
    placed = sharding.place_model(model(DraftConfig(bits=None)), mesh(**sizes))
    for path, spec in parameter_shapes(CONFIG).items():
        check_split(flatten(placed.params)[path], spec.axes, sizes)
        assert flatten(placed.draft_params)[path] is flatten(placed.params)[path]


def packed_weights() -> None:
    sizes = {"tp": 4}
    formats = (("layers.0.o", WeightFormat(8, 32)), ("layers.1.up", WeightFormat(4, 16, True)))
    own = model(DraftConfig(group_size=32, formats=formats, lm_head_bits=4))
    placed = sharding.place_model(own, mesh(**sizes))
    given, found = flatten(own.draft_params), flatten(placed.draft_params)
    specs = parameter_shapes(CONFIG)
    assert "layers.0.o.residual" in found
    assert found["layers.1.up.kernel"].minimum is None
    for path, weight in found.items():
        jax.tree.map(np.testing.assert_array_equal, weight, given[path])
        if not isinstance(weight, QuantizedWeight):
            assert weight is flatten(placed.params)[path]
            continue
        rows, columns = specs[path.replace("residual", "kernel")].axes
        check_split(weight.packed, (rows, "group", columns), sizes)
        for numbers in (weight.scale, weight.minimum):
            if numbers is not None:
                check_split(numbers, (rows, columns), sizes)


def tiled_weights() -> None:
    sizes = {"tp": 2}
    own = flatten(model(DraftConfig(group_size=32)).draft_params)
    for path in ("layers.0.down.kernel", "layers.1.q.kernel"):
        own[path] = tile(own[path])
        found = flatten(sharding.place_params(CONFIG, nest(own), mesh(**sizes)))[path]
        assert isinstance(found, TiledWeight)
        check_split(found.strips, (*parameter_shapes(CONFIG)[path].axes, "strip"), sizes)


def decode_state() -> None:
    sizes = {"dp": 2, "cp": 2, "tp": 2}
    tokens = jax.random.randint(jax.random.key(1), (4, 100), 0, CONFIG.vocab_size)
    wants = requests(GenerateConfig(), None, (), 4)
    for view in ("int8", "full"):
        cache = CacheConfig(128, 16, view)
        program = Program(CONFIG, cache, gamma=4 if view == "int8" else 0)
        run = jax.jit(functools.partial(prefill, program=program.prompt, capacity=8))
        state = run(model().params, tokens, jnp.full(4, 100), wants)
        placed = sharding.place_state(state, mesh(**sizes))
        assert jax.tree.structure(placed) == jax.tree.structure(state)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(*map(data, (a, b))), placed, state)
        check_cache(placed.cache, sizes)
        rest = dataclasses.replace(placed, cache=())  # type: ignore[arg-type]
        for x in jax.tree.leaves(rest):
            check_split(x, ("batch", *["whole"] * (x.ndim - 1)), sizes)


def data(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def check_cache(cache: KVCache, sizes: dict[str, int]) -> None:
    names = CACHE_NAMES
    for x in (cache.length, cache.quantized_length):
        check_split(x, ("batch",), sizes)
    for layer in cache.layers:
        for buffer in (layer.key_buffer, layer.value_buffer):
            check_split(buffer, names["key_buffer"], sizes)
        for planes in (layer.keys, layer.values):
            for x in planes or ():
                if x.ndim == 5:
                    check_split(x, names["upper"] if x.dtype == jnp.uint8 else SCALES, sizes)
                else:
                    check_split(x, (*names["scale"], "head_dim"), sizes)


CACHE_NAMES = {
    "key_buffer": ("batch", "kv_heads", "slots", "head_dim"),
    "upper": ("batch", "kv_heads", "tiles", "rows", "bytes"),
    "scale": ("batch", "kv_heads", "tiles"),
}
SCALES = ("batch", "kv_heads", "tiles", "value_groups", "tokens")


def refused() -> None:
    params = model().params
    cache = create(CONFIG, CacheConfig(5 * 16, 16), 3)
    small = dataclasses.replace(CONFIG, vocab_size=98)
    odd = init_params(small, jax.random.key(0))
    cases: list[tuple[str, Any]] = [
        ("num_kv_heads is 4", lambda: sharding.place_params(CONFIG, params, mesh(tp=8))),
        ("embedding (vocab) is 98", lambda: sharding.place_params(small, odd, mesh(tp=4))),
        ("layers.0.keys.upper (tiles) is 5", lambda: sharding.place_cache(cache, mesh(cp=2))),
        ("layers.0.keys.upper (batch) is 3", lambda: sharding.place_cache(cache, mesh(dp=2))),
        ("layers.0.keys.upper (kv_heads) is 4", lambda: sharding.place_cache(cache, mesh(tp=8))),
        ("mesh axes is ('x',)", lambda: sharding.place_params(CONFIG, params, mesh(x=2))),
        (
            "layers.0.down.kernel.packed (mlp) is 2",
            lambda: sharding.place_model(model(DraftConfig(group_size=64)), mesh(tp=4)),
        ),
        (
            "mesh axis_types is",
            lambda: sharding.place_params(CONFIG, params, jax.make_mesh((2,), ("tp",))),
        ),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match="^" + re.escape(words)):
            call()


def logits() -> None:
    """Sums over parts are in another order, and nothing else differs."""
    own = model(DraftConfig(bits=None))
    tokens = jax.random.randint(jax.random.key(1), (2, 70), 0, CONFIG.vocab_size)
    expected = full_logits(own.params, tokens, CONFIG)
    for sizes in ({"tp": 4}, {"dp": 2, "tp": 2}):
        there = mesh(**sizes)
        placed = sharding.place_model(own, there)
        assert sharding.mesh_of(placed.params) == there
        actual = full_logits(placed.params, tokens, CONFIG)
        assert len(actual.sharding.device_set) == there.size
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * np.ptp(expected))


# Drafts, what is accepted and the pages that are read all have to come out alike for the tokens to.
PROMPTS = [list(range(1, 60)), list(range(90, 12, -1))]  # of 59 and 78 tokens
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1)
SAMPLED = GenerateConfig(
    max_new_tokens=40,
    gamma=3,
    temperature=0.8,
    coupling="invariant",
    draft_policy="top-pages",
    draft_share=0.5,
    group_size=16,
    ignore_eos=True,
)


@functools.cache
def decoder() -> Model:
    draft = DraftConfig(group_size=16, formats=(("layers.0.o", WeightFormat(8, 16)),))
    return Model(ONE_LAYER, init_params(ONE_LAYER, jax.random.key(0)), draft=draft)


@functools.cache
def alone() -> list[list[int]]:
    """What one device makes, some flushes later."""
    return qs.generate(decoder(), PROMPTS, SAMPLED).tokens


def heads_over_more_devices_than_there_are() -> None:
    """4 key-value heads on 8 devices: each is there twice."""
    placed = sharding.place_model(decoder(), mesh(tp=8))
    assert qs.generate(placed, PROMPTS, SAMPLED).tokens == alone()
    assert placed.config.num_kv_heads == 8
    kernel = placed.params["layers"]["0"]["k"]["kernel"]
    check_split(kernel, ("embed", "kv_heads"), {"tp": 8})
    given = np.asarray(decoder().params["layers"]["0"]["k"]["kernel"]).reshape(64, 4, 16)
    found = np.asarray(kernel).reshape(64, 8, 16)
    np.testing.assert_array_equal(found, np.repeat(given, 2, axis=1))


def tiles_and_heads_over_devices() -> None:
    """With this coupling the text is that of no draft, whatever a policy's devices choose."""
    placed = sharding.place_model(decoder(), mesh(cp=4, tp=2))
    assert qs.generate(placed, PROMPTS, SAMPLED).tokens == alone()
    placed = sharding.place_model(decoder(), mesh(cp=2))
    config = dataclasses.replace(SAMPLED, draft_policy="snapkv")
    with mock.patch.object(stages, "uses_cudnn", return_value=True):  # devices share heads then
        observed = qs.generate(placed, PROMPTS, config)
    assert observed.tokens == alone()
    read = [each["draft_read_share"] for each in observed.stats]
    assert 0.3 < min(read) < 1, read


def no_device_has_more_than_its_share() -> None:
    """Nor do devices meet more often than they have to."""
    sizes = {"dp": 2, "cp": 2, "tp": 2}
    engine = Engine(sharding.place_model(decoder(), mesh(**sizes)), SAMPLED, 78, 2)
    engine.add(PROMPTS)
    while engine.running:
        engine.step()
    assert [engine.read(slot).tokens for slot in range(2)] == alone()
    assert engine._state is not None
    check_cache(engine._state.cache, sizes)
    (program,) = engine._runner._decoders.values()
    text, passes = program.as_text(), 2  # a draft step's and a verification's
    # Of a pass o, down and the embedding are summed; attention's parts and logits are gathered.
    # One more sum a round is that of the pages which were read.
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == passes * (2 * 1 + 1) + 1
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == passes * (1 + 1)
    assert not re.search("all-to-all|collective-permute|reduce-scatter", text)


def a_prompt_is_read_in_parts() -> None:
    """Each of four devices computes a quarter of a block, attention included, and meets the others
    once, for the keys and values of all."""
    tokens, lengths = jnp.zeros((1, 4096), jnp.int32), jnp.full(1, 4096)
    made = []
    for there in (None, mesh(cp=4)):
        placed = decoder() if there is None else sharding.place_model(decoder(), there)
        program = PromptProgram(placed.config, CacheConfig(4096, 16), mesh=there)
        x, h = stages.COMPILED[stages.begin](placed.params, tokens, program=program)
        call = (*block_params(placed.params, 0), x, h, lengths)
        made.append(stages.COMPILED[stages.layer].lower(*call, program=program).compile())
    whole, part = made
    text = part.as_text()
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == 1
    assert not re.search("all-reduce|all-to-all|collective-permute|reduce-scatter", text)
    assert part.cost_analysis()["flops"] < 0.35 * whole.cost_analysis()["flops"]
    left, of_all = (each.memory_analysis().output_size_in_bytes for each in (part, whole))
    assert left < 0.3 * of_all  # of the stream and of the cache
    # What XLA does not see, it counts the steps of a loop once: all have as many products to make.
    table = _pairs_of_parts(4, 2)
    assert table.shape == (4, sum(range(1, 17)) // 4, 3)
    read = {(int(i), int(j)) for part in range(4) for i, j in blocks_read(table[part], part)}
    assert read == {(i, j) for i in range(16) for j in range(i + 1)}


def blocks_read(pairs: np.ndarray, part: int) -> list[tuple[int, int]]:
    """(block of queries, block of keys) among all of a prompt, with two blocks a run of eight."""
    own = [2 * part, 2 * part + 1, 14 - 2 * part, 15 - 2 * part]
    assert all((own[i] == j) == bool(diagonal) for i, j, diagonal in pairs)
    return [(own[i], j) for i, j, _ in pairs]


def refused_over_a_mesh() -> None:
    placed = sharding.place_model(decoder(), mesh(cp=2))
    for change, words in (
        ({"prefill": "tiles"}, "prefill 'tiles'"),
        ({"mode": "autoregressive", "draft_policy": "all", "draft_share": None}, "kv 'full'"),
    ):
        with pytest.raises(NotImplementedError, match="^" + re.escape(words)):
            qs.generate(placed, PROMPTS, dataclasses.replace(SAMPLED, **change))
    with pytest.raises(ValueError, match=r"^num_heads is 8; allowed: multiples of 3"):
        sharding.check_mesh(CONFIG, mesh(tp=3))
    with pytest.raises(ValueError, match=r"^prompts is 3; allowed: multiples of 2"):
        qs.generate(sharding.place_model(decoder(), mesh(dp=2)), [[1]] * 3, SAMPLED)
    with pytest.raises(ValueError, match="at most 8 devices"):
        sharding.make_mesh({"tp": 16})
    with pytest.raises(ValueError, match=r"^mesh axes is "):
        sharding.make_mesh({"pp": 2})


CHECKS = (
    *(parameters, packed_weights, tiled_weights, decode_state, refused, logits),
    *(heads_over_more_devices_than_there_are, tiles_and_heads_over_devices),
    *(no_device_has_more_than_its_share, a_prompt_is_read_in_parts, refused_over_a_mesh),
)


def wrong(check: Callable[[], None]) -> str:
    """The traceback of what a check raised."""
    try:
        check()
    except (Exception, pytest.fail.Exception):
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    assert jax.device_count() == 8
    print(json.dumps({check.__name__: wrong(check) for check in CHECKS}))
