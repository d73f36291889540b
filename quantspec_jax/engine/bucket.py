"""Shape buckets: one compilation serves every length of a bucket."""

from __future__ import annotations

SMALLEST = 128


def bucket(length: int) -> int:
    """The smallest of 128, 192, 256, 384, 512, 768, ... (2ᵏ and 3·2ᵏ⁻¹) that holds `length`."""
    size = SMALLEST
    while size < length:
        if size + size // 2 >= length:
            return size + size // 2
        size *= 2
    return size
