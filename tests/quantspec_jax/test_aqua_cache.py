"""Decoding from an AQUA-KV cache: what evaluation says of the method is what decoding does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantspec_jax as qs
from pallas_kernels.rope_append.heads import rotate
from quantspec_jax.engine.prepare import prepare
from quantspec_jax.evaluate import learned
from quantspec_jax.evaluate.codecs import Bench
from quantspec_jax.evaluate.teacher_forced import lm_head_of
from quantspec_jax.generate.prefill import prefill
from quantspec_jax.loading import LearnedKV
from quantspec_jax.methods import METHODS, Layer
from quantspec_jax.models.decoder import unembed
from quantspec_jax.stored_kv import StoredKV
from quantspec_jax.weights.formats import DraftConfig

G = 16
METHOD = METHODS["aqua-2"]


@pytest.fixture(scope="module")
def model(tiny_llama_dir):
    model = qs.load(tiny_llama_dir, dtype="float32", draft=DraftConfig(bits=None))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 48))
    model.kv = LearnedKV(
        StoredKV("aqua", 2), learned.calibrated(model.config, model.params, METHOD, tokens)
    )
    return model


def config(**changes) -> qs.GenerateConfig:
    options = {"mode": "autoregressive", "kv": "aqua", "group_size": G, "ignore_eos": True}
    return qs.GenerateConfig(**options | changes)


def test_logits_are_those_that_evaluation_has(model):
    """Of prompts that end before anything is coded; their lengths are such that they do not flush
    together. The cache takes what one in full precision does, and says so."""
    random = np.random.default_rng(1)
    prompts = [random.integers(0, model.config.vocab_size, n).tolist() for n in (20, 27)]
    out = qs.generate(model, prompts, config(max_new_tokens=60, logprobs=0))
    for prompt, tokens, rows in zip(prompts, out.tokens, out.logprobs, strict=True):
        ids = [*prompt, *tokens]
        expected = scores(model, ids, "aqua-2", model.kv.learned)
        at = np.arange(len(prompt) - 1, len(ids) - 1)
        np.testing.assert_allclose([row.own for row in rows], expected[at, tokens], atol=2e-4)
        np.testing.assert_array_equal(expected[at].argmax(-1), tokens)
    # The codes do say something else.
    assert np.abs(expected - scores(model, ids, "full"))[at].max() > 1e-2

    stats = out.stats[0]
    assert stats["kv"] == "aqua"
    assert stats["cache_bytes"]["buffer"] >= 2 * stats["cache_bytes"]["bf16_equivalent"]  # float32
    assert stats["cache_bytes"]["upper"] == 0


def scores(model, ids, method, known=None) -> np.ndarray:
    """Log-probabilities [T, N] after each token, by evaluation."""
    hidden, _ = Bench(model, ids, 2 * G, G).through(METHODS[method], known)
    return np.asarray(jax.nn.log_softmax(unembed(lm_head_of(model.params), hidden, "xla")[0]))


def test_of_a_prompt_what_the_next_position_reads_is_coded(model):
    prompt = np.random.default_rng(2).integers(0, model.config.vocab_size, 3 * G + 3)
    made = prepare(model, [prompt.tolist()], config(max_new_tokens=8))
    params = model.params_for(made.program.cache)
    run = jax.jit(prefill, static_argnames=("program", "capacity"))
    state = run(params, *made.inputs, program=made.program.prompt, capacity=made.capacity)
    assert state.cache.quantized_length == 2 * G
    rope = learned.whole_tables(model.config, len(prompt))
    below = None
    for known, layer, (keys, values) in zip(
        model.kv.learned,
        state.cache.layers,
        learned.activations(model, prompt[None]),
        strict=True,
    ):
        text = Layer(keys[0], values[0])
        below = METHOD.read(known, text, below)
        for x, exact, coded in (
            (layer.key_buffer, rotate(keys, *rope)[0], rotate(below.keys[None], *rope)[0]),
            (layer.value_buffer, values[0], below.values),
        ):
            held = x[0, :, : len(prompt)].swapaxes(0, 1)
            read = slice(METHOD.sinks, 2 * G)
            np.testing.assert_allclose(held[read], coded[read], atol=2e-4)
            for kept in (slice(0, METHOD.sinks), slice(2 * G, None)):
                # Sums in another order: how far they are apart depends on the processor.
                np.testing.assert_allclose(held[kept], exact[kept], atol=5e-6 * abs(exact).max())
            assert jnp.abs(coded - exact)[read].max() > 1e-2


def test_refusals(model):
    with pytest.raises(NotImplementedError, match="kv 'aqua' with prefill 'tiles'"):
        qs.generate(model, [[1, 2]], config(prefill="tiles"))
    with pytest.raises(ValueError, match="kv is 'aqua'; allowed: int8 in mode quantspec"):
        qs.GenerateConfig(kv="aqua")
    other = qs.Model(model.config, model.params, draft=DraftConfig(bits=None))
    with pytest.raises(ValueError, match="kv is 'aqua'; allowed: a checkpoint that"):
        qs.generate(other, [[1, 2]], config())
