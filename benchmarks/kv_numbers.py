"""What a group's scale and minimum are stored in: quality of both views of the cache by their type.

    python benchmarks/kv_numbers.py --model M --text A B --context N --output FILE

The codes are those of `pallas_kernels.quantize_pack`, 16 u + l against the stored numbers. All but
float32 take the 2 bytes a number that the cache has.

    bfloat16     the minimum rounded down, the scale up
    float16      the cache's own, the same; beyond ±65,504 there is nothing
    float32      for comparison
    steps        the scale in bfloat16, the minimum as a number of its sixteenths, int16
    bias off     bfloat16; keys are coded without their bias, which RoPE has turned by position

A perplexity differs by chance: its logarithm by some √(2 KL / positions) where only rounding
differs, 0.03% for a KL of 4e-5 and 768 positions. KL is what tells types apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import script

import quantspec_jax as qs
from pallas_kernels.rope_append.heads import rotate
from quantspec_jax.bench import record
from quantspec_jax.evaluate.codecs import Bench, of_target
from quantspec_jax.evaluate.learned import whole_tables
from quantspec_jax.methods import Layer, Method, Planes

G = 128
TYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}


def down(x: jax.Array, kind: str) -> jax.Array:
    """The greatest number of a type that is not above x."""
    near = x.astype(TYPES[kind])
    below = jnp.nextafter(near, jnp.asarray(-jnp.inf, near.dtype))
    return jnp.where(near.astype(jnp.float32) > x, below, near).astype(jnp.float32)


def up(x: jax.Array, kind: str) -> jax.Array:
    return -down(-x, kind)


@dataclasses.dataclass(frozen=True)
class Numbers(Method):
    """A view of the planes with numbers of a type. Learned: what is taken off the keys."""

    kind: str
    view: str = "int8"

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        """Keys in groups of G tokens of a channel, values of the channels of a token."""
        keys, t = text.keys - learned, len(text.keys)
        tiles = jnp.pad(keys, ((0, -t % G), (0, 0), (0, 0)), mode="edge")
        tiles = self._coded(tiles.reshape(-1, G, *keys.shape[1:]), 1)
        return Layer(tiles.reshape(-1, *keys.shape[1:])[:t] + learned, self._coded(text.values, 2))

    def _coded(self, x: jax.Array, axis: int) -> jax.Array:
        low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
        if self.kind == "steps":
            scale = up(jnp.maximum((high - low) / 15, jnp.abs(low) / 2047), "bfloat16")
            step = jnp.where(scale > 0, scale, 1.0) / 16
            minimum = jnp.floor(low / step) * step
        else:
            minimum = down(low, self.kind)
            scale = up((high - minimum) / 15, self.kind)
            step = jnp.where(scale > 0, scale, 1.0) / 16
        code = jnp.clip(jnp.round((x - minimum) / step), 0, 247)
        if self.view == "int4":
            code = 16 * ((code + 8) // 16) - 1 / 2
        return minimum + step * code


def biases(model: qs.Model, length: int) -> list[jax.Array]:
    """Of each layer's keys after RoPE, [T, K, D]."""
    config, rope = model.config, whole_tables(model.config, length)
    shape = (1, length, config.num_kv_heads, config.head_dim)
    found = []
    for i in range(config.num_layers):
        bias = model.params["layers"][str(i)]["k"].get("bias", jnp.zeros(shape[2] * shape[3]))
        found.append(rotate(jnp.broadcast_to(bias.reshape(1, 1, *shape[2:]), shape), *rope)[0])
    return found


def asked(model: qs.Model, context: int) -> Iterator[tuple[str, str, Numbers, Any]]:
    """View, name, method and what is taken off the keys."""
    off = biases(model, context)
    nothing = [0 * x[:1] for x in off]
    for view in ("int8", "int4"):
        for kind in (*TYPES, "steps"):
            yield view, kind, Numbers(kind, view), nothing
    yield "int8", "bias off", Numbers("bfloat16"), off


def measure(
    model: qs.Model, paths: list[Path], context: int, rows: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """The rows that there are and those that are missing, after each."""
    done = {(row["text"], row["view"], row["numbers"]) for row in rows}
    for path in paths:
        bench = Bench(model, script.tokens(model, path, context), context // 2, G)
        full, _ = bench.through(Planes("full"))
        for view, name, method, known in asked(model, context):
            row: dict[str, Any] = {"text": path.stem, "view": view, "numbers": name}
            if tuple(row.values()) not in done:
                row |= of_target(bench.as_target(full, method, known, context // 4), G)
                rows.append(script.show(row))
                yield rows


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser, several=True)
    parser.add_argument("--context", type=int, default=1024)
    return parser


def main() -> int:
    args = make_parser().parse_args()
    model = qs.load(args.model, dtype="float32", draft=qs.DraftConfig(bits=None))
    name = record.model_name(args.model)
    for rows in measure(model, args.text, args.context, script.finished_rows(args.output)):
        script.write(__file__, args, rows, model=name, context=args.context, dtype="float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
