"""Launches of the decode loop as XLA compiles it for an H200, on a machine without one, where
tests/pallas_kernels is on Python's path:

python tests/quantspec_jax/compiled_loop.py

A line for each draft policy, number of layers, γ, way to choose a token, number of copies, and
whether the call may end early: launches of a round of Qwen2.5-1.5B's shapes (where rounds copy, of
one that does and one that does not), and what is `read_ahead`. It takes JAX's CUDA plugin (`pip
install .[assemble]`).
"""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
from assembled import target
from jax.experimental import topologies
from pretend import pretend

from pallas_kernels import devices
from quantspec_jax.bench.decode import random_state
from quantspec_jax.bench.launches import Module, launches_a_round
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.engine.programs import DECODE
from quantspec_jax.generate.policies import policy
from quantspec_jax.generate.sampling import GREEDY, Warpers
from quantspec_jax.generate.state import Program
from quantspec_jax.models.module import init_params
from quantspec_jax.models.presets import PRESETS
from quantspec_jax.weights.entries import draft_tree, quantize_params
from quantspec_jax.weights.formats import DraftConfig

CONTEXT = 4096
WARPERS = {"greedy": GREEDY, "draws": Warpers(True, False, False), "top-p": Warpers(True, False)}
NAMES = ("policy", "layers", "gamma", "chosen", "copies", "early")
CASES = (
    *(
        (policy, layers, 4, "greedy", 0, False)
        for policy in ("all", "window", "top-pages")
        for layers in (2, 3)
    ),
    *(
        (policy, layers, 3, "greedy", 0, False)
        for policy in ("all", "top-pages")
        for layers in (2, 3)
    ),
    *(("all", 2, 4, chosen, 0, False) for chosen in ("draws", "top-p")),
    *(("all", layers, 4, "greedy", 7, False) for layers in (2, 3)),
    *(("all", 2, 4, "greedy", copies, True) for copies in (0, 7)),
)


def compiled(
    name: str, layers: int, gamma: int, chosen: str, copies: int, early: bool, device: jax.Device
) -> str:
    """The optimized program of decoding."""
    model = dataclasses.replace(PRESETS["qwen2.5-1.5b"], num_layers=layers)
    cache = CacheConfig(CONTEXT + 1024, 128, "int8", gamma + 1, jnp.dtype("bfloat16"))
    program = Program(model, cache, gamma, policy(name), warpers=WARPERS[chosen], lookup=copies)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), jnp.bfloat16))
    own = jax.eval_shape(lambda x: draft_tree(x, quantize_params(x, DraftConfig())), params)
    state = jax.eval_shape(lambda: random_state(program, 1, CONTEXT, 128, 99))
    sharding = jax.sharding.SingleDeviceSharding(device)
    call = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (params, own, state, jax.ShapeDtypeStruct((4,) if early else (), jnp.int32)),
    )
    traced = DECODE.trace(*call, program=program)
    return traced.lower(lowering_platforms=("cuda",)).compile().as_text()


def read_ahead(text: str, layers: int) -> dict[str, list[int]]:
    """Of products that finish heads and of attention: how many operands they may read while the
    launches before them end (their `ahead`), and how many of these are late, written after the
    attention of the layer before: such a read would be a race."""
    found = {"heads": [0, 0], "attention": [0, 0]}
    for operations in Module(text).computations.values():
        made = {re.match(r" +(?:ROOT )?%?([\w.\-]+) = ", x.line)[1]: x for x in operations}
        order = {name: i for i, name in enumerate(made)}

        def written(name: str, made=made, order=order) -> int:
            while made[name].kind in ("get-tuple-element", "bitcast"):
                (name,) = _operands(made[name].line)
            return -1 if made[name].kind in ("parameter", "constant") else order[name]

        attended, before = 0, -1
        for name, x in made.items():
            if x.kind != "custom-call":
                continue
            operands = _operands(x.line)
            if re.search(r"/kv_attention_(int4|int8|full)/", x.line):
                kind, early = "attention", operands[:2] + operands[5:]  # not queries and the buffer
            elif "_matmul/" in x.line and "output_to_operand_aliasing" in x.line:
                kind, early = "heads", operands[1:-2]  # not the stream and the buffer
            else:
                continue
            if attended % layers:
                found[kind][0] += len(early)
                found[kind][1] += sum(written(x) > before for x in early)
            if kind == "attention":
                attended, before = attended + 1, order[name]
    return found


def _operands(line: str) -> list[str]:
    """Names of an instruction's operands."""
    (inside,) = re.findall(r"(?:get-tuple-element|bitcast|custom-call)\(([^()]*)\)", line)[:1]
    return re.findall(r"%([\w.\-]+)", inside)


def main() -> None:
    device = pretend("9.0", like=devices.DEFAULT)
    described = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=target(device)
    )
    for case in CASES:
        text = compiled(*case, described.devices[0])
        named = dict(zip(NAMES, case, strict=True))
        counted = {"round": launches_a_round(text), "ahead": read_ahead(text, named["layers"])}
        print(json.dumps({"case": named} | counted), flush=True)


if __name__ == "__main__":
    main()
