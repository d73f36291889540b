"""`generate` and `stream`: prompts in, texts and statistics out.

A thin host around `prefill` and `generate_tokens`. The host looks at the state every
`rounds_per_chunk` rounds: to stream text, to find stop strings, to be interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.dispatch import use_mosaic_gpu
from quantspec_jax.cache import cache_bytes, create
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.checks import require
from quantspec_jax.cost import bytes_read
from quantspec_jax.engine.bucket import bucket
from quantspec_jax.generate.adapt import MOST_DRAFTED, NEVER, Timing, measured_cost
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.prefill import COMPILED, begin, end, layer, prefill
from quantspec_jax.generate.sampling import sampling_arrays
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.loading import Model
from quantspec_jax.memory import free_bytes, require_memory, temporary_bytes, tree_bytes
from quantspec_jax.text.detokenize import TextStream
from quantspec_jax.text.prompts import read_prompts
from quantspec_jax.weights.sizes import draft_bytes

EOS_SLOTS = 16
OnText = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns, one entry a prompt in each list.

    text    the new text, without special tokens, cut before a stop string
    tokens  the new token ids, EOS included
    stats   a mapping of statistics; its keys are those of `quantspec generate --json`
    """

    text: list[str]
    tokens: list[list[int]]
    stats: list[dict[str, Any]]


_generate_tokens = jax.jit(generate_tokens, static_argnames="program", donate_argnames="state")
_executables: dict[Any, Any] = {}


def _compile(function: Any, *args: Any, **static: Any) -> tuple[Any, float]:
    """The executable for these shapes, and the seconds it took to make (0 when it existed)."""
    leaves, tree = jax.tree.flatten(args)
    shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    key = (id(function), tree, shapes, tuple(sorted(static.items())))
    if key in _executables:
        return _executables[key], 0.0
    begin = time.perf_counter()
    _executables[key] = function.lower(*args, **static).compile()
    return _executables[key], time.perf_counter() - begin


def program_for(
    model: Model, config: GenerateConfig, longest: int, batch: int = 1
) -> tuple[Program, int]:
    """The program for `batch` prompts of at most `longest` tokens, and the length they are padded
    to.

    Raises:
      ValueError: the prompt and its new tokens exceed the model's context or `max_length`.
    """
    context = model.config.max_context
    needed = longest + config.max_new_tokens
    words = f"prompt ({longest} tokens) + max_new_tokens ({config.max_new_tokens})"
    require(needed <= context, words, needed, f"at most {context}, the model's context")
    if config.max_length is None:
        length = min(context, bucket(bucket(longest) + config.max_new_tokens))
    else:
        length = config.max_length
        require(length <= context, "max_length", length, f"at most {context}, the model's context")
        require(needed <= length, words, needed, f"at most max_length = {length}")
    gamma, cost = 0, None
    if config.mode == "quantspec" and config.gamma == "auto":
        gamma, cost = min(MOST_DRAFTED, config.group_size - 1), config.draft_cost
        cost = cost or _draft_cost(model, length, config.group_size, batch)
    elif config.mode == "quantspec":
        gamma = int(config.gamma)
    cache = CacheConfig(
        max_length=length,
        group_size=config.group_size,
        view=config.target_view,
        pass_width=max(gamma + 1, config.pass_width),
        dtype=model.dtype,
    )
    program = Program(model.config, cache, gamma, config.backend, draft_cost=cost)
    return program, min(bucket(longest), length)


def _draft_cost(model: Model, context: int, group_size: int, batch: int) -> float:
    """Bytes that a draft step reads over those of a verification; rounded, as part of a program."""
    itemsize = model.dtype.itemsize
    costs = bytes_read(
        model.config, model.draft, context, batch=batch, itemsize=itemsize, group_size=group_size
    )
    return round(costs.draft / costs.verify, 3)


def sequence_keys(key: jax.Array | None, batch: int) -> jax.Array:
    """[B] typed keys: `key` itself if it has one a sequence, else folded with each index."""
    if key is None:
        key = jax.random.key(0)
    require(
        isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key),
        "key",
        key,
        "a typed key, jax.random.key(seed), or an array of one a sequence",
    )
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    require(key.shape == (batch,), "key shape", key.shape, f"() or ({batch},)")
    return key


def eos_array(ids: Sequence[int]) -> np.ndarray:
    """End-of-sequence ids, padded with −1 so that their number compiles nothing."""
    slots = max(EOS_SLOTS, len(ids))
    return np.array([*ids, *[-1] * (slots - len(ids))], np.int32)


class _Memory:
    """What a run needs of the device, by part, and which of it lies there already."""

    def __init__(self, model: Model, program: Program, batch: int):
        self.what = f"a context of {program.cache.max_length} tokens, {batch} at a time,"
        self.parts = {"weights": tree_bytes(model.params)}
        self.made = {"weights"}
        if program.gamma:
            self.parts["draft"] = draft_bytes(model.config, model.draft)
            if model.has_draft_arrays:
                self.made.add("draft")
        if free_bytes() is not None:
            cache = jax.eval_shape(lambda: create(model.config, program.cache, batch))
            self.parts["cache"] = tree_bytes(cache)
        self.check()

    def check(self) -> None:
        """ValueError unless the parts that are still to be made fit."""
        require_memory(self.what, self.parts, sum(self.parts.get(name, 0) for name in self.made))


class _Chunk(NamedTuple):
    """Rounds between two looks of the host, and what a draft step is taken to cost in them."""

    rounds: int
    draft_cost: float


@dataclasses.dataclass
class _Clock:
    """Seconds by part; compilation is in neither of the other two."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


class _Run:
    """One call of `generate`: the device's state, and the host's view of it between chunks."""

    def __init__(
        self,
        model: Model,
        prompts: list[list[int]],
        config: GenerateConfig,
        key: jax.Array | None,
        progress: bool = False,
    ):
        self.model, self.prompts, self.config, self.progress = model, prompts, config, progress
        batch = len(prompts)
        self.backend = backend_in_use(config.backend)
        self.program, padded = program_for(model, config, max(map(len, prompts)), batch)
        self.eos = config.end_ids(model.config.eos_ids, model.config.vocab_size)
        self.streams = [TextStream(model.tokenizer, config.stop, prompt) for prompt in prompts]
        self.taken = [0] * batch  # new tokens of the device's state that the streams have
        self.clock = _Clock()
        self.counters = dict.fromkeys(("rounds", "proposed", "accepted"), [0] * batch)
        self.finished = np.zeros(batch, bool)
        self.cache_bytes: dict[str, int] = {}
        self._padded = np.zeros((batch, padded), np.int32)
        for row, prompt in zip(self._padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._keys = sequence_keys(key, batch)
        self._memory = _Memory(model, self.program, batch)
        self._last: Any = None  # the program that was run last
        self.draft_cost = self.program.draft_cost

    def chunks(self) -> Iterator[list[str]]:
        """Decode; yield the new text of each sequence after the prefill and after each chunk."""
        model, config, program = self.model, self.config, self.program
        batch = len(self.prompts)
        sampling = sampling_arrays(config, batch)
        eos = jnp.asarray(eos_array(self.eos))
        draft_params = model.draft_params if program.gamma else {}
        self._memory.made.add("draft")

        with self._bar() as bar:
            started, compiled = time.perf_counter(), self.clock.compile
            state = prefill(
                model.params,
                jnp.asarray(self._padded),
                jnp.asarray([len(p) for p in self.prompts], jnp.int32),
                sampling,
                self._keys,
                eos,
                jnp.full(batch, config.max_new_tokens, jnp.int32),
                program=program,
                capacity=bucket(config.max_new_tokens),
                run=functools.partial(self._stage, bar),
            )
            jax.block_until_ready(state)
            spent = time.perf_counter() - started
            self.clock.prefill = spent - (self.clock.compile - compiled)
        self.cache_bytes = cache_bytes(state.cache, program.cache.max_length)
        yield self._look(state)
        schedule = self._schedule()
        while not self.finished.all():
            chunk = next(schedule)
            state = dataclasses.replace(
                state,
                finished=jnp.asarray(self.finished),
                draft_cost=jnp.float32(chunk.draft_cost),
            )
            args = (model.params, draft_params, state, sampling, eos, jnp.int32(chunk.rounds))
            state = self._decode(*args, program=program)
            yield self._look(state)
        for stream in self.streams:
            stream.finish()

    def _schedule(self) -> Iterator[_Chunk]:
        """Chunks without end. Where γ is adaptive and no cost is given, the first ones are a few
        rounds with drafts and a few without, to measure it; not where tokens would depend on it."""
        config, rounds = self.config, self.config.rounds_per_chunk
        bytes_cost = self.program.draft_cost
        if bytes_cost and config.draft_cost is None and config.temperature == 0:
            yield _Chunk(1, bytes_cost)  # what runs for the first time takes longer
            timings = []
            for cost in (bytes_cost, NEVER):
                before = self._timing()
                yield _Chunk(min(3, rounds), cost)
                timings.append(self._timing().since(before))
            self.draft_cost = measured_cost(*timings) or bytes_cost
        while True:
            yield _Chunk(rounds, self.draft_cost or 0)

    def _timing(self) -> Timing:
        """Of the decoding so far; a round drafts as many tokens as its longest sequence counts."""
        rounds, drafted = (max(self.counters[name]) for name in ("rounds", "proposed"))
        return Timing(rounds, drafted, self.clock.decode)

    def _bar(self) -> tqdm:
        """Progress of the prompt's blocks, on a terminal."""
        disable = None if self.progress else True
        layers = self.model.config.num_layers
        return tqdm(total=layers, desc="prompt", unit=" layers", leave=False, disable=disable)

    def _ready(self, function: Any, *args: Any, results: int = 0, **static: Any) -> Any:
        """The compiled program; at its first use it and `results` bytes are known to fit beside
        what lies on the device."""
        executable, seconds = _compile(function, *args, **static)
        self.clock.compile += seconds
        if function is not self._last:
            self._last = function
            self._memory.parts["temporaries"] = temporary_bytes(executable) + results
            self._memory.check()
        return executable

    def _stage(self, bar: tqdm, stage: Any, *args: Any, **static: Any) -> Any:
        """Run a stage of the prefill; the host waits for it only to show how far it is."""
        results = 0
        if stage is begin:  # hidden states lie on the device until the end
            hidden = 2 * self._padded.size * self.model.config.hidden_size
            results = hidden * self.model.dtype.itemsize
        elif stage is end:
            self._memory.made.add("cache")
        out = self._ready(COMPILED[stage], *args, results=results, **static)(*args)
        if stage is layer and not bar.disable:
            jax.block_until_ready(out)
            bar.update()
        return out

    def _decode(self, *args: Any, **static: Any) -> DecodeState:
        executable = self._ready(_generate_tokens, *args, **static)
        begin = time.perf_counter()
        state = jax.block_until_ready(executable(*args))
        self.clock.decode += time.perf_counter() - begin
        return state

    def _look(self, state: DecodeState) -> list[str]:
        """Bring the new tokens to the host; find stop strings."""
        count, tokens = np.asarray(state.count), np.asarray(state.tokens)
        self.finished = np.array(state.finished)
        for name in self.counters:
            self.counters[name] = np.asarray(getattr(state, name)).tolist()
        pieces = []
        for i, stream in enumerate(self.streams):
            new = tokens[i, self.taken[i] : count[i]].tolist()
            self.taken[i] = int(count[i])
            piece = stream.push(new)
            if stream.stopped:
                self.finished[i] = True
            elif self.finished[i]:
                piece += stream.finish()
            pieces.append(piece)
        return pieces

    def result(self) -> Generation:
        """Texts, tokens and statistics of what was produced so far."""
        for stream in self.streams:
            stream.finish()
        return Generation(
            [stream.text for stream in self.streams],
            [stream.tokens for stream in self.streams],
            [self._stats(i) for i in range(len(self.prompts))],
        )

    def _finish_reason(self, i: int) -> str:
        tokens = self.streams[i].tokens
        if self.streams[i].stopped:
            return "stop"
        if tokens and tokens[-1] in self.eos:
            return "eos"
        if len(tokens) >= self.config.max_new_tokens:
            return "length"
        return "interrupted"

    def _stats(self, i: int) -> dict[str, Any]:
        config, clock, batch = self.config, self.clock, len(self.prompts)
        rounds, proposed, accepted = (self.counters[k][i] for k in self.counters)
        new = len(self.streams[i].tokens)
        later = max(new - 1, 0)  # the first token is the prefill's
        adaptive = {
            "mean_gamma": proposed / rounds if rounds else None,
            "draft_cost": self.draft_cost,
        }
        return {
            "finish_reason": self._finish_reason(i),
            "mode": config.mode,
            "kv": config.target_view,
            "gamma": config.gamma if self.program.gamma else None,
            "backend": self.backend,
            "dtype": self.model.dtype.name,
            "prompt_tokens": len(self.prompts[i]),
            "new_tokens": new,
            "rounds": rounds,
            "proposed": proposed,
            "accepted": accepted,
            "acceptance_rate": accepted / proposed if proposed else None,
            "tokens_per_round": later / rounds if rounds else None,
            "prefill_seconds": clock.prefill,
            "decode_seconds": clock.decode,
            "decode_tokens_per_second": later / clock.decode if clock.decode else None,
            "compile_seconds": clock.compile,
            "cache_bytes": {name: n // batch for name, n in self.cache_bytes.items()},
            **(adaptive if self.program.draft_cost is not None else {}),
        }


def backend_in_use(backend: str) -> str:
    """Which kernels run under `backend`.

    Raises:
      NotImplementedError: `mosaic_gpu` without a device that can run it.
    """
    return "mosaic_gpu" if use_mosaic_gpu(backend, "generate", None) else "xla"


def _start(
    model: Model,
    prompts: Any,
    config: GenerateConfig | None,
    key: jax.Array | None,
    progress: bool = False,
) -> _Run:
    ids = read_prompts(prompts, model.tokenizer, model.config.vocab_size)
    return _Run(model, ids, config or GenerateConfig(), key, progress)


def generate(
    model: Model,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    key: jax.Array | None = None,
    *,
    on_text: OnText | None = None,
    progress: bool = False,
) -> Generation:
    """Continue prompts.

    Args:
      model: from `load`.
      prompts: a text, a list of texts, token ids, or a list of lists of token ids.
      config: how to decode.
      key: a typed PRNG key, folded with each sequence's index, or an array of one a sequence.
        Default `jax.random.key(0)`.
      on_text: called with (index of the prompt, new text) as text becomes final.
      progress: show on a terminal (standard error) how far the prompt is; the device then waits for
        the host after each layer.

    An interruption (Ctrl-C) ends the decoding; what was produced so far is returned, its
    `finish_reason` is `interrupted`.

    Raises:
      ValueError: an argument is wrong, or prompt and new tokens exceed the model's context or the
        device's memory.
      NotImplementedError: the backend cannot do it.
    """
    run = _start(model, prompts, config, key, progress)
    try:
        for pieces in run.chunks():
            for i, piece in enumerate(pieces):
                if on_text is not None and piece:
                    on_text(i, piece)
    except KeyboardInterrupt:
        pass
    return run.result()


def stream(
    model: Model,
    prompt: str | Sequence[int],
    config: GenerateConfig | None = None,
    key: jax.Array | None = None,
) -> Iterator[str]:
    """Continue one prompt; iterate over pieces of text as they become final. Arguments as in
    `generate`, and checked here, before the first piece is asked for."""
    run = _start(model, prompt, config, key)
    require(len(run.prompts) == 1, "prompt", f"{len(run.prompts)} prompts", "one prompt")
    return (pieces[0] for pieces in run.chunks() if pieces[0])
