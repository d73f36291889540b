"""What test_sharding.py runs in a process of its own, which has 8 devices: prints a JSON object, of
each check what went wrong, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import io
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
import test_lowered_loop as lowered_loop
from jax.sharding import Mesh

import convert
import quantspec_jax as qs
from pallas_kernels import dispatch
from pallas_kernels.layout import QuantizedWeight, TiledWeight, tile
from quantspec_jax import cli, peers, sharding
from quantspec_jax.bench import decode as bench
from quantspec_jax.bench import tuning
from quantspec_jax.bench.decode import random_state
from quantspec_jax.cache import KVCache, create
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.cache.tiles import get_tile, put_tiles
from quantspec_jax.cost import Reading
from quantspec_jax.engine import adaptive
from quantspec_jax.engine import prepare as preparing
from quantspec_jax.engine.engine import Engine
from quantspec_jax.engine.prepare import prepare
from quantspec_jax.engine.programs import DECODE
from quantspec_jax.generate import lookup
from quantspec_jax.generate import prefill as stages
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.policies import ALL, Policy, TopPages
from quantspec_jax.generate.prefill import prefill
from quantspec_jax.generate.requests import requests
from quantspec_jax.generate.state import SHARES, DecodeState, Look, Program, PromptProgram
from quantspec_jax.generate.tiles import TILE_STAGES, tile_begin, tile_end, tile_layer
from quantspec_jax.loading import Model, full_logits
from quantspec_jax.models.attention import _pairs_of_parts
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import block_params
from quantspec_jax.models.module import init_params
from quantspec_jax.models.parameters import flatten, nest, parameter_count, parameter_shapes
from quantspec_jax.sharding import init_params_over
from quantspec_jax.weights.entries import draft_tree, quantize_params
from quantspec_jax.weights.formats import DraftConfig, WeightFormat
from quantspec_jax.weights.sizes import draft_bytes

CUDA_SHAPES = dataclasses.replace(lowered_loop.MODEL, num_layers=2)
CONFIG = ModelConfig("qwen2", 96, 64, 128, 2, 8, 4, 16, 2048, qkv_bias=True)
# What each logical axis is split over, said again.
OVER = {"heads": "tp", "kv_heads": "tp", "mlp": "tp", "vocab": "tp"}
OVER |= {"tiles": "cp", "positions": "cp", "batch": "dp"}


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
    draft = DraftConfig(group_size=32, formats=formats, lm_head_bits=4, lm_head_first=10)
    own = model(draft)
    placed = sharding.place_model(own, mesh(**sizes))
    given, found = flatten(own.draft_params), flatten(placed.draft_params)
    specs = parameter_shapes(CONFIG)
    assert "layers.0.o.residual" in found
    assert found["layers.1.up.kernel"].minimum is None
    for path, weight in found.items():
        jax.tree.map(np.testing.assert_array_equal, weight, given[path])
        if path == "lm_head.first":
            check_split(weight, ("whole", "whole"), sizes)
            continue
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
        cache = CacheConfig(128 if view == "int8" else 123, 16, view)  # 128 places, and no more
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
    slots = "slots" if cache.layers[0].keys else "positions"
    for x in (cache.length, cache.quantized_length):
        check_split(x, ("batch",), sizes)
    for layer in cache.layers:
        for buffer in (layer.key_buffer, layer.value_buffer):
            check_split(buffer, ("batch", "kv_heads", slots, "head_dim"), sizes)
        for planes in (layer.keys, layer.values):
            for x in planes or ():
                if x.ndim == 5:
                    check_split(x, names["upper"] if x.dtype == jnp.uint8 else SCALES, sizes)
                else:
                    check_split(x, (*names["scale"], "head_dim"), sizes)


CACHE_NAMES = {
    "upper": ("batch", "kv_heads", "tiles", "rows", "bytes"),
    "scale": ("batch", "kv_heads", "tiles"),
}
SCALES = ("batch", "kv_heads", "tiles", "value_groups", "tokens")


def refused() -> None:
    params = model().params
    cache = create(CONFIG, CacheConfig(5 * 16, 16), 3)
    small = dataclasses.replace(CONFIG, vocab_size=98)
    odd = init_params(small, jax.random.key(0))
    wide = dataclasses.replace(CONFIG, intermediate_size=192)
    uneven = Model(
        wide, init_params(wide, jax.random.key(0)), draft=DraftConfig(group_size=128, layers="mlp")
    )
    cases: list[tuple[str, Any]] = [
        ("num_kv_heads is 4", lambda: sharding.place_params(CONFIG, params, mesh(tp=8))),
        ("embedding (vocab) is 98", lambda: sharding.place_params(small, odd, mesh(tp=4))),
        ("layers.0.keys.upper (tiles) is 5", lambda: sharding.place_cache(cache, mesh(cp=2))),
        ("layers.0.keys.upper (batch) is 3", lambda: sharding.place_cache(cache, mesh(dp=2))),
        ("layers.0.keys.upper (kv_heads) is 4", lambda: sharding.place_cache(cache, mesh(tp=8))),
        ("mesh axes is ('x',)", lambda: sharding.place_params(CONFIG, params, mesh(x=2))),
        (
            "draft group_size is 64; allowed: what divides the 32 input channels of layers.0.o that"
            " a device has: 32, 16, 8",
            lambda: sharding.place_model(model(DraftConfig(group_size=64)), mesh(tp=4)),
        ),
        ("num_heads is 8", lambda: sharding.place_model(model(DraftConfig()), mesh(tp=3))),
        (  # two groups, but the first one's last channels are the second device's
            "draft group_size is 128; allowed: what divides the 96 input channels of layers.0.down",
            lambda: sharding.place_model(uneven, mesh(tp=2)),
        ),
        (
            "mesh axis_types is",
            lambda: sharding.place_params(CONFIG, params, jax.make_mesh((2,), ("tp",))),
        ),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match="^" + re.escape(words)):
            call()


def drafts_in_whole_groups() -> None:
    """Before anything is read: what would be split is refused, and what nobody asked for is made in
    groups that are not."""

    class Checkpoint:
        config, tokenizer, draft_config = CONFIG, None, DraftConfig(group_size=64, method="gptq")

        def load(self, *given: Any, **named: Any) -> Any:
            raise AssertionError("the target is read")

        load_draft = load

        def nothing(self, *_: Any) -> None:
            return None

        load_kv = nothing

    class WithoutDraft(Checkpoint):
        draft_config, load_draft = None, Checkpoint.nothing

        def load(self, *given: Any, **named: Any) -> Any:
            return init_params(CONFIG, jax.random.key(0))

    over, words = mesh(tp=4), r"^draft group_size is {}; .* that a device has: 32, 16, 8$"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "open_source", lambda *_: Checkpoint())
        with pytest.raises(ValueError, match=words.format(64)):
            qs.load("somewhere", mesh=over)
        with pytest.raises(ValueError, match=words.format(128)):
            qs.load("somewhere", draft=DraftConfig(group_size=128), mesh=over)
        patch.setattr(convert, "open_source", lambda *_: WithoutDraft())
        made = qs.load("somewhere", mesh=over)
        assert made.draft == DraftConfig(group_size=32)
        assert qs.load("somewhere", mesh=mesh(tp=2)).draft == DraftConfig()
        assert qs.load("somewhere").draft == DraftConfig()
    packed = made.draft_params["layers"]["0"]["down"]["kernel"].packed
    assert packed.sharding.shard_shape(packed.shape)[0] == 1
    on_devices = sharding.place_model(model(DraftConfig(bits=None)), over).params
    with pytest.raises(ValueError, match=words.format(64)):
        _ = Model(CONFIG, on_devices, draft=DraftConfig(group_size=64)).draft_params


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
    formats = (("layers.0.o", WeightFormat(8, 16)),)
    draft = DraftConfig(group_size=16, formats=formats, lm_head_bits=4, lm_head_first=10)
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


def prompts_in_tiles() -> None:
    """Each device has its heads' part, and codes the tiles that are its own: prompts beside each
    other, in slots of their own, leave the cache and the first tokens of one device."""
    sizes = {"tp": 2, "cp": 2}
    read = dataclasses.replace(SAMPLED, prefill="tiles", temperature=2.0)
    keys, tokens = jax.random.key(5), np.arange(6 * 40).reshape(6, 40) * 7 % 96
    made = []
    for there in (decoder(), sharding.place_model(decoder(), mesh(**sizes))):
        program = prepare(there, [[1] * 40], read).program.prompt
        cache = sharding.place_cache(
            create(there.config, program.cache, 6), sharding.mesh_of(there.params)
        )
        layer, firsts = cache.layers[0], []
        for slot, prompt in enumerate(tokens):
            for start in range(0, 40, 16):
                tile = jnp.zeros((1, 16), int).at[0, : 40 - start].set(prompt[start : start + 16])
                call = (*block_params(there.params, 0), *begin_tile(there, tile, program), layer)
                where = (jnp.int32(slot), jnp.int32(start), jnp.int32(40))
                _, h, layer = TILE_STAGES[tile_layer](*call, *where, program=program)
            wants = requests(read, jax.random.fold_in(keys, slot), (), 1)
            of_prompt = (jnp.zeros((1, 96), bool), jnp.zeros((1, 40), jnp.int32), jnp.full(1, 40))
            last = (h, jnp.int32(7), *of_prompt, wants)
            state = TILE_STAGES[tile_end](there.params, *last, program=program, capacity=8)
            firsts.append(int(state.pending[0]))
        made.append((firsts, layer, state.memory))
    (expected, whole, _), (found, parts, memory) = made
    assert found == expected
    assert len(set(found)) > 3
    (votes,) = jax.tree.leaves(memory)
    check_split(votes, ("batch", "layers", "kv_heads", "tiles"), sizes)

    def check_same(whole: Any, parts: Any, axis: str, places: Any) -> None:
        for x, y in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
            check_split(y, ("batch", "kv_heads", axis, *["whole"] * (x.ndim - 3)), sizes)
            x, y = (np.asarray(a).astype(np.float32) for a in (x, y))
            assert np.isclose(x[:, :, : len(places)], y[:, :, places], 1e-3, 1e-5).mean() > 0.999

    check_same(*((x.key_buffer, x.value_buffer) for x in (whole, parts)), "whole", range(32))
    half = parts.keys.upper.shape[2] // 2  # the tiles of a device lie together
    check_same(*((x.keys, x.values) for x in (whole, parts)), "tiles", [0, half, 1])
    tiles = [get_tile([x], jnp.int32(5), jnp.int32(1), 16, n) for x, n in ((whole, 1), (parts, 2))]
    for name, x in tiles[0].items():
        assert np.isclose(x.astype(jnp.float32), tiles[1][name].astype(jnp.float32)).mean() > 0.99
        back = put_tiles(parts, tiles[1], *(jnp.int32(n) for n in (0, 3, 1)), 16, 2)
        found = get_tile([back], jnp.int32(3), jnp.int32(1), 16, 2)[name]
        np.testing.assert_array_equal(found, tiles[1][name])


def begin_tile(there: Model, tile: jax.Array, program: PromptProgram) -> Any:
    return TILE_STAGES[tile_begin](there.params, tile, program=program)


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
    (program,) = engine._runner._known.values()
    text, passes = program.as_text(), 2  # a draft step's and a verification's
    # Of a pass o, down and the embedding are summed; attention's parts and logits are gathered.
    # One more sum a round is that of the pages which were read.
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == passes * (2 * 1 + 1) + 1
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) == passes * (1 + 1)
    assert not re.search("all-to-all|collective-permute|reduce-scatter", text)


def states_lie_where_rounds_want_them() -> None:
    """From the first chunk of rounds to the last, as one program: beside slots that have been empty
    so far, and where the choice of a reading is for nobody, since nothing is drafted."""
    auto: dict[str, Any] = {"draft_policy": "auto", "draft_share": None, "mode": "autoregressive"}
    plain = dataclasses.replace(SAMPLED, **auto, rounds_per_chunk=2)
    coded = dataclasses.replace(plain, kv="int8")
    engine = Engine(sharding.place_model(decoder(), mesh(dp=2)), coded, 78, 4)
    for _ in range(2):
        taken = engine.add(PROMPTS)
        while engine.running:
            engine.step()
        assert [engine.read(slot).tokens for slot in taken] == alone()
    chosen = Reading("top-pages", 0.5)  # as where contexts are long
    short = dataclasses.replace(plain, max_new_tokens=6)
    with mock.patch.object(preparing, "best_reading", return_value=chosen):
        engine = Engine(sharding.place_model(decoder(), mesh(tp=2)), short, 78, 2)
    engine.add(PROMPTS)
    while engine.running:
        engine.step()
    assert engine._state is not None
    assert not jax.tree.leaves(engine._state.memory)
    (_,) = engine._runner._known.values()


def rounds_that_copy_over_devices() -> None:
    """Each part of the batch by itself, whose devices copy together."""
    placed = sharding.place_model(decoder(), mesh(dp=2, tp=2))
    config = dataclasses.replace(SAMPLED, gamma=1, draft_policy="all", draft_share=None, lookup=2)
    with mock.patch.object(lookup, "LEAST", 1):
        made = qs.generate(placed, PROMPTS, config)
    assert made.tokens == alone()
    copied = [each["lookup_rounds"] for each in made.stats]
    assert 0 < min(copied) < max(copied), copied
    assert all(each["proposed"] > each["lookup_proposed"] for each in made.stats)


def calls_end_early_over_devices() -> None:
    """Where all devices count the same; parts of a batch are asked by the host."""
    config = dataclasses.replace(SAMPLED, gamma="auto", draft_cost=0.3)
    three = Look(3, SHARES + 1, 0)
    for sizes in ({"tp": 2, "cp": 2}, {"dp": 2}):
        engine = Engine(sharding.place_model(decoder(), mesh(**sizes)), config, 78, 2)
        engine.add(PROMPTS)
        with (
            mock.patch.object(Engine, "_most_rounds", return_value=None),
            mock.patch.object(adaptive, "stays_best", return_value=three),
        ):
            engine.step()
        assert len(engine._limit(0)) == (1 if "dp" in sizes else 4)
        assert engine.read(0).counters.rounds == 3
        while engine.running:
            engine.step()
        assert [engine.read(slot).tokens for slot in range(2)] == alone()


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
    plain = {"mode": "autoregressive", "draft_policy": "all", "draft_share": None}
    for axis, change, words in (
        ("dp", {"prefill": "tiles"}, "prefill 'tiles' with a mesh axis dp"),
        ("cp", plain, "kv 'full'"),
    ):
        placed = sharding.place_model(decoder(), mesh(**{axis: 2}))
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


def plain_caches_over_devices() -> None:
    """Positions that are not coded are dealt in tiles, as coded ones are: the tokens are those of
    one device, whichever has the tile that a token falls into."""
    g, tiles, slots = 16, 6, 56  # slots of a device: 3 tiles, and some to spare
    alone = Program(ONE_LAYER, CacheConfig(tiles * g, g, "full", 1), 0)

    def start(change: Callable[[jax.Array], Any]) -> DecodeState:
        """Two sequences of 40 and 33 random tokens; it is donated."""
        state = random_state(alone, 2, 40, 64, 1 << 20)
        layers = jax.tree.map(change, state.cache.layers)
        cache = dataclasses.replace(state.cache, layers=layers, length=jnp.array([40, 33]))
        return dataclasses.replace(state, cache=cache)

    def deal(x: jax.Array) -> np.ndarray:
        dealt = np.zeros((*x.shape[:2], 2 * slots, x.shape[3]), x.dtype)
        for i in range(tiles):
            at = i % 2 * slots + i // 2 * g
            dealt[:, :, at : at + g] = x[:, :, i * g : (i + 1) * g]
        return dealt

    there, params = mesh(cp=2, tp=2), decoder().params
    over = Program(ONE_LAYER, CacheConfig(2 * slots - 1, g, "full", 1), 0, mesh=there)
    parts = sharding.place_state(start(deal), there)
    placed = sharding.place_params(ONE_LAYER, params, there)
    found = DECODE(placed, {}, parts, jnp.int32(36), program=over)  # to positions 76 and 69
    expected = DECODE(params, {}, start(jnp.copy), jnp.int32(36), program=alone)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert len(np.unique(expected.tokens)) > 10


def measured_over_devices() -> None:
    """`bench decode --mesh`: no device holds more than its share of weights, drafts and caches, and
    `--tune` has a step over all of them to measure."""
    sizes, tiny = {"tp": 2, "cp": 2}, dataclasses.replace(ONE_LAYER, max_context=4096)
    options = "--preset tiny --context 640 --mode full --rounds 3 --repeat 1 --dtype float32"
    options += " --draft-group 32 --draft-lm-head-bits 4 --mesh tp=2,cp=2 --tune --json"
    timed: list[float] = []

    def tune(step: tuning.Step) -> tuning.Found:
        seconds = step.timed(step.lower().compile())
        timed.extend(map(seconds, (1, 2)))  # the second has the state that the first one left
        return {}

    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out:
        patch.setitem(bench.PRESETS, "tiny", tiny)
        patch.setattr(bench, "read_ceiling", lambda: 1e11)
        patch.setattr(tuning, "tune", tune)
        with contextlib.redirect_stdout(out):
            assert cli.main(["bench", "decode", *options.split()]) == 0
        result = json.loads(out.getvalue())
        patch.setattr(jax, "process_count", lambda: 2)  # they would choose different ones
        with contextlib.redirect_stderr(out):
            all_of_them = options.replace("tp=2,cp=2", "dp=2,tp=2,cp=2")
            assert cli.main(["bench", "decode", *all_of_them.split()]) == 2
        assert "--tune is True; allowed: one process" in out.getvalue()
    assert (result["mesh"], len(result["devices"])) == (sizes, 4)
    assert len(timed) == 2
    assert min(timed) > 0
    params = init_params_over(tiny, jax.random.key(0), jnp.dtype("float32"), mesh(**sizes))
    for path, spec in parameter_shapes(tiny).items():
        check_split(flatten(params)[path], spec.axes, sizes)
    given = DraftConfig(group_size=32, lm_head_bits=4)
    draft = flatten(Model(tiny, params, draft=given).draft_params)
    for path, spec in parameter_shapes(tiny).items():
        if isinstance(draft[path], QuantizedWeight):
            check_split(draft[path].scale, spec.axes, sizes)
    (row,) = result["rows"]
    norms = 3 * tiny.hidden_size * 4  # lie whole on each device
    half = (parameter_count(tiny) * 4 - norms) // 2 + norms
    assert row["device_bytes"]["weights"] == half
    assert row["device_bytes"]["draft"] == draft_bytes(tiny, given) // 2
    assert row["device_bytes"]["cache"] < row["cache_bytes"] / 4 + 100
    coded = Program(tiny, CacheConfig(1024, 128), 4, mesh=mesh(**sizes))
    check_cache(bench.random_state(coded, 1, 640, 8, 8).cache, sizes)


def kernels_on_each_device() -> None:
    """Lowered for CUDA: the kernels are called inside the loop with a device's part of every
    array, and the devices meet as often as on a CPU: with top-pages, whose votes come from kernels,
    too, once more a round, to count what was read."""
    voting = {"page_votes", "most_voted"}
    for draft_policy, more, meetings in ((ALL, set(), 0), (TopPages(0.25), voting, 1)):
        names, operands, text = lowered_for_cuda(draft_policy)
        assert names == more | {
            *("add_rms_norm", "bf16_matmuls", "int4_matmuls", "kv_attention"),
            *("quantize_keys", "quantize_values", "kept"),
        }
        shapes, tp, cp = CUDA_SHAPES, 2, 2
        filtered = [of[0] for name, of in operands.items() if name.startswith("kept")]
        assert sorted(filtered) == [f"1x{s}x{shapes.vocab_size}xf32" for s in (1, 5)]  # whole rows
        h, k, d = shapes.num_heads, shapes.num_kv_heads, shapes.head_dim
        attention = [operands[name] for name in operands if name.startswith("kv_attention")]
        assert sorted(x[0] for x in attention) == [f"1x{s}x{h // tp}x{d}xbf16" for s in (1, 5)]
        for each in attention:
            assert f"1x{k // tp}x{16 // cp}x128x{d // 2}xui8" in each
        groups = shapes.intermediate_size // 64 // tp
        assert any(f"{groups}x{shapes.hidden_size // 16}x576xui8" in x for x in operands.values())
        parts = (
            rf"func\.func private @bf16_matmuls\w*\([^)]*\) -> tensor<1x5x{shapes.hidden_size}xf32>"
        )
        assert len(re.findall(parts, text)) == 2  # o's and down's, which are summed as they are
        layers = shapes.num_layers
        gathered = len(re.findall(r"stablehlo\.all_gather", text))
        reduced = len(re.findall(r"stablehlo\.all_reduce", text))
        # The verification, and the drafts, whose text is there once, or, from JAX 0.12 on, of each.
        passes = gathered // (layers + 1)
        assert passes == (5 if jax.__version_info__ >= (0, 12) else 2)
        assert gathered == passes * (layers + 1)
        assert reduced == passes * (2 * layers + 1) + meetings


def meetings_in_kernels() -> None:
    """Lowered for CUDA, for devices that reach each other's memory: all meetings of a pass are
    kernels': the sum of the embedding, those of each layer's o and down, which are part of the
    products, the merges of attention, and the logits of a draft. Those of a verification, which are
    many, are XLA's to gather."""
    names, operands, text = lowered_for_cuda(ALL, reached=True)
    assert names == {
        *("all_gather", "all_reduce", "bf16_matmuls", "int4_matmuls", "kv_attention", "merge"),
        *("quantize_keys", "quantize_values", "kept"),  # norms and RoPE are left to the products
    }
    assert "stablehlo.all_reduce" not in text
    shapes, table = CUDA_SHAPES, "1x1x1x6xui32"
    passes = 5 if jax.__version_info__ >= (0, 12) else 2  # each draft's text, or one's
    kinds = ("all_reduce", "merge", "all_gather")
    called = [len(re.findall(rf"call @{x}(_\d+)?\(", text)) for x in kinds]
    by_xla = len(re.findall(r"stablehlo\.all_gather", text))
    assert (*called[:2], called[2] + by_xla) == (passes, passes * shapes.num_layers, passes)
    taken = {name: of for name, of in operands.items() if table in of}
    for rows, kind in ((1, "int4_matmuls"), (5, "bf16_matmuls")):
        part, stream = (f"1x{rows}x{shapes.hidden_size}x{kind}" for kind in ("f32", "bf16"))
        heads = f"1x{rows}x{shapes.num_heads // 2}"
        assert [part, table] in taken.values()
        assert [f"{heads}x{shapes.head_dim}xf32", f"{heads}xf32", table] in taken.values()
        products = [of for name, of in taken.items() if name.startswith(kind)]
        assert len(products) == 2  # o and down
        assert all(stream in of for of in products)


def addresses_of_peers() -> None:
    """Each device has a row of its own, with where the mailboxes of its group lie."""
    over = mesh(dp=2, tp=2, cp=2)
    assert peers.addresses(over) == ()  # CPUs do not
    found = peers._addresses(over)
    assert set(found) == {"tp", "cp"}
    for axis, table in found.items():
        assert all(part.data.shape == (1, 1, 1, 6) for part in table.addressable_shards)
        words = np.asarray(table).reshape(2, 2, 2, 6)
        ranks = np.indices((2, 2, 2))[2 if axis == "tp" else 1]
        np.testing.assert_array_equal(words[..., 0], ranks)
        along = words if axis == "tp" else words.swapaxes(1, 2)
        np.testing.assert_array_equal(along[:, :, 0, 2:], np.roll(along[:, :, 1, 2:], 2, -1))
        assert len(np.unique(words[..., 2:].copy().view(np.uint64))) == 8


def lowered_for_cuda(
    draft_policy: Policy, reached: bool = False
) -> tuple[set[str], dict[str, list[str]], str]:
    """The decode loop over 2 × 2 devices: the kernels' names, each function's operands, and the
    text. reached: whether the devices have each other's addresses."""
    shapes, there = CUDA_SHAPES, mesh(tp=2, cp=2)
    cache = CacheConfig(2048, 128, "int8", 5, jnp.dtype("bfloat16"))
    program = Program(shapes, cache, 4, draft_policy, mesh=there)
    params = jax.eval_shape(lambda: init_params(shapes, jax.random.key(0), jnp.bfloat16))

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            tree,
            sharding.param_shardings(shapes, tree, there),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "device", lambda: lowered_loop.H200)
        drafted = DraftConfig(group_size=64, lm_head_bits=4)
        draft = jax.eval_shape(lambda p: draft_tree(p, quantize_params(p, drafted)), params)
        assert isinstance(draft["lm_head"]["kernel"], TiledWeight)
        state = bench.state_forms(program, 1, 1024)
        table = jax.ShapeDtypeStruct((1, 2, 2, 6), jnp.uint32)
        call = (place(params), place(draft), state, jnp.int32(5))
        call = (*call, {"tp": table, "cp": table}) if reached else call
        traced = DECODE.trace(*call, program=program)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        text = lowered_loop.without_copies(text)
    operands = {
        name: re.findall(r"tensor<([^>]*)>", found)
        for name, found in re.findall(r"func\.func private @(\w+)\((.*?)\) ->", text)
    }
    return set(lowered_loop.names(text)), operands, text


CHECKS = (
    *(parameters, packed_weights, tiled_weights, decode_state, refused, logits),
    drafts_in_whole_groups,
    *(heads_over_more_devices_than_there_are, tiles_and_heads_over_devices, prompts_in_tiles),
    *(no_device_has_more_than_its_share, states_lie_where_rounds_want_them),
    *(rounds_that_copy_over_devices, calls_end_early_over_devices),
    *(a_prompt_is_read_in_parts, refused_over_a_mesh),
    *(plain_caches_over_devices, measured_over_devices, kernels_on_each_device),
    *(meetings_in_kernels, addresses_of_peers),
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
    gc.freeze()  # what has been imported stays
    gc.set_threshold(20_000, 20, 20)
    print(json.dumps({check.__name__: wrong(check) for check in CHECKS}))
