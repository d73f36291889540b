"""The parameter tree: which arrays a model has, their shapes and logical axes. Defined only here.

    embedding                      [N, E]
    layers.<i>.attention_norm      [E]
    layers.<i>.{q,k,v}.kernel      [E, H·D] or [E, K·D]     .bias where qkv_bias
    layers.<i>.{q,k}_norm          [D]                       where qk_norm
    layers.<i>.o.kernel            [H·D, E]                  .bias where output_bias
    layers.<i>.mlp_norm            [E]
    layers.<i>.{gate,up}.kernel    [E, F]                    .bias where mlp_bias
    layers.<i>.down.kernel         [F, E]                    .bias where mlp_bias
    final_norm                     [E]
    lm_head.kernel                 [E, N]                    absent where tie_embeddings

E hidden_size, F intermediate_size, the other letters as everywhere. Kernels are [in, out]. A path
is the dotted name above; `nest` makes the tree of dicts from a mapping by path, `flatten` inverts
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from quantspec_jax.models.config import ModelConfig

# The linear layers of a block: those that a draft may quantize, in the order they are applied.
LINEAR_LAYERS = ("q", "k", "v", "o", "gate", "up", "down")


class Spec(NamedTuple):
    """Shape of one parameter and the logical axis name of each of its dimensions."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def _linear(config: ModelConfig, name: str) -> tuple[tuple[int, int], tuple[str, str], bool]:
    """Kernel shape [in, out], axes and whether there is a bias, for one name of LINEAR_LAYERS."""
    embed = (config.hidden_size, "embed")
    heads = (config.num_heads * config.head_dim, "heads")
    kv_heads = (config.num_kv_heads * config.head_dim, "kv_heads")
    mlp = (config.intermediate_size, "mlp")
    (rows, row_axis), (columns, column_axis), bias = {
        "q": (embed, heads, config.qkv_bias),
        "k": (embed, kv_heads, config.qkv_bias),
        "v": (embed, kv_heads, config.qkv_bias),
        "o": (heads, embed, config.output_bias),
        "gate": (embed, mlp, config.mlp_bias),
        "up": (embed, mlp, config.mlp_bias),
        "down": (mlp, embed, config.mlp_bias),
    }[name]
    return (rows, columns), (row_axis, column_axis), bias


def layer_shapes(config: ModelConfig) -> dict[str, Spec]:
    """The parameters of one decoder layer by their path inside the layer."""
    norm = Spec((config.hidden_size,), ("embed",))
    head_norm = Spec((config.head_dim,), ("head_dim",))
    shapes = {"attention_norm": norm}
    for name in LINEAR_LAYERS:
        if name == "gate":
            shapes["mlp_norm"] = norm
        shape, axes, bias = _linear(config, name)
        shapes[f"{name}.kernel"] = Spec(shape, axes)
        if bias:
            shapes[f"{name}.bias"] = Spec(shape[1:], axes[1:])
        if name in ("q", "k") and config.qk_norm:
            shapes[f"{name}_norm"] = head_norm
    return shapes


def linear_layers(config: ModelConfig) -> list[str]:
    """Names of all linear layers of the blocks, such as `layers.3.down`."""
    return [f"layers.{i}.{name}" for i in range(config.num_layers) for name in LINEAR_LAYERS]


def parameter_shapes(config: ModelConfig) -> dict[str, Spec]:
    """Every parameter of the model by its dotted path, in the order of the computation."""
    vocab, embed = config.vocab_size, config.hidden_size
    shapes, layer = {"embedding": Spec((vocab, embed), ("vocab", "embed"))}, layer_shapes(config)
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{path}": spec for path, spec in layer.items()}
    shapes["final_norm"] = Spec((embed,), ("embed",))
    if not config.tie_embeddings:
        shapes["lm_head.kernel"] = Spec((embed, vocab), ("embed", "vocab"))
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """Elements of all parameters; a tied embedding counts once."""
    return sum(spec.size for spec in parameter_shapes(config).values())


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} → {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} → {"a.b": x}; whatever is not a dict (a QuantizedWeight, too) is a leaf."""
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(node, f"{path}.") if isinstance(node, Mapping) else {path: node}
    return flat


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`flatten` a path at a time, in the order of the paths: what is made when it is asked for is
    let go of before the next."""
    for name in sorted(tree):
        node, path = tree[name], f"{prefix}{name}"
        if isinstance(node, Mapping):
            yield from leaves(node, f"{path}.")
        else:
            yield path, node


class InTurn(Mapping[str, Any]):
    """Entries of a tree, each made when it is asked for and held by whoever asked alone."""

    def __init__(self, make: Mapping[str, Callable[[], Any]]):
        self._make = dict(make)

    def __getitem__(self, name: str) -> Any:
        return self._make[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._make

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


Params = dict[str, Any]


def check_params(config: ModelConfig, params: Params) -> None:
    """ValueError unless `params` has exactly the arrays that `config` describes."""
    given, wanted = flatten(params), parameter_shapes(config)
    for path in sorted(given.keys() ^ wanted.keys()):
        state = "missing" if path in wanted else "unknown"
        raise ValueError(f"params has {state} entry {path}; the config describes {len(wanted)}")
    for path, spec in wanted.items():
        if tuple(given[path].shape) != spec.shape:
            raise ValueError(f"params[{path}] has shape {given[path].shape}; allowed: {spec.shape}")
