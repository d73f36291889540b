"""Launches of the decode loop as XLA compiles it for a GPU, on a machine without one, where
tests/pallas_kernels is on Python's path:

python tests/quantspec_jax/compiled_loop.py 9.0

A line for each draft policy and number of layers: launches of a round, and of a draft's step. It
takes JAX's CUDA plugin (`pip install .[assemble]`).
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from assembled import target
from jax.experimental import topologies
from pretend import pretend

from quantspec_jax.bench.decode import random_state
from quantspec_jax.bench.launches import Module, launches_a_round
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.engine.programs import DECODE
from quantspec_jax.generate.policies import policy
from quantspec_jax.generate.state import Program
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.module import init_params
from quantspec_jax.weights.entries import draft_tree, quantize_params
from quantspec_jax.weights.formats import DraftConfig

MODEL = ModelConfig("llama", 4096, 512, 1024, 3, 4, 2, 128, 8192)
CONTEXT, GAMMA = 4096, 4


def compiled(name: str, layers: int, device: jax.Device) -> str:
    """The optimized program of greedy decoding."""
    model = dataclasses.replace(MODEL, num_layers=layers)
    cache = CacheConfig(CONTEXT + 1024, 128, "int8", GAMMA + 1, jnp.dtype("bfloat16"))
    program = Program(model, cache, GAMMA, policy(name), sampled=False)
    draft = DraftConfig(group_size=64, lm_head_bits=4)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), jnp.bfloat16))
    own = jax.eval_shape(lambda x: draft_tree(x, quantize_params(x, draft)), params)
    state = jax.eval_shape(lambda: random_state(program, 1, CONTEXT, 128, 99))
    sharding = jax.sharding.SingleDeviceSharding(device)
    call = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, own, state, jax.ShapeDtypeStruct((), jnp.int32)),
    )
    traced = DECODE.trace(*call, program=program)
    return traced.lower(lowering_platforms=("cuda",)).compile().as_text()


def launches_of_a_draft_step(text: str) -> float:
    """Of the loop whose number of turns is γ."""
    module = Module(text)
    (loop,) = (x for found in module.computations.values() for x in found
               if x.kind == "while" and x.turns == GAMMA)  # fmt: skip
    return module.turn(loop, GAMMA)


def main() -> None:
    device = pretend(sys.argv[1])
    described = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=target(device)
    )
    for name in ("all", "window", "top-pages"):
        for layers in (2, 3):
            text = compiled(name, layers, described.devices[0])
            row = {"policy": name, "layers": layers, "round": launches_a_round(text, GAMMA)}
            print(json.dumps(row | {"draft_step": launches_of_a_draft_step(text)}), flush=True)


if __name__ == "__main__":
    main()
