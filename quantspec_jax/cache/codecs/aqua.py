"""AQUA-KV (arXiv 2501.19392) as what is decoded from: tokens are coded when they leave the newest G
to 2G, and read again at once; what lies in the cache is what their codes say.

    position   0 ........................ q ......... q + G ....... n ... q + 2G
               │ coded, and read again    │ exact                           │

A layer's codes build on what the layer below came to, so that all layers are coded together
(`quantspec_jax.generate.recoded`). It decodes what a cache of codes would, and takes the bytes of
one in full precision: to read codes in every pass, a layer after the other, is a kernel's work.
"""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels.kv_attention.read import Read
from quantspec_jax.cache import schedule
from quantspec_jax.cache.codecs.full import FULL, Full


@dataclasses.dataclass(frozen=True)
class Aqua(Full):
    """One view, named by method and bits; the buffer holds every token."""

    views: tuple[str, ...] = ("aqua-2",)
    recodes: bool = True

    def quantized_length(self, length: jax.Array, group_size: int) -> jax.Array:
        """The schedule's q."""
        return schedule.quantized_length(length, group_size)

    def decoded(
        self, keys: jax.Array, values: jax.Array, read: Read, group_size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Not of one layer alone."""
        raise NotImplementedError(f"a layer of {self.views[0]} is not read without those below it")


AQUA = {name: Aqua((name,), FULL) for name in ("aqua-2", "aqua-3", "aqua-4")}
