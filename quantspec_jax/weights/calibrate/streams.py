"""Two streams through one block: the target's hidden states and the draft's, at the same tokens.

The draft's query at t reads the target's keys and values before t, as its view of the cache has
them where decoding would have flushed them, and its own at t: as the draft will in use. What is
added here to a block are the moments of its layers' inputs.

All numbers are float32. Chunks of the text, the first axis, go through one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.add_rms_norm.xla import rms_norm
from pallas_kernels.kv_attention.read import Read
from quantspec_jax.cache.codecs import CODECS
from quantspec_jax.cache.sequence import attend_text
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import attention_part, mlp_part
from quantspec_jax.models.linear import linear
from quantspec_jax.models.rope import rope_frequencies, rope_tables
from quantspec_jax.weights.calibrate.gptq import HIGHEST, Moments
from quantspec_jax.weights.calibrate.programs import program

READ, GROUP_SIZE = CODECS["hierarchical"].draft, 128  # what the draft reads of the cache
Block = dict[str, Any]


class Pair(NamedTuple):
    """The same activations [chunks, S, ...] in the target and in the draft."""

    target: jax.Array
    draft: jax.Array


def wide(block: Block) -> Block:
    """Parameters in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), block)


def _by_chunk(function: Callable[..., Pair], *pairs: Pair) -> Pair:
    """`function` of a chunk of each, [1, S, ...]."""

    def one(chunk: Any) -> Pair:
        found = function(*(Pair(x.target[None], x.draft[None]) for x in chunk))
        return Pair(found.target[0], found.draft[0])

    return jax.lax.map(one, pairs)


def _summed(function: Callable[..., Moments], *pairs: Pair) -> Moments:
    """Sum over the chunks of `function` of a chunk of each, [S, ...]."""

    def add(total: Moments, chunk: Any) -> tuple[Moments, None]:
        return jax.tree.map(jnp.add, total, function(*chunk)), None

    first = jax.tree.map(lambda x: x[0], pairs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first))
    return jax.lax.scan(add, zeros, pairs)[0]


def _moments(x: jax.Array, miss: jax.Array, weight: jax.Array) -> Moments:
    """Of inputs x [S, Kin] with what is missed [S, ...] and the tokens' weights [S]."""
    weighted = (x * weight[:, None]).T
    return Moments(*(jnp.matmul(weighted, y, precision=HIGHEST) for y in (x, miss)))


def _norm(norm: jax.Array, x: Pair, config: ModelConfig) -> Pair:
    return Pair(*(rms_norm(y, norm, config.rms_norm_eps) for y in x))


@program("config")
def input_moments(config: ModelConfig, norm: jax.Array, x: Pair) -> Moments:
    """Of the inputs that q, k and v share, or gate and up: the stream after a norm."""

    def of_chunk(x: Pair) -> Moments:
        h = _norm(norm, x, config)
        return _moments(h.draft, h.target - h.draft, jnp.ones(len(h.draft)))

    return _summed(of_chunk, x)


@program()
def output_moments(weights: Block, x: Pair, inputs: Pair) -> Moments:
    """Of the inputs of a layer, o or down, that adds to the residual stream x: where the draft's
    stream has drifted from the target's, the layer is to bring it back.

    Tokens' weights make errors in the stream count relative to it, as the norms that read it do. A
    few tokens, the first of a text above all, have a stream a thousand times larger than the
    others.
    """
    weights = wide(weights)

    def of_chunk(x: Pair, inputs: Pair) -> Moments:
        after = add(weights, weights, x, inputs)
        relative = 1 / jnp.mean(after.target**2, -1)
        return _moments(inputs.draft, after.target - after.draft, relative)

    return _summed(of_chunk, x, inputs)


def attend(config: ModelConfig, block: Block, own: Block, x: Pair) -> Pair:
    """The inputs [chunks, S, H·D] of o. `own`: the draft's block, of which q, k and v are read."""
    block, own = wide(block), wide(own)
    frequencies = rope_frequencies(config.rope, config.head_dim, config.max_context)
    rope = rope_tables(*frequencies, jnp.arange(x.draft.shape[1])[None])

    def part(block: Block, h: jax.Array, past: Any, read: Read) -> tuple[jax.Array, Any]:
        reads = attend_text(read, GROUP_SIZE, config.head_dim**-0.5)
        return attention_part(block, config, h, rope, past, reads, backend="xla")

    def of_chunk(x: Pair) -> Pair:
        h = _norm(block["attention_norm"], x, config)
        target, past = part(block, h.target, None, Read("full"))
        return Pair(target, part(own, h.draft, past, READ)[0])

    return _by_chunk(of_chunk, x)


def gate(config: ModelConfig, block: Block, own: Block, x: Pair) -> Pair:
    """The inputs [chunks, S, F] of down. `own`: the draft's block, of which gate and up are
    read."""
    block, own = wide(block), wide(own)

    def of_chunk(x: Pair) -> Pair:
        h = _norm(block["mlp_norm"], x, config)
        both = zip((block, own), h, strict=True)
        return Pair(*(mlp_part(weights, y, backend="xla") for weights, y in both))

    return _by_chunk(of_chunk, x)


def add(weights: Block, own: Block, x: Pair, inputs: Pair) -> Pair:
    """The residual stream after o or down."""
    weights, own = wide(weights), wide(own)
    return Pair(
        x.target + linear(inputs.target, weights, "xla"),
        x.draft + linear(inputs.draft, own, "xla"),
    )
