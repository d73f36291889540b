"""`generate` and `stream`: prompts in, texts and statistics out.

A thin host around the engine, which it asks for a chunk of rounds at a time: to stream text, to
find stop strings, to be interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from pallas_kernels.dispatch import use_mosaic_gpu
from quantspec_jax.checks import require
from quantspec_jax.engine import programs
from quantspec_jax.engine.engine import Engine, Progress
from quantspec_jax.engine.statistics import speed
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.loading import Model
from quantspec_jax.text.detokenize import TextStream
from quantspec_jax.text.prompts import read_prompts

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


class _Run:
    """One call of `generate`: an engine with a slot a prompt, and their texts."""

    def __init__(
        self,
        model: Model,
        prompts: list[list[int]],
        config: GenerateConfig,
        key: jax.Array | None,
        progress: bool = False,
    ):
        self.model, self.prompts, self.config = model, prompts, config
        self.backend = backend_in_use(config.backend)
        self._ends = config.end_ids(model.config.eos_ids, model.config.vocab_size)
        self.streams = [TextStream(model.tokenizer, config.stop, prompt) for prompt in prompts]
        self.engine = Engine(model, config, max(map(len, prompts)), len(prompts))
        self._key, self._progress = key, progress
        self._taken = [0] * len(prompts)  # new tokens that the streams have
        self._seen: list[Progress | None] = [None] * len(prompts)

    def chunks(self) -> Iterator[list[str]]:
        """Decode; yield the new text of each sequence after the prefill and after each chunk."""
        self.engine.add(self.prompts, self.config, self._key, progress=self._progress)
        yield self._look()
        while self.engine.running:
            self.engine.step()
            yield self._look()

    def _look(self) -> list[str]:
        """Give new tokens to the streams; end sequences that have met a stop string."""
        pieces = []
        for slot, stream in enumerate(self.streams):
            found = self._seen[slot] = self.engine.read(slot, self._taken[slot])
            self._taken[slot] += len(found.tokens)
            piece = stream.push(found.tokens)
            if stream.stopped:
                self.engine.finish(slot)
            elif found.finished:
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
            [self._stats(slot) for slot in range(len(self.prompts))],
        )

    def _finish_reason(self, slot: int) -> str:
        tokens, config = self.streams[slot].tokens, self.config
        if self.streams[slot].stopped:
            return "stop"
        if tokens and tokens[-1] in self._ends:
            return "eos"
        if len(tokens) >= config.max_new_tokens:
            return "length"
        return "interrupted"

    def _stats(self, slot: int) -> dict[str, Any]:
        config, engine, batch = self.config, self.engine, len(self.prompts)
        new = len(self.streams[slot].tokens)
        seen = self._seen[slot]
        counted = seen.counters.statistics(new) if seen else {}
        adaptive: dict[str, Any] = {}
        if engine.adaptive is not None:
            rounds = counted["rounds"]
            mean = counted["proposed"] / rounds if rounds else None
            adaptive = {"mean_gamma": mean, "draft_cost": engine.adaptive.cost}
        return {
            "finish_reason": self._finish_reason(slot),
            "mode": config.mode,
            "kv": config.target_view,
            "gamma": config.gamma if config.mode == "quantspec" else None,
            "coupling": config.coupling if config.mode == "quantspec" else None,
            "draft_policy": engine.program.policy.name if config.mode == "quantspec" else None,
            "backend": self.backend,
            "dtype": self.model.dtype.name,
            "prompt_tokens": len(self.prompts[slot]),
            "new_tokens": new,
            **counted,
            **speed(engine.clock, new),
            "programs": programs.PROGRAMS.statistics(),
            "cache_bytes": {name: n // batch for name, n in engine.cache_bytes.items()},
            **adaptive,
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
