"""KVSharer (arXiv 2410.18517): whole layers read the cache of another layer, the least alike first.

Distances of layers are those of their caches, after RoPE, in the mean over texts: ‖K̄_i − K̄_j‖ of a
head and position in the mean, and the same of V. From the greatest down, layer i reads layer j < i
where the last hidden states with and without it point alike: cosine above 0.5, over all positions.
The threshold is the authors'; that a quarter of the layers is replaced is recalled. Their average
of sentences of different lengths is of no use: here all are of one length. "Unlike is better" is
contested: `alike` goes up from the least distance, for comparison.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantspec_jax.methods.method import Layer, Method
from quantspec_jax.models.attention import causal_attention
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import forward
from quantspec_jax.models.linear import computed
from quantspec_jax.models.parameters import Params
from quantspec_jax.models.projection import Projection
from quantspec_jax.models.rope import rope_frequencies, rope_tables

TEXTS, LENGTH = 16, 64


def distances(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of each two of [L, positions, K, D]: [L, L]."""

    def between(x: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x[:, None] - x[None], axis=-1).mean((-2, -1))

    return (between(keys) + between(values)) / 2


def chosen(
    distance: np.ndarray, wanted: int, accepts: Any, *, alike: bool = False
) -> tuple[int, ...]:
    """The layer that each reads, itself or a lower one that reads itself; `accepts` such a map."""
    layers = len(distance)
    found = list(range(layers))
    pairs = [(i, j) for i in range(layers) for j in range(i)]
    for i, j in sorted(pairs, key=lambda pair: distance[pair], reverse=not alike):
        shared = sum(source != layer for layer, source in enumerate(found))
        if shared == wanted:
            break
        if found[i] != i or i in found[:i] + found[i + 1 :]:
            continue  # replaced once already, or read by another
        tried = [*found[:i], found[j], *found[i + 1 :]]
        if accepts(tuple(tried)):
            found = tried
    return tuple(found)


@partial(jax.jit, static_argnames="config")
def run(
    params: Params, tokens: jax.Array, sources: jax.Array, *, config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states [B, S, E] of a model whose layer l reads keys and values of layer sources[l],
    and all keys and values, [L, B, S, K, D]."""
    b, s = tokens.shape
    shape = (config.num_layers, b, s, config.num_kv_heads, config.head_dim)
    dtype = params["embedding"].dtype
    kept = [jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)]

    def attend(layer: int, heads: Projection) -> tuple[jax.Array, int]:
        q, *own = heads.finished()
        kept[:] = [x.at[layer].set(new) for x, new in zip(kept, own, strict=True)]
        keys, values = (x[sources[layer]] for x in kept)
        return causal_attention(q, keys, values, config.head_dim**-0.5), layer

    frequencies = rope_frequencies(config.rope, config.head_dim, s)
    rope = rope_tables(*frequencies, jnp.arange(s)[None])
    layers = range(config.num_layers)
    hidden, _ = forward(params, config, tokens, rope, layers, attend, backend="xla")
    return computed(hidden, "xla"), kept[0], kept[1]


@dataclasses.dataclass(frozen=True)
class KVSharer(Method):
    """shared: of the layers, that read another's cache; the others are in full precision. Here only
    what is older than the buffer is another layer's, as every method's is."""

    shared: float = 0.25
    threshold: float = 0.5
    alike: bool = False
    paired: bool = dataclasses.field(default=True, kw_only=True)

    def bits(self, model: ModelConfig, tokens: int) -> float:
        """Of the layers that keep their own."""
        return 16 * (1 - int(self.shared * model.num_layers) / model.num_layers)

    def read_bits(self, model: ModelConfig, tokens: int) -> float:
        """Every layer reads a whole cache."""
        return 16.0

    def partner(self, known: Any, layer: int, layers: int) -> int:
        """What the map says."""
        return int(known)

    def prepare(self, model: Any, chunks: Any) -> list[Any]:
        """The map."""
        config = model.config
        tokens = jnp.asarray(chunks()[:TEXTS, :LENGTH])
        whole, keys, values = run(
            model.params, tokens, jnp.arange(config.num_layers), config=config
        )

        def accepts(sources: tuple[int, ...]) -> bool:
            hidden, _, _ = run(model.params, tokens, jnp.asarray(sources), config=config)
            a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (whole, hidden))
            cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
            return bool(cosine.mean() > self.threshold)

        means = (np.asarray(x, np.float32).mean(1) for x in (keys, values))
        wanted = int(self.shared * config.num_layers)
        found = chosen(distances(*means), wanted, accepts, alike=self.alike)
        return [np.int32(source) for source in found]

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """The other layer's."""
        assert other is not None
        return other
