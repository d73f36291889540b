"""Methods that compress a cache, a file each beside its paper, in one harness.

A method says what a position reads of the tokens before it, given a text's keys and values; the
cache of decoding is none of its business (`quantspec_jax.cache.codecs` is). `quantspec eval codecs`
measures all of them on the same model, text and schedule, as the cache that is decoded from and as
a draft's.

    method      the protocol
    planes      this package's own views, and none: full, int8, int4
    kivi        groups along the channel for keys, along the token for values
    higgs       Hadamard rotation and a grid that is best for normal numbers
    aqua        predictors across layers, HIGGS for what they leave
"""

from __future__ import annotations

from quantspec_jax.cache.codecs import EXACT_TILES
from quantspec_jax.methods.aqua import Aqua
from quantspec_jax.methods.higgs import Higgs
from quantspec_jax.methods.kivi import Kivi
from quantspec_jax.methods.method import Layer, Method
from quantspec_jax.methods.planes import Planes

METHODS: dict[str, Method] = {
    "full": Planes("full"),
    "int8": Planes("int8"),
    "int4": Planes("int4"),
    "int4-first8": Planes("int4", EXACT_TILES),
    "kivi-4": Kivi(4),
    "kivi-2": Kivi(2),
    "higgs-4": Higgs(4),
    "higgs-3": Higgs(3),
    "higgs-2": Higgs(2),
    "aqua-4": Aqua(4),
    "aqua-3": Aqua(3),
    "aqua-2": Aqua(2),
}

__all__ = ["METHODS", "Aqua", "Higgs", "Kivi", "Layer", "Method", "Planes"]
