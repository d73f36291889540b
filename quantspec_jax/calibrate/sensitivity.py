"""Mixed precision: which layers get 8 bits, from how much each layer's rounding costs.

One pass forwards and one backwards over a few tokens, a block at a time, with all layers rounded to
nearest: how fast KL(target ‖ draft) falls as one layer's weights move from the rounded ones to the
target's. Where the layers' errors are independent that is twice what its rounding costs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from quantspec_jax.calibrate import streams
from quantspec_jax.calibrate.streams import Block, Pair
from quantspec_jax.config import ModelConfig, WeightFormat, require
from quantspec_jax.draft import quantize_linear
from quantspec_jax.models.decoder import Params, rms_norm, unembed
from quantspec_jax.models.parameters import LINEAR_LAYERS, parameter_shapes

Formats = dict[str, WeightFormat]


def costs(
    config: ModelConfig, params: Params, tokens: jax.Array, formats: Formats
) -> dict[str, float]:
    """By layer: what its rounding costs in KL over the tokens int32 [chunks, S], in nats a token;
    0 where its format is the target's own weights."""
    found = dict.fromkeys(formats, 0.0)
    for row in tokens:
        x = params["embedding"][row].astype(jnp.float32)
        inputs = [Pair(x, x)]
        kernels = []
        for i in range(config.num_layers):
            block = params["layers"][str(i)]
            kernels.append(_rounded(block, {n: formats[f"layers.{i}.{n}"] for n in LINEAR_LAYERS}))
            inputs.append(_block(config, block, kernels[-1], inputs[-1]))
        slope = _output_slope(config, _head(params), inputs.pop())
        for i in reversed(range(config.num_layers)):
            block = params["layers"][str(i)]
            falls, slope = _backwards(config, block, kernels.pop(), inputs.pop(), slope)
            for name, fall in falls.items():
                found[f"layers.{i}.{name}"] += float(fall) / 2 / tokens.size
    return found


def choose(config: ModelConfig, formats: Formats, cost: dict[str, float], budget: float) -> Formats:
    """8 bits for the layers where a bit gains most, as long as the mean over all layers is no more
    than `budget` bits a weight.

    Raises:
      ValueError: `formats` alone take more.
    """
    shapes = {name: parameter_shapes(config)[f"{name}.kernel"].shape for name in formats}
    chosen = dict(formats)
    weights = sum(a * b for a, b in shapes.values())
    spent = sum(formats[name].stored_bits(*shape) for name, shape in shapes.items())
    left = budget * weights - spent
    require(
        left >= 0, "draft average_bits", budget, f"{spent / weights:.4f} or more, what 4 bits take"
    )

    def wide(name: str) -> WeightFormat:
        return WeightFormat(8, formats[name].group_size, formats[name].symmetric)

    def more(name: str) -> int:
        return wide(name).stored_bits(*shapes[name]) - formats[name].stored_bits(*shapes[name])

    four = [name for name in formats if formats[name].bits == 4]
    for name in sorted(four, key=lambda name: -cost[name] / more(name)):
        if cost[name] > 0 and more(name) <= left:
            chosen[name] = wide(name)
            left -= more(name)
    return chosen


def _head(params: Params) -> Params:
    return {name: params[name] for name in ("embedding", "final_norm", "lm_head") if name in params}


def _rounded(block: Block, formats: Formats) -> dict[str, jax.Array]:
    """The kernels [Kin, N] of a block rounded to nearest, in 4-bit formats; others as they are."""
    return {
        name: streams.restored(
            quantize_linear(block[name]["kernel"], stored), block[name]["kernel"]
        )
        if stored.bits == 4
        else block[name]["kernel"].astype(jnp.float32)
        for name, stored in formats.items()
    }


def _draft(config: ModelConfig, block: Block, kernels: Any, x: Pair) -> jax.Array:
    own = {name: block[name] | {"kernel": kernel} for name, kernel in kernels.items()}
    middle = streams.add(block["o"], own["o"], x, streams.attend(config, block, own, x))
    inputs = streams.gate(config, block, own, middle)
    return streams.add(block["down"], own["down"], middle, inputs)


_block = jax.jit(_draft, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _output_slope(config: ModelConfig, head: Params, x: Pair) -> jax.Array:
    """The gradient [S, E] of Σ KL(target ‖ draft) by the draft's stream after the last block."""

    def log_probs(y: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(
            unembed(head, rms_norm(y, head["final_norm"].astype(jnp.float32), config.rms_norm_eps))
        )

    target = log_probs(x.target)
    return jax.grad(lambda y: -jnp.sum(jnp.exp(target) * log_probs(y)))(x.draft)


@partial(jax.jit, static_argnums=0)
def _backwards(config: ModelConfig, block: Block, kernels: Any, x: Pair, slope: jax.Array):
    """By layer how fast the KL falls, and the gradient by the draft's stream before the block."""

    def draft(kernels: Any, y: jax.Array) -> jax.Array:
        return _draft(config, block, kernels, Pair(x.target, y)).draft

    _, pull = jax.vjp(draft, kernels, x.draft)
    gradients, before = pull(slope)
    falls = {
        name: jnp.sum(gradients[name] * (kernels[name] - block[name]["kernel"])) for name in kernels
    }
    return falls, before
