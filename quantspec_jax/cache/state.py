"""The cache's arrays, plain pytrees; of a layer, what the attention kernel takes (`LayerCache`)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

import jax

from pallas_kernels.layout import LayerCache

if TYPE_CHECKING:
    from quantspec_jax.cache.codecs import Codec


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "length", "quantized_length"],
    meta_fields=["group_size", "codec"],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """All layers, and per sequence how far they are filled.

    length            [B] int32, valid tokens
    quantized_length  [B] int32, tokens that are coded, a multiple of G
    group_size        G
    codec             how tokens lie in the layers
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array
    quantized_length: jax.Array
    group_size: int
    codec: Codec
