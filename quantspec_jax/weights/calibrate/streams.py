"""Two streams through one block: the target's hidden states and the draft's, at the same tokens.

The draft's query at t reads the target's keys and values before t, from the upper plane of the
cache where decoding would have flushed them, and its own at t: as the draft will in use.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.add_rms_norm.xla import rms_norm
from pallas_kernels.int4_matmul.xla import dequantize
from pallas_kernels.kv_attention.xla import dequantize_keys, dequantize_values
from pallas_kernels.layout import QuantizedWeight
from pallas_kernels.quantize_pack.xla import quantize_keys, quantize_values
from quantspec_jax.models.attention import causal_attention
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.rope import rope_frequencies, rope_tables, rotate
from quantspec_jax.weights.calibrate.gptq import Moments

HIGHEST = jax.lax.Precision.HIGHEST
TILE = 128  # tokens a tile of the cache, and queries at a time
Block = dict[str, Any]


class Pair(NamedTuple):
    """The same activations [S, ...] in the target and in the draft."""

    target: jax.Array
    draft: jax.Array


def linear(x: jax.Array, weights: Block) -> jax.Array:
    y = jnp.matmul(x, weights["kernel"].astype(jnp.float32), precision=HIGHEST)
    return y + weights["bias"].astype(jnp.float32) if "bias" in weights else y


def moments(x: jax.Array, miss: jax.Array, weight: jax.Array) -> Moments:
    """Of inputs x [S, Kin] with what is missed [S, ...] and the tokens' weights [S]."""
    weighted = (x * weight[:, None]).T
    return Moments(*(jnp.matmul(weighted, y, precision=HIGHEST) for y in (x, miss)))


def restored(entry: dict[str, QuantizedWeight], kernel: jax.Array) -> jax.Array:
    """What an entry stands for: float32 [Kin, N], the shape of `kernel`."""
    return jnp.sum(jnp.stack([dequantize(plane) for plane in entry.values()]), 0)[: kernel.shape[0]]


def _norm(block: Block, name: str, x: Pair, config: ModelConfig) -> Pair:
    return Pair(*(rms_norm(y, block[name], config.rms_norm_eps) for y in x))


def _relative(x: Pair) -> jax.Array:
    """Weights [S] that make errors in the residual stream count relative to it, as the norms that
    read it do. A few tokens, the first of a text above all, have a stream a thousand times larger
    than the others."""
    return 1 / jnp.mean(x.target**2, -1)


@partial(jax.jit, static_argnames=("config", "norm"))
def input_moments(config: ModelConfig, block: Block, norm: str, x: Pair) -> Moments:
    """Of the inputs that q, k and v share, or gate and up: the stream after a norm."""
    h = _norm(block, norm, x, config)
    return moments(h.draft, h.target - h.draft, jnp.ones(len(h.draft)))


@partial(jax.jit, static_argnames="config")
def attend(config: ModelConfig, block: Block, own: Block, x: Pair) -> Pair:
    """The inputs [S, H·D] of o. `own`: the draft's q, k and v."""
    h = _norm(block, "attention_norm", x, config)
    s = x.draft.shape[0]
    cos, sin = rope_tables(
        *rope_frequencies(config.rope, config.head_dim, config.max_context), jnp.arange(s)[None]
    )

    def projected(h: jax.Array, weights: Block) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = (
            linear(h, weights[name]).reshape(1, s, -1, config.head_dim) for name in ("q", "k", "v")
        )
        if config.qk_norm:
            q = rms_norm(q, block["q_norm"], config.rms_norm_eps)
            k = rms_norm(k, block["k_norm"], config.rms_norm_eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    q, k, v = projected(h.target, block)
    target = causal_attention(q, k, v, config.head_dim**-0.5)
    draft = draft_attention(*projected(h.draft, own), k, v, config.head_dim**-0.5)
    return Pair(target.reshape(s, -1), draft.reshape(s, -1))


def draft_attention(
    q: jax.Array, own_k: jax.Array, own_v: jax.Array, k: jax.Array, v: jax.Array, sm_scale: float
) -> jax.Array:
    """[1, S, H, D] queries of the draft, its own keys and values [1, S, K, D] and the target's →
    [1, S, H, D]."""
    _, s, heads, d = q.shape
    kv_heads = k.shape[2]
    tiles = -(-s // TILE)

    def by_head(x: jax.Array) -> jax.Array:  # [1, S, N, D] → [N, tiles · TILE, D]
        return jnp.pad(x[0], ((0, tiles * TILE - s), (0, 0), (0, 0))).swapaxes(0, 1)

    k, v = by_head(k), by_head(v)
    coarse_k = dequantize_keys(quantize_keys(k[None], TILE), "int4")[0]
    coarse_v = dequantize_values(quantize_values(v[None], TILE), "int4")[0]

    def split(x: jax.Array) -> jax.Array:  # [N, T, D] → [tiles, K, N/K, TILE, D]
        x = x.reshape(kv_heads, -1, tiles, TILE, d)
        return jnp.moveaxis(x, 2, 0)

    def dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(equation, a, b, precision=HIGHEST)

    token = jnp.arange(tiles * TILE)

    def tile(inputs: tuple[jax.Array, ...]) -> jax.Array:
        i, q, own_k, own_v = inputs
        flushed = (token < TILE * (i - 1))[:, None]
        keys, values = jnp.where(flushed, coarse_k, k), jnp.where(flushed, coarse_v, v)
        before = token < (i * TILE + jnp.arange(TILE))[:, None]
        scores = dot("krsd,ktd->krst", q, keys) * sm_scale
        scores = jnp.where(before, scores, -jnp.inf)
        own = dot("krsd,kzsd->krs", q, own_k)[..., None] * sm_scale
        weights = jax.nn.softmax(jnp.concatenate([scores, own], -1))
        return dot("krst,ktd->krsd", weights[..., :-1], values) + weights[..., -1:] * own_v

    out = jax.lax.map(
        tile, (jnp.arange(tiles), split(by_head(q)), split(by_head(own_k)), split(by_head(own_v)))
    )
    out = jnp.moveaxis(out, 0, 2).reshape(heads, tiles * TILE, d)
    return out.swapaxes(0, 1)[None, :s]


@jax.jit
def output_moments(weights: Block, x: Pair, inputs: Pair) -> Moments:
    """Of the inputs of a layer, o or down, that adds to the residual stream x: where the draft's
    stream has drifted from the target's, the layer is to bring it back."""
    after = add(weights, weights, x, inputs)
    return moments(inputs.draft, after.target - after.draft, _relative(after))


@jax.jit
def add(weights: Block, own: Block, x: Pair, inputs: Pair) -> Pair:
    """The residual stream after o or down."""
    return Pair(x.target + linear(inputs.target, weights), x.draft + linear(inputs.draft, own))


@partial(jax.jit, static_argnames="config")
def gate(config: ModelConfig, block: Block, own: Block, x: Pair) -> Pair:
    """The inputs [S, F] of down. `own`: the draft's gate and up."""
    h = _norm(block, "mlp_norm", x, config)
    return Pair(
        *(
            jax.nn.silu(linear(y, weights["gate"])) * linear(y, weights["up"])
            for y, weights in ((h.target, block), (h.draft, own))
        )
    )
