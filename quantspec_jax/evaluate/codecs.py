"""`quantspec eval codecs`: methods that compress a cache, on one model, text and schedule.

Every method is read as decoding would: position t reads what was coded of the tokens before its
buffer, q = G max(0, ⌊t/G⌋ − 1) of them, and those after as they are (`cache.schedule`).

    target   the model decodes over what the method reads of its own keys and values
    draft    full weights; the method is applied to the 8-bit view of the target's planes (views of
             the planes are of the same ones)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.rope_append.heads import Heads, rotate
from quantspec_jax.cache import schedule
from quantspec_jax.checks import require
from quantspec_jax.evaluate.measures import read_tokens
from quantspec_jax.evaluate.teacher_forced import (
    Stream,
    at_tokens,
    embedded,
    in_chunks,
    lm_head_of,
)
from quantspec_jax.loading import Model
from quantspec_jax.methods import METHODS, Layer, Method, Planes
from quantspec_jax.models.attention import Tokens, sequence_attention
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import block_params, run_block, unembed
from quantspec_jax.models.linear import precision
from quantspec_jax.models.parameters import Params
from quantspec_jax.models.rope import rope_frequencies, rope_tables
from quantspec_jax.weights.calibrate.text import calibration_tokens

COUNTED_AT = 131072  # tokens at which what does not grow with them is spread
Learned = list[Any]  # a pytree a layer


class Measured(NamedTuple):
    """Of each position, against a reference p: KL(p ‖ q), whether the top token is p's, Σ min(p,
    q), and log q of the token that follows in the text."""

    divergence: Any
    same_top: Any
    overlap: Any
    log_prob: Any


def codecs(
    model: Model,
    tokens: str | Sequence[int],
    methods: Sequence[str] = tuple(METHODS),
    *,
    context: int | None = None,
    text: str | None = None,
    group_size: int = 128,
    progress: bool = False,
) -> dict[str, Any]:
    """Quality of methods as the cache that is decoded from, and as a draft's.

    Args:
      tokens: a text or its token ids.
      methods: names in `quantspec_jax.methods.METHODS`.
      context: how many of the tokens to read; None: all. Positions from context/4 on are counted.
      text: what methods that learn read; None: prose that comes with Python.
      group_size: G of the schedule.
      progress: show a bar on standard error.

    Returns:
      tokens, how many were counted, and rows, one a method: codec; bits a value at 131,072 tokens,
      everything counted; perplexity; kl, the mean divergence from the cache in full precision, in
      nats; top1, how often the top token is the full cache's; greedy_acceptance and
      sampled_acceptance by the 8-bit target.

    Raises:
      ValueError: an argument is wrong; says which.
    """
    ids = read_tokens(model, tokens, context)
    unknown = [name for name in methods if name not in METHODS]
    require(not unknown, "methods", ", ".join(unknown), ", ".join(METHODS))
    chosen = {name: _by_tiles(METHODS[name], group_size) for name in methods}
    learning = {name: method for name, method in chosen.items() if method.learns}
    learned = {}
    if learning:
        learned = fitted(model, learning, calibration_tokens(model.tokenizer, text))
    first, last = len(ids) // 4, len(ids) - 1  # the last position predicts nothing of the text
    following = jnp.asarray([*ids[1:], 0], jnp.int32)
    with tqdm(total=2 * len(chosen) + 2, desc="codecs", disable=not progress) as bar:
        full, _ = _through(model, ids, Planes("full"), group_size)
        bar.update()
        target, pasts = _through(model, ids, _by_tiles(Planes("int8"), group_size), group_size)
        bar.update()

        def mean(reference: jax.Array, hidden: jax.Array) -> dict[str, float]:
            found = _measure(lm_head_of(model.params), (reference, hidden), following)
            found = jax.device_get(found)
            flat = {name: x.reshape(-1)[first : len(ids)] for name, x in found._asdict().items()}
            flat["log_prob"] = flat["log_prob"][:-1]
            return {name: float(np.mean(x, dtype=np.float64)) for name, x in flat.items()}

        rows = []
        for name, method in chosen.items():
            hidden, _ = _through(model, ids, method, group_size, learned.get(name))
            as_target = mean(full, hidden)
            bar.update()
            hidden, _ = _through(model, ids, method, group_size, learned.get(name), pasts)
            as_draft = mean(target, hidden)
            bar.update()
            rows.append(
                {
                    "codec": name,
                    "bits": method.bits(model.config, COUNTED_AT),
                    "perplexity": float(np.exp(-as_target["log_prob"])),
                    "kl": as_target["divergence"],
                    "top1": as_target["same_top"],
                    "greedy_acceptance": as_draft["same_top"],
                    "sampled_acceptance": as_draft["overlap"],
                }
            )
    return {"tokens": last - first, "rows": rows}


def _by_tiles(method: Method, group_size: int) -> Method:
    """The planes' groups are the schedule's tiles."""
    if isinstance(method, Planes):
        return dataclasses.replace(method, group_size=group_size)
    return method


def fitted(model: Model, methods: Mapping[str, Method], chunks: np.ndarray) -> dict[str, Learned]:
    """What methods learn of each layer from [chunks, length] tokens, which go through the model in
    full precision once for all of them."""
    found: dict[str, Learned] = {name: [] for name in methods}
    below: dict[str, Layer | None] = dict.fromkeys(methods)
    for made in _activations(model, chunks):
        for name, method in methods.items():
            kept = Layer(*(x[:, method.sinks :].reshape(-1, *x.shape[2:]) for x in made))
            learned, below[name] = _fit(kept, below[name], method=method)
            found[name].append(learned)
    return found


@partial(jax.jit, static_argnames="method")
def _fit(text: Layer, below: Layer | None, *, method: Method) -> tuple[Any, Layer]:
    return method.fit(text, below)


def _activations(model: Model, chunks: np.ndarray) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Of one layer after the other: keys before RoPE and values [chunks, length, K, D] float32."""
    stream = embedded(model.params, jnp.asarray(chunks), model.config)
    for i in range(model.config.num_layers):
        block, norm = block_params(model.params, i)
        stream, made = _plain_block(block, norm, stream, config=model.config)
        yield made


@partial(jax.jit, static_argnames="config")
def _plain_block(
    block: Params, norm: jax.Array, stream: Stream, *, config: ModelConfig
) -> tuple[Stream, tuple[jax.Array, jax.Array]]:
    def attend(_: None, heads: Heads) -> tuple[jax.Array, Any]:
        q, k, v = heads.finished()
        own, exact = Tokens(k, v), precision(q.dtype)
        out = sequence_attention(q, own, own, sm_scale=config.head_dim**-0.5, exact=exact)
        keys, values = (x.astype(jnp.float32) for x in own)
        return out, (unrotated(keys, *heads.rope), values)

    rope = _rope(config, stream.x.shape[1])
    x, h, made = run_block(block, norm, config, *stream, rope, None, attend, backend="xla")
    return Stream(x, h), made


def unrotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The inverse of `rotate`; tables may carry an attention factor f (YaRN), which is divided by:
    (cos, −sin) alone would give f² x."""
    return rotate(x, cos, -sin) / (cos * cos + sin * sin)


def _rope(config: ModelConfig, length: int) -> tuple[jax.Array, jax.Array]:
    frequencies = rope_frequencies(config.rope, config.head_dim, length)
    return rope_tables(*frequencies, jnp.arange(length)[None])


def _through(
    model: Model,
    ids: Sequence[int],
    method: Method,
    group_size: int,
    learned: Learned | None = None,
    pasts: Sequence[Tokens] | None = None,
) -> tuple[jax.Array, list[Tokens]]:
    """Hidden states [1, T, E] after the last norm, each position reading by `method`: its own keys
    and values, or those of `pasts` as the 8-bit view has them. And the keys and values of each
    layer."""
    stream = embedded(model.params, jnp.asarray([ids], jnp.int32), model.config)
    below, found = None, []
    for i in range(model.config.num_layers):
        block, norm = block_params(model.params, i)
        given = (learned[i] if learned else (), below, pasts[i] if pasts else None)
        reader = Reader(model.config, method, group_size)
        stream, past, below = _block(block, norm, stream, *given, reader=reader)
        found.append(past)
    return stream.h, found


@dataclasses.dataclass(frozen=True)
class Reader:
    """Everything static about a pass."""

    model: ModelConfig
    method: Method
    group_size: int

    def read(
        self, past: Tokens, rope: Any, learned: Any, below: Layer | None, coded: bool
    ) -> tuple[Tokens, Layer]:
        """What is read of the keys and values [1, T, K, D] of a layer, and what the layer above is
        given. `coded`: the method sees no more of them than the 8-bit view."""
        text = Layer(*(x[0].astype(jnp.float32) for x in past))
        if coded and not isinstance(self.method, Planes):  # these are the target's own codes
            text = Planes("int8", group_size=self.group_size).read((), text, None)

        def keys(x: jax.Array, turn: Any) -> jax.Array:
            return turn(x[None], *rope)[0] if self.method.before_rope else x

        made = self.method.read(learned, text._replace(keys=keys(text.keys, unrotated)), below)
        read = made._replace(keys=keys(made.keys, rotate))
        sink = (jnp.arange(len(text.keys)) < self.method.sinks)[:, None, None]
        read = Layer(*(jnp.where(sink, *both) for both in zip(text, read, strict=True)))
        return Tokens(*(x[None].astype(past.keys.dtype) for x in read)), made


@partial(jax.jit, static_argnames="reader")
def _block(
    block: Params,
    norm: jax.Array,
    stream: Stream,
    learned: Any,
    below: Layer | None,
    past: Tokens | None,
    *,
    reader: Reader,
) -> tuple[Stream, Tokens, Layer]:
    config, length = reader.model, stream.x.shape[1]
    with jax.ensure_compile_time_eval():
        coded = schedule.quantized_length(jnp.arange(length), reader.group_size)
        older_length = np.asarray(coded)

    def attend(past: Tokens | None, heads: Heads) -> tuple[jax.Array, tuple[Tokens, Layer]]:
        q, k, v = heads.finished()
        own = Tokens(k, v)
        held = own if past is None else past
        older, made = reader.read(held, heads.rope, learned, below, coded=past is not None)
        exact, scale = precision(q.dtype), config.head_dim**-0.5
        out = sequence_attention(q, own, held, older, older_length, sm_scale=scale, exact=exact)
        return out, (held, made)

    x, h, (held, made) = run_block(
        block, norm, config, *stream, _rope(config, length), past, attend, backend="xla"
    )
    return Stream(x, h), held, made


@jax.jit
def _measure(head: Params, hidden: tuple[jax.Array, jax.Array], following: jax.Array) -> Measured:
    def measure(hidden: tuple[jax.Array, jax.Array], following: jax.Array) -> Measured:
        p, q = (jax.nn.log_softmax(unembed(head, x, "xla")) for x in hidden)
        return Measured(
            (jnp.exp(p) * (p - q)).sum(-1),
            (jnp.argmax(p, -1) == jnp.argmax(q, -1)).astype(jnp.float32),
            jnp.minimum(jnp.exp(p), jnp.exp(q)).sum(-1),
            at_tokens(q, following),
        )

    return in_chunks(measure, hidden, following)
