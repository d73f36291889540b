"""ClusterKV (arXiv 2412.03213): keys that point alike are read together.

k-means of the keys after RoPE, by cosine; a query ranks clusters by its product with their mean
key and reads whole ones until a budget is full, the last in part. `ClusterKV` clusters a prompt as
its authors do, and what follows by itself, a tile at a time. `TileClusters` is this package's form:
clusters inside each tile, which a flush can make, and which streams. The rank of a cluster is by
the head of a group that wants it most: a selection a kv head, where the authors have one a query
head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quantspec_jax.methods.method import Layer
from quantspec_jax.methods.selection import EXACT, Selection, best_of_group
from quantspec_jax.models.config import ModelConfig

STEPS = 20  # of k-means, at most as in the authors' code
NO_SCORE = -1e30


class Clusters(NamedTuple):
    """label [K, T] of each token, mean [K, clusters, D] key of each cluster; one that has no token
    is never wanted."""

    label: jax.Array
    mean: jax.Array
    size: jax.Array


def clustered(keys: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of [N, D] keys: labels [N], mean keys [count, D] and sizes [count]. The first centroids are
    keys at even distances."""
    unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-20)
    start = unit[jnp.arange(count) * len(keys) // count]

    def label_of(centers: jax.Array) -> jax.Array:
        return jnp.argmax(jnp.matmul(unit, centers.T, precision=EXACT), -1)

    def total(x: jax.Array, label: jax.Array) -> jax.Array:
        member = (label[None] == jnp.arange(count)[:, None]).astype(jnp.float32)
        return jnp.matmul(member, x, precision=EXACT)

    def step(_: jax.Array, centers: jax.Array) -> jax.Array:
        found = total(unit, label_of(centers))
        norm = jnp.linalg.norm(found, axis=-1, keepdims=True)
        return jnp.where(norm > 0, found / jnp.where(norm > 0, norm, 1.0), centers)

    label = label_of(jax.lax.fori_loop(0, STEPS, step, start))
    size = total(jnp.ones((len(keys), 1)), label)
    return label, total(keys, label) / jnp.maximum(size, 1), size[:, 0]


def by_spans(keys: jax.Array, span: int, count: int) -> Clusters:
    """`count` clusters of each `span` of keys [T, K, D]; a last span that is not full is one of its
    own."""
    t, k, d = keys.shape
    spans = keys.swapaxes(0, 1).reshape(k, t // span, span, d)
    label, mean, size = jax.vmap(jax.vmap(lambda x: clustered(x, count)))(spans)
    label = label + (jnp.arange(t // span) * count)[None, :, None]
    return Clusters(label.reshape(k, t), mean.reshape(k, -1, d), size.reshape(k, -1))


@dataclasses.dataclass(frozen=True)
class _Clustered(Selection):
    first: int = 16
    whole_layers: int = 2

    def chosen(self, index: Any, q: jax.Array, bound: jax.Array) -> jax.Array:
        """Clusters in the order of their scores."""
        scores = best_of_group(q, index.mean)
        scores = jnp.where(index.size[:, None] > 0, scores, NO_SCORE)
        return self.within_budget(self._of_tokens(scores, index.label), bound)

    def _of_tokens(self, scores: jax.Array, label: jax.Array) -> jax.Array:
        shape = (*scores.shape[:2], label.shape[1])
        return jnp.take_along_axis(scores, jnp.broadcast_to(label[:, None], shape), -1)


@dataclasses.dataclass(frozen=True)
class TileClusters(_Clustered):
    """clusters: of each tile of `group_size` tokens."""

    clusters: int = 8

    def index(self, text: Layer, queries: jax.Array, prompt: int) -> Any:
        """Tile by tile."""
        return by_spans(text.keys, self.group_size, self.clusters)

    def index_bits(self, model: ModelConfig) -> float:
        """Mean keys in 16 bits a number, for the keys, half of the values."""
        return 16 * self.clusters / self.group_size / 2


@dataclasses.dataclass(frozen=True)
class ClusterKV(_Clustered):
    """tokens_a_cluster: of the prompt without its first tokens; of what comes later the authors
    make 8 clusters every 320 tokens, here 8 of every tile, which is what a flush has."""

    tokens_a_cluster: int = 80
    later_clusters: int = 8
    from_prompt: bool = dataclasses.field(default=True, kw_only=True)

    def index(self, text: Layer, queries: jax.Array, prompt: int) -> Any:
        """The prompt's clusters; the later tiles'; the first tokens are in none that counts."""
        count = max(1, prompt // self.tokens_a_cluster)
        first = min(self.first, prompt - 1)
        prompted = text.keys[first:prompt].swapaxes(0, 1)
        label, mean, size = jax.vmap(lambda x: clustered(x, count))(prompted)
        before = jnp.zeros((len(label), first), label.dtype)
        later = by_spans(text.keys[prompt:], self.group_size, self.later_clusters)
        return Clusters(
            jnp.concatenate([before, label, later.label + count], 1),
            jnp.concatenate([mean, later.mean], 1),
            jnp.concatenate([size, later.size], 1),
        )

    def index_bits(self, model: ModelConfig) -> float:
        """Mean keys in 16 bits a number, for the keys, half of the values."""
        return 16 / self.tokens_a_cluster / 2
