"""What a method that codes a token's channels together loses by large key biases.

    python benchmarks/key_biases.py --model M --text A --learn B --context N --output FILE

Of Qwen2.5 some channels of the keys' bias are hundreds of times those of what the input adds, and
a group or rotation that holds such a channel has a step as wide as it. Perplexity by method where

    as they are     keys are coded with their bias
    bias off        it is taken off before they are coded, and put back when they are read
    first exact     they are coded with it, and the first layer's keys and values are left alone
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script

import quantspec_jax as qs
from quantspec_jax.bench import record
from quantspec_jax.evaluate.codecs import FULL, Bench, of_target
from quantspec_jax.evaluate.learned import activations
from quantspec_jax.methods import METHODS, Layer, Method
from quantspec_jax.text.prompts import read_text
from quantspec_jax.weights.calibrate.text import calibration_tokens

G = 128
KINDS = ("as they are", "bias off", "first exact")
CODECS = ("higgs-4", "higgs-3", "higgs-2", "skvq-4", "skvq-3", "skvq-2", "skvq-2-centred")


@dataclasses.dataclass(frozen=True)
class WithoutBias(Method):
    """Another method of keys before RoPE. Learned, a layer: what the other did, what is taken off
    the keys [K, D], and whether the layer is left alone."""

    of: Method
    before_rope: bool = dataclasses.field(default=True, kw_only=True)

    def read(self, learned: Any, text: Layer, other: Layer | None) -> Layer:
        known, off, alone = learned
        made = self.of.read(known, text._replace(keys=text.keys - off), other)
        read = made._replace(keys=made.keys + off)
        return Layer(*(jnp.where(alone, x, y) for x, y in zip(text, read, strict=True)))


def biases(model: qs.Model) -> list[jax.Array]:
    """Of each layer's keys, [K, D]."""
    config = model.config
    shape = (config.num_kv_heads, config.head_dim)
    layers = (model.params["layers"][str(i)]["k"] for i in range(config.num_layers))
    return [layer.get("bias", jnp.zeros(shape)).astype(jnp.float32).reshape(shape)
            for layer in layers]  # fmt: skip


def learned(model: qs.Model, methods: set[Method], chunks: np.ndarray) -> dict[Any, list[Any]]:
    """By method and whether the bias is off: a layer after the other."""
    found: dict[Any, list[Any]] = {(m, off): [] for m in methods for off in (False, True)}
    for (keys, values), bias in zip(activations(model, chunks), biases(model), strict=True):
        for (method, off), layers in found.items():
            text = Layer(keys - bias if off else keys, values)
            layers.append(_fit(method, text) if method.learns else ())
    return found


@partial(jax.jit, static_argnums=0)
def _fit(method: Method, text: Layer) -> Any:
    """Of the tokens [chunks, length, K, D] that are no sinks."""
    rows = (x[:, method.sinks :].reshape(-1, *x.shape[2:]) for x in text)
    return method.fit(Layer(*rows), None)[0]


def measure(
    model: qs.Model, ids: list[int], chunks: np.ndarray, rows: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """The rows that there are and those that are missing, after each."""
    bench = Bench(model, ids, len(ids) // 2, G)
    full, _ = bench.through(FULL)
    known = learned(model, {METHODS[name].learner() for name in CODECS}, chunks)
    none = [0 * bias for bias in biases(model)]
    for name, kind in itertools.product(CODECS, KINDS):
        off = kind == "bias off"
        taken = biases(model) if off else none
        layers = enumerate(zip(known[METHODS[name].learner(), off], taken, strict=True))
        given = [(*each, jnp.asarray(i == 0 and kind == "first exact")) for i, each in layers]
        method = WithoutBias(METHODS[name], sinks=METHODS[name].sinks)
        row: dict[str, Any] = {"codec": name, "keys": kind}
        row |= of_target(bench.as_target(full, method, given, len(ids) // 4), G)
        rows.append(script.show(row))
        yield rows


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser)
    parser.add_argument("--learn", type=Path, required=True, metavar="FILE", help="another text")
    parser.add_argument("--chunks", type=int, default=16, help="of 1,024 tokens of it")
    parser.add_argument("--context", type=int, default=1024)
    return parser


def main() -> int:
    args = make_parser().parse_args()
    model = qs.load(args.model, dtype="float32", draft=qs.DraftConfig(bits=None))
    text = read_text(str(args.learn), "--learn")
    chunks = calibration_tokens(model.tokenizer, text, chunks=args.chunks)
    ids = script.tokens(model, args.text, args.context)
    about = {"model": record.model_name(args.model), "text": args.text.stem}
    about |= {"learned_from": args.learn.stem, "context": args.context, "dtype": "float32"}
    for rows in measure(model, ids, chunks, []):
        script.write(__file__, args, rows, **about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
