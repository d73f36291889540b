"""Codecs: what all of them promise."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import G, decode, new_tokens, program, prompts, start

import quantspec_jax as qs
from pallas_kernels.kv_attention.read import Read
from quantspec_jax.cache import append, from_prompt
from quantspec_jax.cache.codecs import CODECS, VIEWS, codec_of
from quantspec_jax.cache.config import CacheConfig

LENGTHS = [67, 50, 96]


# Op by op they take four times as long.
_from_prompt = jax.jit(from_prompt, static_argnums=3)
_append = jax.jit(append)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _decoded(keys, values, view: str, group_size: int):
    return codec_of(view).decoded(keys, values, Read(view), group_size)


def tokens(length: int, scale: float = 1.0):
    rng = np.random.default_rng(3)
    return [scale * rng.normal(size=(1, 2, length, 16)).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_belongs_to_one_codec(view):
    assert [name for name, codec in CODECS.items() if view in codec.views] == [
        name for name, codec in CODECS.items() if codec is codec_of(view)
    ]


@pytest.mark.parametrize("view", VIEWS)
def test_coding_what_was_decoded_gives_the_same_again(view):
    """The views of the finest codes are what they code: a second time changes nothing more than the
    rounding of scales does."""
    keys, values = tokens(4 * G)
    once = _decoded(keys, values, view, G)
    twice = _decoded(*once, view, G)
    for x, first, second in zip((keys, values), once, twice, strict=True):
        error, more = (
            float(np.abs(np.asarray(a) - b).max()) for a, b in ((first, x), (second, first))
        )
        assert more <= error + 1e-6


@pytest.mark.parametrize("view", VIEWS)
def test_decoding_over_it_fills_the_cache_as_a_prompt_does(view):
    """A token is stored the same way whether it was in the prompt or is appended."""
    keys, values = tokens(41)
    config = CacheConfig(6 * G, G, view, 1)
    whole = _from_prompt(keys, values, jnp.asarray([41]), config)
    grown = _from_prompt(keys[:, :, :40], values[:, :, :40], jnp.asarray([40]), config)
    grown = _append(grown, keys[:, :, 40:], values[:, :, 40:], jnp.asarray([40]))
    slot = 40 % whole.key_buffer.shape[2]
    for name in ("key_buffer", "value_buffer"):
        one, other = (np.asarray(getattr(x, name), np.float32) for x in (whole, grown))
        np.testing.assert_array_equal(one[:, :, slot], other[:, :, slot])


def test_float8_takes_a_byte_a_number_and_ends_where_its_range_does():
    keys, values = tokens(40, scale=1000.0)
    layer = _from_prompt(keys, values, jnp.asarray([40]), CacheConfig(64, G, "float8", 1))
    assert layer.key_buffer.dtype == jnp.float8_e4m3fn
    stored = np.asarray(layer.key_buffer, np.float32)[:, :, :40]
    assert np.isfinite(stored).all()
    assert np.abs(stored).max() == 448
    inside = np.abs(np.asarray(keys)) < 440
    error = np.abs(stored - np.asarray(keys))[inside]
    assert (error <= np.abs(np.asarray(keys))[inside] / 16 + 2**-9).all()


def test_decoding_over_float8_goes_its_own_way_and_is_the_same_in_a_batch():
    p = program(0, "float8", width=1)
    rows = prompts(LENGTHS)
    together = new_tokens(decode(p, start(p, rows, LENGTHS, 40)))
    for i, length in enumerate(LENGTHS):
        alone = decode(p, start(p, rows[i : i + 1], [length], 40))
        assert new_tokens(alone)[0] == together[i]
    full = program(0, "full", width=1)
    assert together != new_tokens(decode(full, start(full, rows, LENGTHS, 40)))


def test_a_codec_without_a_coarser_view_drafts_nothing(one_layer_llama_dir):
    with pytest.raises(ValueError, match="view"):
        program(2, "float8")
    with pytest.raises(ValueError, match="kv is 'float8'; allowed: int8 in mode quantspec"):
        qs.GenerateConfig(kv="float8")
    model = qs.load(str(one_layer_llama_dir))
    config = qs.GenerateConfig(mode="autoregressive", kv="float8", max_new_tokens=5)
    assert qs.generate(model, [[5, 6, 7]], config).stats[0]["kv"] == "float8"
