"""One decoder for the Llama family. What differs between families is data in `ModelConfig`.

`Decoder` is the NNX module that owns the parameters with their logical axis names; it is split
once, where a model is made, and everything after that is functions of plain arrays:

    tokens ─ embed ─┬─ norm ─ q k v ─ RoPE ─ attend(layer i) ─ o ─ + ─ norm ─ SwiGLU ─ + ─┐
                    └────────────────────── L times ──────────────────────────────────────┘─ norm

`attend` is the caller's: prefill, decoding over a cache and evaluation differ in it alone. Layers
are unrolled, so that each weight is an argument of its own and is read where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.add_rms_norm.api import add_rms_norm
from pallas_kernels.add_rms_norm.reference import rms_norm
from pallas_kernels.int4_matmul.api import int4_matmuls
from pallas_kernels.layout import PackedWeight
from quantspec_jax.config import ModelConfig
from quantspec_jax.dtypes import FLOAT32
from quantspec_jax.models.parameters import Spec, flatten, nest, parameter_shapes
from quantspec_jax.models.rope import rope_frequencies, rope_tables, rotate

Params = dict[str, Any]
# attend(state of layer i, q [B,S,H,D], k [B,S,K,D], v [B,S,K,D]) → (output [B,S,H,D], new state)
Attend = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Decoder(nnx.Module):
    """The parameters of a decoder, made at random: normal with standard deviation 0.02, norms 1,
    biases 0 (to load a checkpoint, only the tree matters)."""

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        tree = nest(
            {
                path: nnx.Param(
                    _initial(path, spec, dtype, rngs),
                    out_sharding=spec.axes,
                    eager_sharding=False,
                )
                for path, spec in parameter_shapes(config).items()
            }
        )
        for name, node in tree.items():
            setattr(self, name, _as_module(node))


def _initial(path: str, spec: Spec, dtype: Any, rngs: nnx.Rngs) -> jax.Array:
    if path.endswith("norm"):
        return jnp.ones(spec.shape, dtype)
    if path.endswith("bias"):
        return jnp.zeros(spec.shape, dtype)
    return 0.02 * jax.random.normal(rngs.params(), spec.shape, dtype)


def _as_module(node: Any) -> Any:
    if isinstance(node, dict):
        return nnx.Dict({name: _as_module(child) for name, child in node.items()})
    return node


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters as a tree of plain arrays."""
    state = nnx.split(Decoder(config, dtype=dtype, rngs=nnx.Rngs(params=key)))[1]
    return nest({".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)})


def logical_axes(config: ModelConfig) -> Params:
    """The tree of parameters with a tuple of logical axis names in place of each array."""
    return nest({path: spec.axes for path, spec in parameter_shapes(config).items()})


def check_params(config: ModelConfig, params: Params) -> None:
    """ValueError unless `params` has exactly the arrays that `config` describes."""
    given, wanted = flatten(params), parameter_shapes(config)
    for path in sorted(given.keys() ^ wanted.keys()):
        state = "missing" if path in wanted else "unknown"
        raise ValueError(f"params has {state} entry {path}; the config describes {len(wanted)}")
    for path, spec in wanted.items():
        if tuple(given[path].shape) != spec.shape:
            raise ValueError(f"params[{path}] has shape {given[path].shape}; allowed: {spec.shape}")


def precision(dtype: np.dtype) -> jax.lax.Precision | None:
    """float32 models multiply in float32 on every backend (a GPU's default is TF32)."""
    return jax.lax.Precision.HIGHEST if dtype == FLOAT32 else None


def linear(x: jax.Array, weights: Params, backend: str) -> jax.Array:
    """[..., Kin] → [..., N] in x's type, or float32."""
    return _add_bias(_products(x, [weights], backend, x.dtype)[0], weights)


def linears(x: jax.Array, layers: Sequence[Params], backend: str) -> list[jax.Array]:
    """Several linear layers of the same input: [..., Kin] → [..., N] each, in x's type.

    A layer's `kernel` is an array or a `PackedWeight`; beside the latter there may be
    `residual`, a second one whose product adds to its own, and `order`, int32 [Kin]: the kernel's
    input channel i is channel order[i] of x. `bias` is added to either.
    """
    return [
        _add_bias(y, weights).astype(x.dtype)
        for y, weights in zip(_products(x, layers, backend, x.dtype), layers, strict=True)
    ]


def _add_bias(y: jax.Array, weights: Params) -> jax.Array:
    return y + weights["bias"].astype(y.dtype) if "bias" in weights else y


def _products(
    x: jax.Array, layers: Sequence[Params], backend: str, out_dtype: Any = jnp.float32
) -> list[jax.Array]:
    """x times each layer's kernel; of packed ones float32, or `out_dtype` where nothing is to be
    added. All packed ones that read x in the same order are one call."""
    products: list[jax.Array | None] = [None] * len(layers)
    for i, weights in enumerate(layers):
        if products[i] is not None:
            continue
        if not isinstance(weights["kernel"], PackedWeight):
            products[i] = jnp.matmul(x, weights["kernel"], precision=precision(x.dtype))
            continue
        order = weights.get("order")
        together = [
            j
            for j, other in enumerate(layers)
            if isinstance(other["kernel"], PackedWeight) and other.get("order") is order
        ]
        found = _packed_products(x, [layers[j] for j in together], order, backend, out_dtype)
        for j, y in zip(together, found, strict=True):
            products[j] = y
    return products  # type: ignore[return-value]


def _packed_products(
    x: jax.Array,
    layers: Sequence[Params],
    order: jax.Array | None,
    backend: str,
    out_dtype: Any,
) -> list[jax.Array]:
    """x, its channels in `order`, times layers of one or two 4-bit planes, in one call."""
    if order is not None:
        x = x.at[..., order].get(mode="promise_in_bounds", unique_indices=True)
    planes = [
        weights[name] for weights in layers for name in ("kernel", "residual") if name in weights
    ]
    if any("residual" in weights or "bias" in weights for weights in layers):
        out_dtype = jnp.float32
    found = iter(int4_matmuls(x, planes, out_dtype=out_dtype, backend=backend))
    return [
        next(found) + next(found) if "residual" in weights else next(found) for weights in layers
    ]


def forward(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    layers: Sequence[Any],
    attend: Attend,
    *,
    rope_length: int,
    backend: str = "auto",
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Run the decoder's blocks.

    Args:
      tokens, positions: [B, S] int32.
      layers: L states, one for each layer, handed to `attend`.
      attend: attention of one layer; gets q and k after RoPE.
      rope_length: tokens the generation is allocated for (`rope_frequencies`).

    Returns:
      [B, S, E] hidden states after the final norm, and the L new states.
    """
    rope = rope_tables(*rope_frequencies(config.rope, config.head_dim, rope_length), positions)
    x, h = embed(params, config, tokens)
    new_layers = []
    for i, state in enumerate(layers):
        block, norm = block_params(params, i)
        x, h, state = run_block(block, norm, config, x, h, rope, state, attend, backend=backend)
        new_layers.append(state)
    return h, tuple(new_layers)


def embed(params: Params, config: ModelConfig, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, S] tokens → [B, S, E] residual stream, and its norm that the first block reads."""
    x = params["embedding"][tokens]
    return x, rms_norm(x, params["layers"]["0"]["attention_norm"], config.rms_norm_eps)


def block_params(params: Params, i: int) -> tuple[Params, jax.Array]:
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
) -> tuple[jax.Array, jax.Array, Any]:
    """One block: the residual stream x and its norm h, [B, S, E] → those after it, and the state
    that `attend` left. Each sum of the stream is normed where it is made, in one kernel."""
    b, s = x.shape[:2]

    def heads(y: jax.Array) -> jax.Array:
        return y.reshape(b, s, -1, config.head_dim)

    def add_norm(x: jax.Array, y: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return add_rms_norm(x, y, weight, config.rms_norm_eps, backend=backend)

    q, k, v = map(heads, linears(h, [block[name] for name in ("q", "k", "v")], backend))
    if config.qk_norm:
        q = rms_norm(q, block["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, block["k_norm"], config.rms_norm_eps)
    out, state = attend(state, rotate(q, *rope), rotate(k, *rope), v)
    y = linear(out.astype(x.dtype).reshape(b, s, -1), block["o"], backend)
    x, h = add_norm(x, y, block["mlp_norm"])
    gate, up = linears(h, [block["gate"], block["up"]], backend)
    x, h = add_norm(x, linear(jax.nn.silu(gate) * up, block["down"], backend), next_norm)
    return x, h, state


def unembed(params: Params, hidden: jax.Array, backend: str = "auto") -> jax.Array:
    """[..., E] hidden states → [..., N] float32 logits."""
    if "lm_head" in params and isinstance(params["lm_head"]["kernel"], PackedWeight):
        return _products(hidden, [params["lm_head"]], backend)[0]
    # A tied embedding is [N, E]: contract its second axis, so that nothing is transposed.
    weight, axis = (
        (params["lm_head"]["kernel"], 0) if "lm_head" in params else (params["embedding"], 1)
    )
    return jax.lax.dot_general(
        hidden,
        weight,
        (((hidden.ndim - 1,), (axis,)), ((), ())),
        precision=precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
