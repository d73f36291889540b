"""Methods that compress a cache, a file each beside its paper, in one harness.

A method says what a position reads of the tokens before it, given a text's keys and values; the
cache of decoding is none of its business (`quantspec_jax.cache.codecs` is). `quantspec eval codecs`
measures all of them on the same model, text and schedule, as the cache that is decoded from and as
a draft's. A new one is a class and a line in `METHODS`.

    method      the protocol

    codes       planes      this package's own views, and none: full, int8, int4
                kivi        groups along the channel for keys, along the token for values
                higgs       Hadamard rotation and a grid that is best for normal numbers
                aqua        predictors across layers, HIGGS for what they leave
                kvquant     non-uniform codes, weighed by gradients, and outliers
                skvq        channels of like range in a group, clipped
                coupled     one code for a few channels
                calibquant  1 bit, and scores mended
    selection   streaming, l2norm, snapkv, dbudgetkv, pages, clusterkv
    channels    think       channels of keys that queries do not ask for
    rank        lorc        the singular vectors of the weights
    depth       minicache, kvsharer
"""

from __future__ import annotations

from quantspec_jax.cache.codecs import EXACT_TILES
from quantspec_jax.methods.aqua import Aqua
from quantspec_jax.methods.calibquant import CalibQuant
from quantspec_jax.methods.clusterkv import ClusterKV, TileClusters
from quantspec_jax.methods.coupled import Coupled
from quantspec_jax.methods.dbudgetkv import DBudgetKV
from quantspec_jax.methods.higgs import Higgs
from quantspec_jax.methods.kivi import Kivi
from quantspec_jax.methods.kvquant import KVQuant
from quantspec_jax.methods.kvsharer import KVSharer
from quantspec_jax.methods.l2norm import L2Norm
from quantspec_jax.methods.lorc import LoRC
from quantspec_jax.methods.method import Layer, Method, View
from quantspec_jax.methods.minicache import MiniCache
from quantspec_jax.methods.pages import TopPages, TopTokens
from quantspec_jax.methods.planes import Planes
from quantspec_jax.methods.skvq import Skvq
from quantspec_jax.methods.snapkv import SnapKV
from quantspec_jax.methods.streaming import Streaming
from quantspec_jax.methods.think import Think

METHODS: dict[str, Method] = {
    "full": Planes("full"),
    "int8": Planes("int8"),
    "int4": Planes("int4"),
    "int4-first8": Planes("int4", EXACT_TILES),
    "kivi-4": Kivi(4),
    "kivi-2": Kivi(2),
    "kivi-2-sinks": Kivi(2, sinks=4),
    "kivi-4-g128": Kivi(4, group=128),
    "kivi-3-g128": Kivi(3, group=128),
    "kivi-2-g128": Kivi(2, group=128),
    "higgs-4": Higgs(4),
    "higgs-3": Higgs(3),
    "higgs-2": Higgs(2),
    "higgs-3-after": Higgs(3, before_rope=False),
    "higgs-2-after": Higgs(2, before_rope=False),
    "aqua-4": Aqua(4),
    "aqua-3": Aqua(3),
    "aqua-2": Aqua(2),
    "kvquant-3": KVQuant(3, sinks=4),
    "kvquant-3-no-sinks": KVQuant(3, sinks=0),
    "kvquant-2": KVQuant(2),
    "kvquant-2-no-sinks": KVQuant(2, sinks=0),
    "kvquant-2-dense": KVQuant(2, outliers=0.0, sinks=0),
    "skvq-4": Skvq(15, 15),
    "skvq-3": Skvq(7, 7),
    "skvq-2": Skvq(),
    "skvq-2-centred": Skvq(centred=True),
    "skvq-2-unsorted": Skvq(sorts=False),
    "skvq-1.5": Skvq(value_levels=2, group=32),
    "cq-2c8b": Coupled(2),
    "cq-4c8b": Coupled(4),
    "cq-4c8b-unweighted": Coupled(4, weighted=False),
    "cq-4c8b-unweighted-no-sinks": Coupled(4, weighted=False, sinks=0),
    "cq-8c8b": Coupled(8),
    "cq-4c8b-after": Coupled(4, before_rope=False),
    "cq-8c8b-after": Coupled(8, before_rope=False),
    "calibquant-2": CalibQuant(2, key_factor=1.0, value_factor=1.0),
    "calibquant-1": CalibQuant(1),
    "streaming-25": Streaming(0.25),
    "l2-50": L2Norm(0.5),
    "l2-25": L2Norm(0.25),
    "snapkv-25": SnapKV(0.25),
    "snapkv-25-max": SnapKV(0.25, pool="max"),
    "dbudgetkv-1": DBudgetKV(0.33),
    "dbudgetkv-5": DBudgetKV(0.27, tolerance=0.05),
    "top-25": TopTokens(0.25),
    "pages-25": TopPages(0.25),
    "pages-25-int4": TopPages(0.25, codes="int4"),
    "clusterkv-25": ClusterKV(0.25),
    "clusters-25": TileClusters(0.25),
    "clusters-25-int4": TileClusters(0.25, codes="int4"),
    "clusters-12-int4": TileClusters(0.125, codes="int4"),
    "think-40": Think(0.4),
    "think-50": Think(0.5),
    "think-40-later": Think(0.4, later=True),
    "think-50-later": Think(0.5, later=True),
    "think-40-int4": Think(0.4, codes="int4"),
    "think-40-int4-later": Think(0.4, later=True, codes="int4"),
    "lorc-75": LoRC(0.75),
    "lorc-50": LoRC(0.5),
    "lorc-75-text": LoRC(0.75, learned_from="text"),
    "lorc-75-unfolded": LoRC(0.75, folds=False),
    "minicache": MiniCache(),
    "minicache-half": MiniCache(t=0.5),
    "kvsharer-25": KVSharer(),
}

__all__ = [
    "METHODS",
    "Aqua",
    "CalibQuant",
    "ClusterKV",
    "Coupled",
    "DBudgetKV",
    "Higgs",
    "KVQuant",
    "KVSharer",
    "Kivi",
    "L2Norm",
    "Layer",
    "LoRC",
    "Method",
    "MiniCache",
    "Planes",
    "Skvq",
    "SnapKV",
    "Streaming",
    "Think",
    "TileClusters",
    "TopPages",
    "TopTokens",
    "View",
]
