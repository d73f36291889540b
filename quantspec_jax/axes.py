"""Where the devices of a mesh meet: programs run on each with its part of every array.

    tp  heads, the MLP's channels, the vocabulary    o, down and the embedding are summed, logits
                                                     joined (Megatron-LM, arXiv 1909.08053)
    cp  tiles of the planes, dealt in turn           parts of attention are merged by log-sum-exp
        rows of a prompt                             a layer's keys and values are gathered
    dp  sequences                                    nowhere

While they decode, devices that reach each other's memory (`peers`) meet in kernels; else, and for
prompts, in XLA's collectives.

Tile t lies with device t mod cp, in its place t div cp: so every device works at every length. Each
device appends to a buffer of its own, which all have alike; the first one reads it.

A prompt is cut into 2 cp runs of rows, of which device i has number i and the i-th from the end, so
that all have as many keys to read before their rows:

    run      0   1   2   3   4   5   6   7          cp 4
    device   0   1   2   3   3   2   1   0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.collectives import api as collectives

ROWS = 256  # of a prompt, a block of queries


@dataclasses.dataclass(frozen=True)
class Axes:
    """Sizes of the mesh's axes, inside `jax.shard_map` over them; 1: nothing is split.

    peers: by axis where this device reaches the memory of those that it meets (`peers.addresses`);
        None where it does not.
    """

    dp: int = 1
    tp: int = 1
    cp: int = 1
    peers: Mapping[str, jax.Array] | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def over(cls, sizes: Mapping[str, int]) -> Axes:
        """Of a mesh's axes by name."""
        return cls(sizes.get("dp", 1), sizes.get("tp", 1), sizes.get("cp", 1))

    @property
    def size(self) -> int:
        """Devices."""
        return self.dp * self.tp * self.cp

    def part(self, axis: str) -> jax.Array | int:
        """Which part of what the axis splits this device has."""
        return jax.lax.axis_index(axis) if getattr(self, axis) > 1 else 0

    def reached(self, peers: Mapping[str, jax.Array] | None) -> Axes:
        """The same, with these addresses."""
        return dataclasses.replace(self, peers=peers)

    def peers_over(self, axis: str) -> jax.Array | None:
        """The addresses of those that this device meets over an axis."""
        return None if self.peers is None else self.peers.get(axis)

    def summed(
        self,
        x: jax.Array,
        residual: jax.Array | None = None,
        out_dtype: Any = None,
        backend: str = "auto",
    ) -> jax.Array:
        """The sum over the parts of the input channels, in float32, rounded to `out_dtype` (None:
        x's); plus `residual`."""
        dtype = out_dtype or x.dtype
        options: dict[str, Any] = {"out_dtype": dtype, "backend": backend}
        return collectives.all_reduce(x, "tp", residual, peers=self.peers_over("tp"), **options)

    def joined(self, x: jax.Array, backend: str = "auto") -> jax.Array:
        """All parts of the last dimension, side by side."""
        if self.tp == 1:
            return x
        return collectives.all_gather(x, "tp", peers=self.peers_over("tp"), backend=backend)

    def own(self, x: jax.Array) -> jax.Array:
        """This device's part of the last dimension: the inverse of `joined`."""
        if self.tp == 1:
            return x
        size = x.shape[-1] // self.tp
        return jax.lax.dynamic_slice_in_dim(x, self.part("tp") * size, size, x.ndim - 1)

    def merged(
        self, out: jax.Array, log_sum_exp: jax.Array, out_dtype: Any, backend: str = "auto"
    ) -> tuple[jax.Array, jax.Array]:
        """Attention to all tiles, in `out_dtype`, from that to each device's: out [..., D] float32,
        and log-sum-exps [...] of the scores, −∞ where a device has nothing to see."""
        if self.cp == 1:
            return out.astype(out_dtype), log_sum_exp
        options: dict[str, Any] = {"out_dtype": out_dtype, "backend": backend}
        return collectives.merge(out, log_sum_exp, "cp", peers=self.peers_over("cp"), **options)

    def tiles_before(self, tile: jax.Array) -> jax.Array:
        """How many of the tiles 0 … `tile` − 1 lie with this device; the place of `tile` if it
        does."""
        return tile if self.cp == 1 else (tile + self.cp - 1 - self.part("cp")) // self.cp

    def before(self, position: jax.Array, size: int) -> jax.Array:
        """How many of the positions 0 … `position` − 1 lie with this device, in tiles of `size`."""
        if self.cp == 1:
            return position
        tile, rest = position // size, position % size
        return self.tiles_before(tile) * size + jnp.where(self.has_tile(tile), rest, 0)

    def has_tile(self, tile: jax.Array) -> jax.Array | bool:
        """Whether a tile lies with this device."""
        return True if self.cp == 1 else tile % self.cp == self.part("cp")

    def prompt_rows(self, number: int) -> int:
        """To how many rows a prompt is padded: runs are alike, and long ones whole blocks."""
        if self.cp == 1:
            return number
        runs = 2 * self.cp
        multiple = runs * ROWS if number > runs * ROWS else runs
        return -(-number // multiple) * multiple

    def own_rows(self, x: jax.Array) -> jax.Array:
        """This device's rows of a prompt's, [B, P, ...] → [B, P/cp, ...]."""
        if self.cp == 1:
            return x
        size = x.shape[1] // (2 * self.cp)
        first = self.part("cp")
        runs = [jax.lax.dynamic_slice_in_dim(x, i * size, size, 1) for i in self._runs(first)]
        return jnp.concatenate(runs, 1)

    def _runs(self, part: jax.Array | int) -> tuple[jax.Array | int, jax.Array | int]:
        return part, 2 * self.cp - 1 - part

    def all_rows(self, x: jax.Array) -> jax.Array:
        """The inverse of `own_rows`."""
        if self.cp == 1:
            return x
        both = x.reshape(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])
        parts = jax.lax.all_gather(both, "cp", axis=1)  # [B, cp, 2, P/2cp, ...]
        runs = jnp.concatenate([parts[:, :, 0], parts[:, ::-1, 1]], 1)
        return runs.reshape(x.shape[0], x.shape[1] * self.cp, *x.shape[2:])

    def row_at(self, x: jax.Array, row: jax.Array) -> jax.Array:
        """One row [B, ...] of each prompt, from those of all devices [B, P/cp, ...]."""
        each = jnp.arange(len(x))
        if self.cp == 1:
            return x[each, row]
        positions = self.own_rows(jnp.arange(x.shape[1] * self.cp)[None])
        here = (positions == row[:, None])[..., *(None,) * (x.ndim - 2)]
        found = jnp.where(here, x, jnp.zeros_like(x)).astype(jnp.float32).sum(1)
        return jax.lax.psum(found, "cp").astype(x.dtype)

    def of_all_tiles(self, number: jax.Array) -> jax.Array:
        """The sum of what each device counts among its tiles."""
        return number if self.cp == 1 else jax.lax.psum(number, "cp")

    def dealt(self, x: jax.Array) -> jax.Array:
        """This device's tiles of all, [B, K, T/G, ...] → [B, K, ⌈T/G/cp⌉, ...]."""
        if self.cp == 1:
            return x
        places = -(-x.shape[2] // self.cp)
        tile = jnp.arange(places) * self.cp + self.part("cp")
        return jnp.take(x, tile, axis=2, mode="fill", fill_value=0)


ONE = Axes()
