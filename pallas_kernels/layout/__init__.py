"""The packed layout: how 4-bit codes lie in bytes. Defined here and nowhere else.

A *tile* is the smallest thing that is written at once: G tokens of one head for the cache, one
group of input channels for a weight. Codes are signed 4-bit integers, −8..7, stored plus 8, two to
a byte. Everything outside this package treats the bytes of a tile as opaque and moves whole tiles.

    keys     byte [token, e]               low nibble: channel e    high: channel e + D/2
    values   byte [i, channel, e]          low nibble: token W i + e   high: token W i + W/2 + e
             in runs of W = 32 tokens (gcd(G, 32))
    weights  byte [r, c]                   low nibble: input r      high: input r + group/2

A word of 32 bits then holds eight codes along the dimension that the product with it sums over, in
pairs 16 bits apart: one `and` turns it into two float16 numbers that a matrix instruction takes.
`LAYOUT_VERSION` is stored with checkpoints and changes with the layout of weights, `CACHE_VERSION`
with saved caches and that of `Planes`.

A GPU multiplies with a weight that is *tiled* (`TiledWeight`): the same codes and numbers in the
order in which a warp reads them. Tiling is done on the device; nothing stores it.
"""

from pallas_kernels.layout.nibbles import (
    LAYOUT_VERSION,
    unsigned_halves,
)
from pallas_kernels.layout.planes import (
    CACHE_VERSION,
    LARGEST,
    LayerCache,
    Planes,
    key_halves,
    pack_keys,
    pack_values,
    unpack_keys,
    unpack_values,
    value_halves,
)
from pallas_kernels.layout.weights import (
    STRIP,
    PackedWeight,
    QuantizedWeight,
    TiledWeight,
    can_tile,
    pack,
    tile,
    unpack,
    untile,
)

__all__ = [
    "CACHE_VERSION",
    "LARGEST",
    "LAYOUT_VERSION",
    "STRIP",
    "LayerCache",
    "PackedWeight",
    "Planes",
    "QuantizedWeight",
    "TiledWeight",
    "can_tile",
    "key_halves",
    "pack",
    "pack_keys",
    "pack_values",
    "tile",
    "unpack",
    "unpack_keys",
    "unpack_values",
    "unsigned_halves",
    "untile",
    "value_halves",
]
