"""Saved caches in AQUA-KV's codes: what is read of them is what the method says, in its bytes."""

from __future__ import annotations

import copy
import re

import jax
import numpy as np
import pytest
from safetensors import safe_open

import quantspec_jax as qs
from pallas_kernels.quantize_pack.xla import quantize_keys, quantize_values
from quantspec_jax.cache.tiles import values_of
from quantspec_jax.engine import at_rest, saved
from quantspec_jax.engine.prefixes import names
from quantspec_jax.evaluate import learned
from quantspec_jax.loading import LearnedKV
from quantspec_jax.methods import METHODS, Aqua, Layer, higgs
from quantspec_jax.models.config import ModelConfig, RopeConfig
from quantspec_jax.models.module import init_params
from quantspec_jax.models.rope import rope_frequencies
from quantspec_jax.stored_kv import StoredKV

G, L, K, D = 16, 3, 2, 16
N = K * D
FACTOR = 1.7  # of attention, on cos and sin
PLANES = qs.GenerateConfig(max_new_tokens=1, gamma=3, group_size=G, max_length=512)
FULL = qs.GenerateConfig(
    max_new_tokens=1, mode="autoregressive", kv="full", group_size=G, max_length=512
)
TILES = at_rest.AT_ONCE + 3
TEXT = np.random.default_rng(1).integers(0, 97, TILES * G + 3).tolist()


def stored(model: qs.Model, bits: int, seed: int = 0) -> qs.Model:
    """The model with predictors that it learned from random tokens."""
    model, tokens = copy.copy(model), np.random.default_rng(seed).integers(0, 97, (2, 64))
    fitted = learned.calibrated(model.config, model.params, METHODS[f"aqua-{bits}"], tokens)
    model.kv = LearnedKV(StoredKV("aqua", bits), fitted)
    return model


@pytest.fixture(scope="module")
def plain():
    """With YaRN: its factor makes keys after RoPE longer than those before."""
    rope = RopeConfig("yarn", factor=4.0, original_max_position=256, attention_factor=FACTOR)
    config = ModelConfig("llama", 97, 32, 64, L, 4, K, D, 1024, rope=rope)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    return qs.Model(config, params, None, qs.DraftConfig(group_size=32))


@pytest.fixture(scope="module")
def model(plain):
    return stored(plain, 2)


def session_of(model, config=PLANES, text=TEXT) -> qs.Session:
    session = qs.Session(model, config)
    session.generate(text)
    return session


@pytest.fixture(scope="module")
def session(model):
    return session_of(model)


@pytest.fixture(scope="module")
def file(session, tmp_path_factory):
    path = tmp_path_factory.mktemp("at-rest") / "a.safetensors"
    session.save(path, format="aqua")
    return path


def tiles(session: qs.Session, text=TEXT) -> list[dict[str, np.ndarray]]:
    return session.prefixes.find(names(text, G))


def whole(session: qs.Session) -> list[np.ndarray]:
    """Keys and values [L, K, T, D] of its tiles, as the target reads them."""
    parts = [map(np.asarray, values_of(tile)) for tile in tiles(session)]
    return [np.concatenate(x, 2) for x in zip(*parts, strict=True)]


def turned(keys: np.ndarray, config: ModelConfig, sign: int) -> np.ndarray:
    """RoPE on [L, K, T, D] from position 0, as complex numbers; −1 undoes it."""
    frequencies, factor = rope_frequencies(config.rope, D, PLANES.max_length)
    assert factor == FACTOR
    turn = (factor * np.exp(1j * np.arange(keys.shape[2])[:, None] * frequencies)) ** sign
    z = (keys[..., : D // 2] + 1j * keys[..., D // 2 :]) * turn
    return np.concatenate([z.real, z.imag], -1).astype(np.float32)


def expected(model, keys: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """What the method reads of them, layer by layer, and the first tokens as they are."""
    method = Aqua(model.kv.stored.bits, half=True)
    below, plain, read = None, turned(keys, model.config, -1), []
    for i, known in enumerate(model.kv.learned):
        text = Layer(*(jax.numpy.asarray(x[i].swapaxes(0, 1)) for x in (plain, values)))
        below = method.read(known, text, below)
        read.append([np.asarray(x).swapaxes(0, 1) for x in below])
    found = [np.stack(x) for x in zip(*read, strict=True)]
    found[0] = turned(found[0], model.config, 1)
    for x, exact in zip(found, (keys, values), strict=True):
        x[:, :, : method.sinks] = exact[:, :, : method.sinks]
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_read_is_what_the_method_says_in_its_bytes(plain, bits, tmp_path):
    """Of a cache in full precision, whose tiles hold what was decoded; a number may lie where two
    points are equally near."""
    model, path = stored(plain, bits), tmp_path / "a.safetensors"
    session = session_of(model, FULL)
    session.save(path, format="aqua")
    again = qs.Session.load(path, model, FULL)
    exact, found = whole(session), whole(again)
    assert found[0].shape == (L, K, TILES * G, D)
    for x, y in zip(found, expected(model, *exact), strict=True):
        same = np.isclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max()).all((0, 1, 3))
        assert same.mean() > 0.99
    for x, y in zip(found, exact, strict=True):
        np.testing.assert_array_equal(x[:, :, :4], y[:, :, :4])
        rest = np.s_[:, :, 4:]
        error = ((x[rest] - y[rest]) ** 2).sum() / (y[rest] ** 2).sum()
        assert 1e-5 < error < {2: 0.11, 3: 0.03, 4: 0.009}[bits]  # HIGGS' alone

    content = path.read_bytes()
    data = len(content) - 8 - int.from_bytes(content[:8], "little")
    codes = G * N * 2 * (4 + (L - 1) * bits) // 8  # keys and values; the first layer's have 4 bits
    scales = 2 * L * G * 2  # 2 bytes, of blocks of 32 channels: one a token
    assert data == TILES * (codes + scales) + 4 * 2 * L * 4 * N + 4 * len(again.tokens)


def test_planes_are_those_of_what_was_decoded(model, session, file):
    again = qs.Session.load(file, model, PLANES)
    keys, values = expected(model, *whole(session))
    wanted = (quantize_keys(keys, G), quantize_values(values, G))
    found = {name: np.concatenate([x[name] for x in tiles(again)], 2) for name in tiles(again)[0]}
    for part, planes in zip(("keys", "values"), wanted, strict=True):
        for name, x in planes._asdict().items():
            y, x = found[f"{part}.{name}"], np.asarray(x)
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
            assert (x == y).mean() > 0.98, (part, name)
    for x, y in zip(whole(again), (keys, values), strict=True):
        assert np.median(np.abs(x - y)) < np.abs(y).max() / 480  # half a step of 8 bits
    # The first tokens: within half a step of 8 bits of their own tile.
    steps = found["keys.scale"][:, :, 0, None], found["values.scale"][:, :, 0, 0, :4, None]
    for x, y, step in zip(whole(again), whole(session), steps, strict=True):
        assert (np.abs(x - y)[:, :, :4] <= step.astype(np.float32) / 31.9 + 1e-6).all()


def test_the_same_cache_makes_the_same_bytes_and_is_coded_once(model, session, file, tmp_path):
    """Saved again, loaded twice, and saved from there; what comes later leaves what was there."""
    session.save(tmp_path / "again", format="aqua")
    session_of(model).save(tmp_path / "anew", format="aqua")
    loaded = [qs.Session.load(file, model, PLANES) for _ in range(2)]
    assert [session.format, *(each.format for each in loaded)] == ["planes", "aqua", "aqua"]
    for one, other in zip(*map(tiles, loaded), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].base is None  # nothing holds its neighbours in memory
    loaded[0].save(tmp_path / "from there", format="aqua")
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {file.read_bytes()}

    loaded[1].generate([*TEXT, *TEXT[: 3 * G]])
    loaded[1].save(tmp_path / "longer", format="aqua")
    longer = qs.Session.load(tmp_path / "longer", model, PLANES)
    assert len(longer.prefixes) == TILES + 3
    for one, other in zip(tiles(loaded[0]), tiles(longer), strict=False):
        jax.tree.map(np.testing.assert_array_equal, dict(one), dict(other))


def test_both_modes_go_on_from_the_file(model, session, file):
    """Nothing that was saved is read again, and what is drafted from the loaded planes is what
    their target says."""
    question = [*TEXT, 5, 7, 11]
    options = {"max_new_tokens": 40, "group_size": G, "max_length": 512, "ignore_eos": True}
    quantspec = qs.GenerateConfig(gamma=3, **options)
    target = qs.GenerateConfig(mode="autoregressive", kv="int8", pass_width=4, **options)
    turns = [
        qs.Session.load(file, model, config).generate(question) for config in (quantspec, target)
    ]
    assert turns[0].tokens == turns[1].tokens
    assert turns[0].stats["proposed"] > 0
    never = session.generate(question)
    for turn in turns:
        assert turn.stats["cached_tokens"] == never.stats["cached_tokens"] > (TILES - 2) * G


def test_what_does_not_fit_is_refused_by_name(plain, model, session, file, tmp_path):
    def refused(words, call, error=ValueError):
        with pytest.raises(error, match=words):
            call()

    path = tmp_path / "a.safetensors"
    words = "format is 'zip'; allowed: planes, aqua"
    refused(words, lambda: session.save(path, format="zip"))
    words = "format is 'aqua'; allowed: planes; aqua of what `quantspec convert SOURCE OUT_DIR --kv"
    refused(words, lambda: session_of(plain, text=[1]).save(path, format="aqua"))
    assert not path.exists()

    def loads(other, config=PLANES):
        return lambda: qs.Session.load(file, other, config)

    refused(f"{re.escape(str(file))}: {words}", loads(plain))
    refused("of another calibration of AQUA-KV", loads(stored(plain, 2, seed=1)))
    refused("of bits 2, not 3", loads(stored(plain, 3)))
    tuned = qs.Model(plain.config, plain.params | {"final_norm": plain.params["final_norm"] * 2})
    tuned.kv = model.kv
    refused("another model's", loads(tuned))
    refused("of codec 'hierarchical', not 'full'", loads(model, FULL))


def test_a_later_version_is_refused_and_one_of_planes_needs_no_predictors(
    plain, model, session, file, tmp_path, monkeypatch
):
    path = tmp_path / "a.safetensors"
    session.save(path)
    assert qs.Session.load(path, plain, PLANES).tokens == session.tokens
    with safe_open(path, framework="np") as planes:
        assert "format" not in saved._about(path, planes.metadata())  # as it always was
    monkeypatch.setattr(at_rest, "VERSION", "aqua 2")
    with pytest.raises(ValueError, match="of version 'aqua 1', not 'aqua 2'"):
        qs.Session.load(file, model, PLANES)


def test_a_text_without_a_whole_tile_is_saved(model, tmp_path):
    session = session_of(model, text=[1, 2, 3])
    session.save(tmp_path / "a", format="aqua")
    again = qs.Session.load(tmp_path / "a", model, PLANES)
    assert (again.tokens, len(again.prefixes)) == (session.tokens, 0)


def test_a_flipped_bit_is_noticed_wherever_it_is(model, session, file, tmp_path):
    good, damaged = file.read_bytes(), tmp_path / "b.safetensors"
    cache, rng = session._engine.program.cache, np.random.default_rng(0)
    header = 8 + int.from_bytes(good[:8], "little")
    for place in [*rng.integers(0, header, 20), *rng.integers(header, len(good), 20)]:
        content = bytearray(good)
        content[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(damaged))):
            saved.load(damaged, model, cache)
    damaged.write_bytes(good)
    assert len(saved.load(damaged, model, cache).tiles) == TILES


def test_a_save_that_fails_in_the_middle_leaves_the_file_of_before(session, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    session.save(path)
    before = path.read_bytes()

    def interrupted(arrays, partial, metadata):
        partial.write_bytes(b"the beginning")
        raise KeyboardInterrupt

    monkeypatch.setattr(saved, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.save(path, format="aqua")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("width", [2, 3, 4])
def test_points_are_packed_without_a_bit_between_them(width):
    points = np.random.default_rng(0).integers(0, 4**width, (3, 40)).astype(np.uint8)
    packed = np.asarray(higgs.pack(points, width))
    assert packed.shape == (3, 40 * 2 * width // 8)
    bits = np.unpackbits(packed, axis=-1, bitorder="little").reshape(3, 40, 2 * width)
    np.testing.assert_array_equal(np.packbits(bits, -1, "little")[..., 0], points)
    np.testing.assert_array_equal(higgs.unpack(packed, width), points)
