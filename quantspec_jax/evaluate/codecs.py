"""`quantspec eval codecs`: methods that compress a cache, on one model, text and schedule.

Every method is read as decoding would: position t reads what was coded of the tokens before its
buffer, q = G max(0, ⌊t/G⌋ − 1) of them, and those after as they are (`cache.schedule`).

    target   the model decodes over what the method reads of its own keys and values
    draft    full weights; the method is applied to the 8-bit view of the target's planes (views of
             the planes are of the same ones)

Methods that work from a prompt take the first half of the text, in whole tiles, as theirs; they and
those that choose tokens are counted from its end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.rope_append.heads import rotate, unrotated
from quantspec_jax.cache import schedule
from quantspec_jax.cache.codecs.codec import values_per_token
from quantspec_jax.checks import require
from quantspec_jax.cost import Costs, cache_read_bytes, operations, target_weight_bytes
from quantspec_jax.evaluate.by_blocks import attend_by_blocks, padded
from quantspec_jax.evaluate.learned import Learned, fitted, whole_tables
from quantspec_jax.evaluate.measures import read_tokens
from quantspec_jax.evaluate.teacher_forced import (
    Stream,
    at_tokens,
    embedded,
    in_chunks,
    lm_head_of,
)
from quantspec_jax.loading import Model
from quantspec_jax.methods import METHODS, Layer, Method, Planes, View
from quantspec_jax.methods.method import OBSERVED
from quantspec_jax.models.attention import Tokens, sequence_attention
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import block_params, run_block, unembed
from quantspec_jax.models.linear import precision
from quantspec_jax.models.parameters import Params
from quantspec_jax.models.projection import Projection
from quantspec_jax.planning.devices import DEVICES
from quantspec_jax.text.prompts import read_prompts
from quantspec_jax.weights.calibrate.programs import program
from quantspec_jax.weights.calibrate.text import CHUNKS, calibration_tokens

COUNTED_AT = 131072  # tokens at which what does not grow with them is spread
CONTEXTS = (8192, 32768, 131072)  # that speed-ups are predicted at
OF_TARGETS = ("perplexity", "over_full", "over_full_error", "kl", "top1")
OF_DRAFTS = ("same_top", "overlap")
DEVICE = "h200"  # and for which device
FULL, VIEW = Planes("full"), Planes("int8")  # what others are compared with, and their target


class Past(NamedTuple):
    """Keys and values [1, T, K, D] of a pass, and the queries [1, w, H, D] at its prompt's end."""

    keys: jax.Array
    values: jax.Array
    queries: jax.Array


class Measured(NamedTuple):
    """Of each position, against a reference p: KL(p ‖ q), whether the top token is p's, Σ min(p,
    q), and log q and log p of the token that follows in the text."""

    divergence: Any
    same_top: Any
    overlap: Any
    log_prob: Any
    reference_log_prob: Any


def codecs(
    model: Model,
    tokens: str | Sequence[int],
    methods: Sequence[str] = tuple(METHODS),
    *,
    context: int | None = None,
    places: int = 1,
    text: str | None = None,
    kv_chunks: int = CHUNKS,
    group_size: int = 128,
    stored: Mapping[str, Learned] | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda result: None,
    progress: bool = False,
) -> dict[str, Any]:
    """Quality of methods as the cache that is decoded from, and as a draft's.

    Args:
      tokens: a text or its token ids.
      methods: names in `quantspec_jax.methods.METHODS`.
      context: how many of the tokens to read; None: all. Positions from context/4 on are counted,
        of methods that select or work from a prompt those from context/2 on.
      places: so many pieces of the text, each of that many tokens, one after the other; each is
        read by itself, and their positions are counted together.
      text: what methods that learn read; None: prose that comes with Python.
      kv_chunks: how much of it: chunks of 1,024 tokens from all over it.
      group_size: G of the schedule.
      stored: what methods have learned already, by their names.
      on_row: is given the result after each method and place, with what there is.
      progress: show a bar on standard error.

    Returns:
      tokens, how many were counted at most, places, and rows, one a method: codec; bits a value at
      131,072 tokens, everything counted, and read_bits, of what a pass reads; positions, how many
      were counted; perplexity, and over_full, by which share it exceeds that of the cache in full
      precision on the same positions, with its standard error; both by_place where there are
      several; kl, the mean divergence from it, in nats; top1, how often the top token is the
      full cache's; greedy_acceptance and sampled_acceptance by the 8-bit target; counted_from, the
      first position; speed_up by context: the limit over plain decoding as a draft with the full
      weights (bfloat16, batch 1) by bytes and operations of an H200. A method that reads two layers
      together cannot be decoded from layer by layer: what it would be as a target is None.

    Raises:
      ValueError: an argument is wrong; says which.
    """
    pieces = read_places(model, tokens, context, places)
    length = len(pieces[0])
    require(kv_chunks >= 1, "kv_chunks", kv_chunks, "1 or more")
    unknown = [name for name in methods if name not in METHODS]
    require(not unknown, "methods", ", ".join(unknown), ", ".join(METHODS))
    chosen = {name: by_tiles(METHODS[name], group_size) for name in methods}
    prompt = prompt_length(length, group_size)
    if any(method.selects for method in chosen.values()):
        _check_prompt(chosen, prompt, length, group_size)

    @functools.cache
    def chunks() -> np.ndarray:
        return calibration_tokens(model.tokenizer, text, chunks=kv_chunks)

    ready = {name: known for name, known in (stored or {}).items() if name in chosen}
    due = {name: method for name, method in chosen.items() if name not in ready}
    learned = ready | fitted(model, due, chunks, length, progress=progress)
    seen = {name: Seen([], []) for name in chosen}
    result: dict[str, Any] = {"tokens": 0, "places": 0, "predicted_on": DEVICE}
    with tqdm(total=places * (2 * len(chosen) + 2), desc="codecs", disable=not progress) as bar:
        for piece in pieces:
            result["tokens"] += length - 1 - length // 4
            result["places"] += 1
            bench, int8 = Bench(model, piece, prompt, group_size), by_tiles(VIEW, group_size)
            full, _ = bench.through(FULL)
            bar.update()
            target, pasts = bench.through(int8)
            bar.update()
            read: dict[Method, jax.Array] = {FULL: full, int8: target}
            for name, method in chosen.items():
                first = prompt if method.selects else length // 4
                hidden = read.get(method)
                seen[name].target.extend(
                    bench.as_target(full, method, learned[name], first, hidden=hidden)
                )
                bar.update()
                seen[name].draft.append(bench.as_draft(target, pasts, method, learned[name], first))
                bar.update()
                result["rows"] = [
                    row(model.config, each, chosen[each], found, group_size, length)
                    for each, found in seen.items()
                    if found.draft
                ]
                on_row(result)
    return result


def read_places(
    model: Model, tokens: str | Sequence[int], context: int | None, places: int
) -> list[list[int]]:
    """So many pieces of a text, checked; None: the whole text is the only one."""
    require(places >= 1, "places", places, "1 or more")
    require(context is not None or places == 1, "context", context, "a number, of several places")
    if context is None:
        return [read_tokens(model, tokens, None)]
    read_tokens(model, tokens, context)
    ids = read_prompts(tokens, model.tokenizer, model.config.vocab_size)[0]
    allowed = f"{places * context}, {context} (context) for each of {places} places, or more"
    require(len(ids) >= places * context, "tokens", f"{len(ids)} tokens", allowed)
    return [ids[i * context : (i + 1) * context] for i in range(places)]


class Seen(NamedTuple):
    """Of each place, a method's positions as the cache that is decoded from (none, where it cannot
    be), and as a draft's."""

    target: list[Measured]
    draft: list[Measured]


def row(
    model: ModelConfig, name: str, method: Method, seen: Seen, group_size: int, length: int
) -> dict[str, Any]:
    """A line of the result."""
    greedy, sampled = (pooled([getattr(x, of) for x in seen.draft]) for of in OF_DRAFTS)
    return {
        "codec": name,
        "bits": method.bits(model, COUNTED_AT),
        "read_bits": method.read_bits(model, COUNTED_AT),
        "positions": sum(len(x.same_top) for x in seen.draft),
        **of_target(seen.target, group_size),
        "greedy_acceptance": greedy,
        "sampled_acceptance": sampled,
        "counted_from": length - len(seen.draft[0].same_top),
        "speed_up": speed_ups(model, method, greedy, group_size),
    }


def of_target(seen: Sequence[Measured], block: int) -> dict[str, Any]:
    """What a method costs as the cache that is decoded from, over all places."""
    if not seen:
        return dict.fromkeys(OF_TARGETS)
    lost = [x.reference_log_prob - x.log_prob for x in seen]
    perplexity, over = _perplexity(seen)
    error = standard_error(lost, block)
    found = (
        *(perplexity, over, None if error is None else (1 + over) * error),
        *(pooled([getattr(x, of) for x in seen]) for of in ("divergence", "same_top")),
    )
    names = OF_TARGETS[:2]
    each = [dict(zip(names, _perplexity([place]), strict=True)) for place in seen]
    several = {"by_place": each} if len(seen) > 1 else {}
    return dict(zip(OF_TARGETS, found, strict=True)) | several


def _perplexity(seen: Sequence[Measured]) -> tuple[float, float]:
    """And the share by which it exceeds the reference's."""
    log_prob, reference = (
        pooled([getattr(x, of) for x in seen]) for of in ("log_prob", "reference_log_prob")
    )
    return float(np.exp(-log_prob)), float(np.exp(reference - log_prob)) - 1


def pooled(places: Sequence[np.ndarray]) -> float:
    """The mean over the positions of all places."""
    return float(np.mean(np.concatenate(places), dtype=np.float64))


def standard_error(places: Sequence[np.ndarray], block: int) -> float | None:
    """Of the mean of positions that are alike near each other: from the means of blocks of them,
    whole ones. None: there are fewer than two."""
    blocks = [x[: len(x) // block * block].reshape(-1, block).mean(1) for x in places]
    means = np.concatenate(blocks).astype(np.float64)
    return float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None


def prompt_length(length: int, group_size: int) -> int:
    """Half of a text, in whole tiles."""
    return length // 2 // group_size * group_size


def _check_prompt(chosen: Mapping[str, Method], prompt: int, length: int, group_size: int) -> None:
    names = ", ".join(name for name, method in chosen.items() if method.selects)
    shortest = max(2 * OBSERVED, 2 * group_size)
    allowed = f"{2 * shortest} tokens or more for {names}"
    require(prompt >= shortest, "context", length, allowed)


def speed_ups(
    model: ModelConfig, method: Method, acceptance: float, group_size: int
) -> dict[str, float]:
    """By context, as a draft of the 8-bit target, at the best γ."""
    device, weights, values = DEVICES[DEVICE], target_weight_bytes(model), values_per_token(model)
    found = {}
    for context in CONTEXTS:
        read = values * context * method.read_bits(model, context) / 8
        if not method.of_planes:  # whose count has the buffer
            read += values * 1.5 * group_size * 2
        more = method.operations(model) * context
        costs = Costs(
            *(
                device.milliseconds(weights + cache, operations(model, context, 1) + extra)
                for cache, extra in (
                    (cache_read_bytes(model, "full", context, group_size=group_size), 0),
                    (read, more),
                    (cache_read_bytes(model, "int8", context, group_size=group_size), 0),
                )
            )
        )
        found[str(context)] = costs.speed_up(acceptance, costs.best_gamma(acceptance))
    return found


def causal(method: Method, learned: Learned, layers: int) -> bool:
    """Whether a layer reads nothing of those above it."""
    return all(method.partner(known, i, layers) <= i for i, known in enumerate(learned))


def by_tiles(method: Method, group_size: int) -> Method:
    """The planes' groups are the schedule's tiles."""
    if method.of_planes:
        return dataclasses.replace(method, group_size=group_size)  # type: ignore[call-arg]
    return method


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model and a text that methods are measured on."""

    model: Model
    ids: Sequence[int]
    prompt: int
    group_size: int

    def as_target(
        self,
        full: jax.Array,
        method: Method,
        learned: Learned,
        first: int,
        hidden: jax.Array | None = None,
    ) -> list[Measured]:
        """Beside the cache in full precision, whose hidden states are `full`, from `first` on;
        none of a method that reads layers above. `hidden`: its own, where they are known."""
        if not causal(method, learned, self.model.config.num_layers):
            return []
        hidden = self.through(method, learned)[0] if hidden is None else hidden
        return [self._beside(full, hidden, first)]

    def as_draft(
        self, target: jax.Array, pasts: list[Past], method: Method, learned: Learned, first: int
    ) -> Measured:
        """Of the 8-bit target, whose hidden states are `target`."""
        return self._beside(target, self.through(method, learned, pasts)[0], first)

    def _beside(self, reference: jax.Array, hidden: jax.Array, first: int) -> Measured:
        following = jnp.asarray([*self.ids[1:], 0], jnp.int32)
        found = jax.device_get(
            _measure(lm_head_of(self.model.params), (reference, hidden), following)
        )
        flat = Measured(*(x.reshape(-1)[first : len(self.ids)] for x in found))
        # of what follows the last position nothing is known
        log_probs = {name: getattr(flat, name)[:-1] for name in ("log_prob", "reference_log_prob")}
        return flat._replace(**log_probs)

    def through(
        self,
        method: Method,
        learned: Learned | None = None,
        pasts: Sequence[Past] | None = None,
        before: Sequence[Past] | None = None,
    ) -> tuple[jax.Array, list[Past]]:
        """Hidden states [1, T, E] after the last norm, each position reading by `method`: its own
        keys and values, or those of `pasts` as the 8-bit view has them. And the keys and values of
        each layer. `before`: those of the text's first tokens, whole tiles; T are what follow."""
        params, config = self.model.params, self.model.config
        first = before[0].keys.shape[1] if before else 0
        stream = embedded(params, jnp.asarray([self.ids[first:]], jnp.int32), config)
        reader = Reader(config, method, self.group_size, self.prompt)
        other: Layer | Past | None = None
        found: list[Past] = []
        for i in range(config.num_layers):
            known = learned[i] if learned else ()
            if method.paired:
                source = method.partner(known, i, config.num_layers)
                of = found if pasts is None else pasts
                other = of[source] if source != i else None
            past = pasts[i] if pasts else None
            given = (known, other, past, before[i] if before else None)
            stream, past, other = _block(*block_params(params, i), stream, *given, reader=reader)
            found.append(past)
        return stream.h, found


@dataclasses.dataclass(frozen=True)
class Reader:
    """Everything static about a pass."""

    model: ModelConfig
    method: Method
    group_size: int
    prompt: int

    def held(self, own: Tokens, q: jax.Array, before: Past | None) -> Past:
        """What a pass of the target leaves to others."""
        if before is None:
            return Past(*own, q[:, max(0, self.prompt - OBSERVED) : self.prompt])
        keys = jnp.concatenate([before.keys, own.keys], 1)
        values = jnp.concatenate([before.values, own.values], 1)
        return Past(keys, values, before.queries)

    def text(self, past: Past, rope: Any, coded: bool) -> Layer:
        """Keys and values [T, K, D] that the method is given. `coded`: no more of them than the
        8-bit view has; of methods that read the planes, these are the same."""
        text = Layer(past.keys[0].astype(jnp.float32), past.values[0].astype(jnp.float32))
        if coded and not self.method.of_planes:
            text = Planes("int8", group_size=self.group_size).read((), text, None)
        return self._keys(text, unrotated, rope)

    def older(
        self, past: Past, rope: Any, learned: Any, other: Any, coded: bool
    ) -> tuple[Tokens, Layer | None]:
        """What is read of a layer, and what a stacked method is given above it. `other`: what it
        was given here, or, where layers are read in pairs, the other's past."""
        text = self.text(past, rope, coded)
        if self.method.paired:
            other = text if other is None else self.text(other, rope, coded)
        made = self.method.read(learned, text, other)
        read = self._keys(self._with_sinks(text, made), rotate, rope)
        tokens = Tokens(*(x[None].astype(past.keys.dtype) for x in read))
        return tokens, made if self.method.stacked else None

    def view(self, past: Past, rope: Any, learned: Any, coded: bool) -> View:
        """What is read of whole tiles of a layer, where the method selects."""
        text = Layer(*(padded(x, self.group_size) for x in self.text(past, rope, coded)))
        queries = past.queries[0].astype(jnp.float32)
        view = self.method.compress(learned, text, queries, self.prompt)
        read = self._with_sinks(text, Layer(view.keys, view.values))
        return View(*read, view.state)

    def _keys(self, text: Layer, turn: Any, rope: Any) -> Layer:
        if not self.method.before_rope:
            return text
        return text._replace(keys=turn(text.keys[None], *rope)[0])

    def _with_sinks(self, text: Layer, read: Layer) -> Layer:
        sink = (jnp.arange(len(text.keys)) < self.method.sinks)[:, None, None]
        return Layer(*(jnp.where(sink, *both) for both in zip(text, read, strict=True)))


@program("reader")
def _block(
    block: Params,
    norm: jax.Array,
    stream: Stream,
    learned: Any,
    other: Any,
    past: Past | None,
    before: Past | None,
    *,
    reader: Reader,
) -> tuple[Stream, Past, Layer | None]:
    config, first = reader.model, 0 if before is None else before.keys.shape[1]
    length = first + stream.x.shape[1]
    rope = cos, sin = whole_tables(config, length)
    with jax.ensure_compile_time_eval():
        coded = schedule.quantized_length(jnp.arange(first, length), reader.group_size)
        older_length = np.asarray(coded)

    def attend(past: Past | None, heads: Projection) -> tuple[jax.Array, tuple[Past, Layer | None]]:
        q, k, v = heads.finished()
        own, draft = Tokens(k, v), past is not None
        held = reader.held(own, q, before) if past is None else past
        exact, scale = precision(q.dtype), config.head_dim**-0.5
        if reader.method.selects:
            view = reader.view(held, rope, learned, draft)
            one, recent = (Tokens(x[0][0], x[1][0]) for x in (own, held))
            out = attend_by_blocks(
                *(q[0], one, recent, view, reader.method),
                prompt=reader.prompt,
                group_size=reader.group_size,
                sm_scale=scale,
                exact=exact,
            )
            return out[None], (held, None)
        older, made = reader.older(held, rope, learned, other, draft)
        recent = Tokens(held.keys, held.values)
        out = sequence_attention(q, own, recent, older, older_length, sm_scale=scale, exact=exact)
        return out, (held, made)

    own_rope = (cos[:, first:], sin[:, first:])
    x, h, (held, made) = run_block(
        block, norm, config, *stream, own_rope, past, attend, backend="xla"
    )
    return Stream(x, h), held, made


@program()
def _measure(head: Params, hidden: tuple[jax.Array, jax.Array], following: jax.Array) -> Measured:
    def measure(hidden: tuple[jax.Array, jax.Array], following: jax.Array) -> Measured:
        p, q = (jax.nn.log_softmax(unembed(head, x, "xla")) for x in hidden)
        return Measured(
            (jnp.exp(p) * (p - q)).sum(-1),
            (jnp.argmax(p, -1) == jnp.argmax(q, -1)).astype(jnp.float32),
            jnp.minimum(jnp.exp(p), jnp.exp(q)).sum(-1),
            at_tokens(q, following),
            at_tokens(p, following),
        )

    return in_chunks(measure, hidden, following)
