"""The gradient of the loss on a text at every key and value: what Fisher-weighted methods weigh by.

A chunk goes up through the blocks, what each block reads is kept, and the gradient comes down the
same way, a block at a time: one program for all layers, and no more memory than a chunk needs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.rope_append.heads import rotate
from quantspec_jax.evaluate.teacher_forced import Stream, at_tokens, embedded, lm_head_of
from quantspec_jax.loading import Model
from quantspec_jax.methods import Layer
from quantspec_jax.models.attention import Tokens
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import block_params, run_block, unembed
from quantspec_jax.models.parameters import Params
from quantspec_jax.models.projection import Projection
from quantspec_jax.models.rope import rope_frequencies, rope_tables
from quantspec_jax.weights.calibrate.programs import program


def loss_gradients(model: Model, chunks: np.ndarray, *, progress: bool = False) -> list[Layer]:
    """Of tokens [chunks, length]: of each layer, at keys before RoPE and values, [chunks, length,
    K, D] bfloat16. Of a scaled RoPE's attention factor f the keys' lack f², the same for all."""
    found = [
        _chunk_gradients(model, chunk[None])
        for chunk in tqdm(chunks, desc="gradients", disable=not progress)
    ]
    layers = zip(*found, strict=True)
    return [Layer(*(jnp.concatenate(x) for x in zip(*layer, strict=True))) for layer in layers]


def _chunk_gradients(model: Model, tokens: np.ndarray) -> list[Layer]:
    config, ids = model.config, jnp.asarray(tokens)
    streams = [embedded(model.params, ids, config)]
    for i in range(config.num_layers):
        streams.append(_up(*block_params(model.params, i), streams[-1], config=config))
    gradient = _loss_gradient(lm_head_of(model.params), streams.pop(), ids)
    found = []
    for i in reversed(range(config.num_layers)):
        gradient, layer = _down(
            *block_params(model.params, i), streams.pop(), gradient, config=config
        )
        found.append(layer)
    return found[::-1]


@program()
def _loss_gradient(head: Params, stream: Stream, ids: jax.Array) -> Stream:
    """Of the summed negative log-likelihood of the tokens that follow."""

    def loss(h: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(unembed(head, h[0, :-1], "xla"))
        return -at_tokens(log_probs, ids[0, 1:]).sum()

    return Stream(jnp.zeros_like(stream.x), jax.grad(loss)(stream.h))


def _run(
    block: Params, norm: jax.Array, config: ModelConfig, stream: Stream, shift: Tokens | None
) -> Stream:
    """A block whose keys after RoPE and values are shifted."""

    def attend(_: None, heads: Projection) -> tuple[jax.Array, None]:
        q, k, v = heads.finished()
        if shift is not None:
            k, v = k + shift.keys, v + shift.values
        scale = config.head_dim**-0.5
        out = jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation="xla"
        )
        return out, None

    tables = _tables(config, stream.x.shape[1])
    x, h, _ = run_block(block, norm, config, *stream, tables, None, attend, backend="xla")
    return Stream(x, h)


def _tables(config: ModelConfig, length: int) -> tuple[jax.Array, jax.Array]:
    frequencies = rope_frequencies(config.rope, config.head_dim, length)
    return rope_tables(*frequencies, jnp.arange(length)[None])


@program("config")
def _up(block: Params, norm: jax.Array, stream: Stream, *, config: ModelConfig) -> Stream:
    return _run(block, norm, config, stream, None)


@program("config")
def _down(
    block: Params, norm: jax.Array, stream: Stream, gradient: Stream, *, config: ModelConfig
) -> tuple[Stream, Layer]:
    """The gradient at what a block reads, and at its keys and values."""
    shape = (*stream.x.shape[:2], config.num_kv_heads, config.head_dim)
    nothing = Tokens(*(jnp.zeros(shape, stream.h.dtype),) * 2)
    run = partial(_run, block, norm, config)
    _, pull = jax.vjp(run, stream, nothing)
    below, at = pull(gradient)
    cos, sin = _tables(config, stream.x.shape[1])
    keys = rotate(at.keys.astype(jnp.float32), cos, -sin)
    return below, Layer(keys.astype(jnp.bfloat16), at.values.astype(jnp.bfloat16))
