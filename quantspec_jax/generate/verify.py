"""One pass over the cache: the target's, and with another view and other weights the draft's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kv_attention.api import kv_attention
from pallas_kernels.kv_attention.read import Read
from quantspec_jax.cache import LayerCache, append
from quantspec_jax.generate.state import Program
from quantspec_jax.models.decoder import forward, unembed
from quantspec_jax.models.parameters import Params


def cache_pass(
    params: Params,
    program: Program,
    layers: tuple[LayerCache, ...],
    tokens: jax.Array,
    start: jax.Array,
    quantized_length: jax.Array,
    view: str,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Run S consecutive tokens of each sequence over the cache and append their keys and values.

    Args:
      tokens: [B, S] int32; start: [B] int32, position of the first.
      quantized_length: [B] int32, tokens to read from the planes.
      view: what to read of the planes, `int8` or `int4` (`full`: there are none).

    Returns:
      [B, S, N] float32 logits and the layers with S more tokens in their buffers.
    """
    sm_scale = program.model.head_dim**-0.5

    def attend(
        layer: LayerCache, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, Any]:
        layer = append(layer, k.swapaxes(1, 2), v.swapaxes(1, 2), start)
        out, _ = kv_attention(
            q,
            layer,
            quantized_length,
            start,
            read=Read(view),
            sm_scale=sm_scale,
            out_dtype=q.dtype,
            backend=program.backend,
        )
        return out, layer

    hidden, layers = forward(
        params,
        program.model,
        tokens,
        start[:, None] + jnp.arange(tokens.shape[1]),
        layers,
        attend,
        rope_length=program.cache.max_length,
        backend=program.backend,
    )
    return unembed(params, hidden, program.backend), layers


def verify(
    params: Params,
    program: Program,
    layers: tuple[LayerCache, ...],
    pending: jax.Array,
    proposals: jax.Array,
    start: jax.Array,
    quantized_length: jax.Array,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """The target on the pending token and the γ proposals, all at once.

    Args:
      pending: [B]; proposals: [B, γ]; start: [B], position of the pending token.

    Returns:
      [B, γ + 1, N] float32 logits, row i for position start + i + 1, and the layers.
    """
    b, gamma = proposals.shape
    padding = jnp.zeros((b, program.cache.pass_width - gamma - 1), jnp.int32)
    tokens = jnp.concatenate([pending[:, None], proposals, padding], 1)
    logits, layers = cache_pass(
        params, program, layers, tokens, start, quantized_length, program.cache.view
    )
    return logits[:, : gamma + 1], layers
