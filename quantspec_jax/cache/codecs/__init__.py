"""The codecs. A new one is a file here and an entry in `CODECS`."""

from __future__ import annotations

from quantspec_jax.cache.codecs.aqua import AQUA
from quantspec_jax.cache.codecs.codec import Codec
from quantspec_jax.cache.codecs.float8 import Float8
from quantspec_jax.cache.codecs.full import Full
from quantspec_jax.cache.codecs.hierarchical import EXACT_TILES, Hierarchical

CODECS: dict[str, Codec] = {"full": Full(), "hierarchical": Hierarchical(), "float8": Float8()}
VIEWS = tuple(view for codec in CODECS.values() for view in codec.views)
# Of codecs that learn from a text; a checkpoint has what one of them has learned.
LEARNED_VIEWS = tuple(AQUA)
CODECS |= AQUA


def codec_of(view: str) -> Codec:
    """The codec that offers a view."""
    return next(codec for codec in CODECS.values() if view in codec.views)


__all__ = ["CODECS", "EXACT_TILES", "LEARNED_VIEWS", "VIEWS", "Codec", "codec_of"]
