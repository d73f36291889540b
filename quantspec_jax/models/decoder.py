"""One decoder for the Llama family. What differs between families is data in `ModelConfig`.

`models.module.Decoder` is the NNX module that owns the parameters with their logical axis names; it
is split once, where a model is made, and everything after that is functions of plain arrays:

    tokens ─ embed ─┬─ norm ─ q k v ─ attend(layer i) ─ o ─ + ─ norm ─ SwiGLU ─ + ─┐
                    └────────────────────── L times ───────────────────────────────┘─ norm

`attend` is the caller's, from the products of q, k and v on: prefill, decoding over a cache,
evaluation and calibration differ in it alone. Calibration, which makes a layer's weights when it
has seen its inputs, takes a block in two parts, up to the inputs of o and up to those of down.
Layers are unrolled, so that each weight is an argument of its own and is read where it lies.

Of a pass of few rows a GPU runs a block in few launches (`models.linear`); the functions are the
same ones:

    norm, q k v, RoPE, buffer │ attention │ its merge │ o, + │ norm, gate up, SiLU │ down, +
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.add_rms_norm.xla import rms_norm
from pallas_kernels.bf16_matmul import api as bf16
from pallas_kernels.bf16_matmul.xla import matmul
from pallas_kernels.layout import PackedWeight
from quantspec_jax.axes import ONE, Axes
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.linear import (
    Activations,
    Normed,
    add_norm,
    apart_from_norm,
    computed,
    gated,
    precision,
    products,
)
from quantspec_jax.models.parameters import Params
from quantspec_jax.models.projection import Projection

# attend(state of layer i, its q, k and v) → (output [B,S,H,D], new state)
Attend = Callable[[Any, Projection], tuple[jax.Array, Any]]


def forward(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    layers: Sequence[Any],
    attend: Attend,
    *,
    backend: str = "auto",
    axes: Axes = ONE,
) -> tuple[Activations, tuple[Any, ...]]:
    """Run the decoder's blocks.

    Args:
      tokens: [B, S] int32.
      rope: cos and sin [B, S, 1, D] float32 at their positions (`rope_tables`).
      layers: L states, one for each layer, handed to `attend`.
      attend: attention of one layer.
      axes: over which devices the arrays are split.

    Returns:
      [B, S, E] hidden states after the final norm, which may be left to `unembed`, and the L new
      states.
    """
    x = _rows_of(params["embedding"], tokens, axes, backend)
    h: Activations = Normed(x, params["layers"]["0"]["attention_norm"], config.rms_norm_eps)
    new_layers = []
    for i, state in enumerate(layers):
        block, norm = block_params(params, i)
        x, h, state = _run_block(
            block, norm, config, x, h, rope, state, attend, backend=backend, axes=axes
        )
        new_layers.append(state)
    return h, tuple(new_layers)


def embed(
    params: Params, config: ModelConfig, tokens: jax.Array, axes: Axes = ONE
) -> tuple[jax.Array, jax.Array]:
    """[B, S] tokens → [B, S, E] residual stream, and its norm that the first block reads."""
    x = _rows_of(params["embedding"], tokens, axes)
    return x, rms_norm(x, params["layers"]["0"]["attention_norm"], config.rms_norm_eps)


def _rows_of(
    embedding: jax.Array, tokens: jax.Array, axes: Axes, backend: str = "auto"
) -> jax.Array:
    """Rows of a table of which each device has some."""
    if axes.tp == 1:
        return embedding[tokens]
    here = tokens - axes.part("tp") * len(embedding)
    rows = embedding.at[here].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return axes.summed(rows, backend=backend)


def block_params(params: Mapping[str, Any], i: int) -> tuple[Params, jax.Array]:
    """What `run_block` takes for block i: its parameters, and the norm that comes after it."""
    layers = params["layers"]
    following = layers.get(str(i + 1))
    norm = params["final_norm"] if following is None else following["attention_norm"]
    return layers[str(i)], norm


def run_block(
    block: Params,
    next_norm: jax.Array,
    config: ModelConfig,
    x: jax.Array,
    h: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    state: Any,
    attend: Attend,
    *,
    backend: str,
    axes: Axes = ONE,
) -> tuple[jax.Array, jax.Array, Any]:
    """One block: the residual stream x and its norm h, [B, S, E] → those after it, and the state
    that `attend` left."""
    x, left, state = _run_block(
        block, next_norm, config, x, h, rope, state, attend, backend=backend, axes=axes
    )
    return x, computed(left, backend), state


def _run_block(
    block: Params,
    next_norm: jax.Array,
    config: ModelConfig,
    x: jax.Array,
    h: Activations,
    rope: tuple[jax.Array, jax.Array],
    state: Any,
    attend: Attend,
    *,
    backend: str,
    axes: Axes,
) -> tuple[jax.Array, Activations, Any]:
    """As `run_block`; norms may be left to the products that read them."""
    eps = config.rms_norm_eps
    mixed, state = attention_part(block, config, h, rope, state, attend, backend=backend)
    x, h = add_norm(x, mixed, block["o"], block["mlp_norm"], eps, backend, axes)
    hidden = mlp_part(block, h, backend=backend)
    x, h = add_norm(x, hidden, block["down"], next_norm, eps, backend, axes)
    return x, h, state


def attention_part(
    block: Params,
    config: ModelConfig,
    h: Activations,
    rope: tuple[jax.Array, jax.Array],
    state: Any,
    attend: Attend,
    *,
    backend: str,
) -> tuple[jax.Array, Any]:
    """A block's normed stream [B, S, E] → the inputs [B, S, H·D] of its o, and the new state."""
    b, s = h.shape[:2]
    layers = block["q"], block["k"], block["v"]
    norms = (block["q_norm"], block["k_norm"]) if config.qk_norm else (None, None)
    projection = Projection(h, layers, norms, rope, config.head_dim, config.rms_norm_eps, backend)
    out, state = attend(state, projection)
    return out.astype(h.dtype).reshape(b, s, -1), state


def mlp_part(block: Params, h: Activations, *, backend: str) -> jax.Array:
    """A block's normed stream after attention [B, S, E] → the inputs [B, S, F] of its down."""
    return gated(h, block["gate"], block["up"], backend)


def unembed(
    params: Params, hidden: Activations, backend: str = "auto", axes: Axes = ONE
) -> jax.Array:
    """[..., E] hidden states → [..., N] float32 logits.

    A draft's lm_head may have, beside its packed `kernel`, the target's own rows [R, E] of the
    first R tokens as `first`: their logits come from those.
    """
    logits = axes.joined(_logits(params, hidden, backend), backend)
    first = params.get("lm_head", {}).get("first")
    if first is None:
        return logits
    own = _whole_product(hidden, first, True, backend)
    return jnp.concatenate([own, logits[..., own.shape[-1] :]], -1)


def _logits(params: Params, hidden: Activations, backend: str) -> jax.Array:
    """Those of this device's part of the vocabulary."""
    if "lm_head" in params and isinstance(params["lm_head"]["kernel"], PackedWeight):
        return products(hidden, [params["lm_head"]], backend)[0]
    tied = "lm_head" not in params
    weight = params["embedding"] if tied else params["lm_head"]["kernel"]
    return _whole_product(hidden, weight, tied, backend)


def _whole_product(hidden: Activations, weight: jax.Array, tied: bool, backend: str) -> jax.Array:
    """Hidden states times lm_head [E, N], or a tied embedding [N, E]: its second axis is contracted
    as it lies, so that nothing is transposed."""
    x, around = apart_from_norm(hidden)
    if bf16.takes(x, [weight], around, tied, backend):
        return bf16.bf16_matmuls(x, [weight], around, transposed=tied, backend=backend)[0]
    return matmul(computed(hidden, backend), weight, tied, jnp.float32, precision(x.dtype))
