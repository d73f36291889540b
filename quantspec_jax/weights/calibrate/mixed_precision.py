"""Mixed precision: the format of each layer, from how much its rounding costs.

One pass forwards and one backwards over a few tokens, a block at a time, with all layers rounded to
nearest: how fast KL(target ‖ draft) falls as one layer's weights move from the rounded ones to the
target's. Where the layers' errors are independent that is twice what its rounding costs.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.add_rms_norm.xla import rms_norm
from quantspec_jax.checks import require
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import unembed
from quantspec_jax.models.linear import unpacked
from quantspec_jax.models.parameters import LINEAR_LAYERS, Params, parameter_shapes
from quantspec_jax.weights.calibrate import streams
from quantspec_jax.weights.calibrate.programs import program
from quantspec_jax.weights.calibrate.streams import Block, Pair
from quantspec_jax.weights.formats import WeightFormat
from quantspec_jax.weights.rounding import quantize_linear

Formats = dict[str, WeightFormat]


def costs(
    config: ModelConfig, params: Params, tokens: jax.Array, formats: Formats
) -> dict[str, float]:
    """By layer: what its rounding costs in KL over the tokens int32 [chunks, S], in nats a token;
    0 where its format is the target's own weights."""
    found = dict.fromkeys(formats, 0.0)

    def rounded(i: int) -> tuple[Block, dict[str, jax.Array]]:
        block = params["layers"][str(i)]
        return block, _rounded(block, {n: formats[f"layers.{i}.{n}"] for n in LINEAR_LAYERS})

    for row in tokens:
        x = params["embedding"][row[None]].astype(jnp.float32)
        inputs = [Pair(x, x)]
        for i in range(config.num_layers):
            block, kernels = rounded(i)
            inputs.append(_block(config, block, kernels, inputs[-1]))
        slope = _output_slope(config, _head(params), inputs.pop())
        for i in reversed(range(config.num_layers)):
            block, kernels = rounded(i)  # again: kept, they would take the model's size
            falls, slope = _backwards(config, block, kernels, inputs.pop(), slope)
            for name, fall in falls.items():
                found[f"layers.{i}.{name}"] += float(fall) / 2 / tokens.size
    return found


def choose(
    config: ModelConfig,
    params: Params,
    formats: Formats,
    cost: dict[str, float],
    budget: float,
) -> Formats:
    """The formats of least cost whose mean is no more than `budget` bits a weight.

    A layer's cost in another format is in proportion to the squared error of rounding it. From the
    cheapest formats on, the step that gains most for its bits is taken until none fits.

    Args:
      formats: those that `cost` is for; only layers with 4 bits are given others.

    Raises:
      ValueError: the cheapest formats take more.
    """
    specs = parameter_shapes(config)
    kernels = {name: specs[f"{name}.kernel"] for name in formats}

    def bits(name: str, stored: WeightFormat) -> int:
        kin, n = kernels[name].shape
        return stored.stored_bits(kin, n)

    options = {}
    for name, stored in formats.items():
        if stored.bits == 4:
            kernel = params["layers"][name.split(".")[1]][name.split(".")[2]]["kernel"]
            plain = max(float(_rounding_error(kernel, stored)), 1e-30)
            options[name] = {
                other: max(cost[name], 0.0) * float(_rounding_error(kernel, other)) / plain
                for other in ladder(stored.symmetric)
            }
    check_budget(config, formats, budget)
    chosen = formats | {name: _cheapest(formats[name]) for name in options}
    weights = sum(spec.size for spec in kernels.values())
    left = int(budget * weights) - sum(bits(name, stored) for name, stored in chosen.items())
    while True:
        steps = [
            ((costs[chosen[name]] - costs[stored]) / more, name, stored, more)
            for name, costs in options.items()
            for stored in costs
            if 0 < (more := bits(name, stored) - bits(name, chosen[name])) <= left
        ]
        steps = [step for step in steps if step[0] > 0]
        if not steps:
            return chosen
        _, name, stored, more = max(steps, key=lambda step: step[0])
        chosen[name] = stored
        left -= more


def check_budget(config: ModelConfig, formats: Formats, budget: float) -> None:
    """ValueError where a mean of `budget` bits a weight cannot be reached."""
    specs = parameter_shapes(config)
    spent = weights = 0
    for name, stored in formats.items():
        spec = specs[f"{name}.kernel"]
        spent += _cheapest(stored).stored_bits(*spec.shape)
        weights += spec.size
    least = math.ceil(1000 * spent / weights) / 1000
    words = f"{least:g} or more, what these layers take in 4 bits"
    require(spent <= budget * weights, "draft average_bits", budget, words)


def _cheapest(stored: WeightFormat) -> WeightFormat:
    """The format of fewest bits that a layer may be given; other than 4 bits, its own."""
    return ladder(True)[0] if stored.bits == 4 else stored


def ladder(symmetric: bool) -> list[WeightFormat]:
    """The formats that mixed precision chooses from, that of fewest bits first."""
    kinds = (True,) if symmetric else (True, False)
    four = [WeightFormat(4, group, kind) for group in (128, 64) for kind in kinds]
    return [*four, WeightFormat(8, 128, symmetric=True)]


@program("stored")
def _restored(kernel: jax.Array, stored: WeightFormat) -> jax.Array:
    """A kernel [Kin, N] rounded to nearest, float32."""
    return unpacked(quantize_linear(kernel, stored), len(kernel))


@program("stored")
def _rounding_error(kernel: jax.Array, stored: WeightFormat) -> jax.Array:
    kernel = kernel.astype(jnp.float32)
    return jnp.sum((unpacked(quantize_linear(kernel, stored), len(kernel)) - kernel) ** 2)


def _head(params: Params) -> Params:
    return {name: params[name] for name in ("embedding", "final_norm", "lm_head") if name in params}


def _rounded(block: Block, formats: Formats) -> dict[str, jax.Array]:
    """The kernels [Kin, N] of a block rounded to nearest, in 4-bit formats; others as they are."""
    return {
        name: _restored(block[name]["kernel"], stored)
        if stored.bits == 4
        else block[name]["kernel"].astype(jnp.float32)
        for name, stored in formats.items()
    }


def _draft(config: ModelConfig, block: Block, kernels: Any, x: Pair) -> Pair:
    own = block | {name: block[name] | {"kernel": kernel} for name, kernel in kernels.items()}
    middle = streams.add(block["o"], own["o"], x, streams.attend(config, block, own, x))
    inputs = streams.gate(config, block, own, middle)
    return streams.add(block["down"], own["down"], middle, inputs)


_block = program("config")(_draft)


@program("config")
def _output_slope(config: ModelConfig, head: Params, x: Pair) -> jax.Array:
    """The gradient [1, S, E] of Σ KL(target ‖ draft) by the draft's stream after the last block."""

    def log_probs(y: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(
            unembed(head, rms_norm(y, head["final_norm"].astype(jnp.float32), config.rms_norm_eps))
        )

    target = log_probs(x.target)
    return jax.grad(lambda y: -jnp.sum(jnp.exp(target) * log_probs(y)))(x.draft)


@program("config")
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
