"""What the host has of one sequence: its text, where it stops, its statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels.dispatch import use_mosaic_gpu
from quantspec_jax.engine import programs
from quantspec_jax.engine.engine import Engine, TokenLogprob
from quantspec_jax.engine.statistics import NO_ROUNDS, Clock, Counters, speed
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.loading import Model
from quantspec_jax.text.detokenize import TextStream


class Reply:
    """The new text of one sequence, as the engine makes it.

    Args:
      model, prompt, config: what was asked for.

    Attributes:
      finish_reason: eos, stop or length; None while there may be more, interrupted where somebody
        else ended it, broken where the model's logits were not finite.
      kept: tokens of the prompt that were not read again.
      spans: the text in pieces, and whether each one's last token was drafted.
    """

    def __init__(self, model: Model, prompt: Sequence[int], config: GenerateConfig):
        self.model, self.prompt_tokens, self.config = model, len(prompt), config
        self.finish_reason: str | None = None
        self.kept = 0
        self.counters: Counters | None = None
        self._ends = config.end_ids(model.config.eos_ids, model.config.vocab_size)
        self._stream = TextStream(model.tokenizer, config.stop, prompt)
        self._taken = 0
        self.spans: list[tuple[str, bool]] = []
        self._drafted: list[bool] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def text(self) -> str:
        """All of it, as far as it is final."""
        return self._stream.text

    @property
    def tokens(self) -> list[int]:
        """New token ids, up to the end token or the one that completes a stop string."""
        return self._stream.tokens

    @property
    def drafted(self) -> list[bool]:
        """Which of `tokens` the draft proposed."""
        return self._drafted[: len(self.tokens)]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Of `tokens`, where they were asked for."""
        return self._logprobs[: len(self.tokens)]

    def look(self, engine: Engine, slot: int) -> str:
        """Take what is new in the slot; returns the text that became final. A sequence that met a
        stop string is ended."""
        found = engine.read(slot, self._taken)
        self._taken += len(found.tokens)
        self.counters, self.kept = found.counters, found.kept
        self._drafted += found.drafted
        self._logprobs += found.logprobs
        before = len(self.spans)
        for token, drafted in zip(found.tokens, found.drafted, strict=True):
            self._add(self._stream.push([token]), drafted)
        if found.finished and not self._stream.stopped:
            self._add(self._stream.finish(), False)
        if self._stream.stopped:
            engine.finish(slot)
        if self._stream.stopped or found.finished:
            self.finish_reason = "broken" if found.broken else self._reason()
        return "".join(text for text, _ in self.spans[before:])

    def _add(self, text: str, drafted: bool) -> None:
        if text:
            self.spans.append((text, drafted))

    def interrupt(self) -> str:
        """There will be no more; returns text that was held back."""
        piece = self._stream.finish()
        self.finish_reason = self.finish_reason or self._reason()
        return piece

    def _reason(self) -> str:
        tokens = self.tokens
        if self._stream.stopped:
            return "stop"
        if tokens and tokens[-1] in self._ends:
            return "eos"
        return "length" if len(tokens) >= self.config.max_new_tokens else "interrupted"

    def statistics(self, engine: Engine, clock: Clock) -> dict[str, Any]:
        """The keys of `quantspec generate --json`; `engine` made it, in the seconds of `clock`."""
        config, new = engine.config, len(self.tokens)
        counted = (self.counters or NO_ROUNDS).statistics(new)
        adaptive: dict[str, Any] = {}
        if engine.adaptive is not None:
            rounds = counted["rounds"]
            mean = counted["proposed"] / rounds if rounds else None
            adaptive = {"mean_gamma": mean, "draft_cost": engine.adaptive.cost}
        return {
            "finish_reason": self.finish_reason or "interrupted",
            "mode": config.mode,
            "kv": config.target_view,
            "gamma": config.gamma if config.mode == "quantspec" else None,
            "coupling": config.coupling if config.mode == "quantspec" else None,
            "draft_policy": engine.program.policy.name if config.mode == "quantspec" else None,
            "backend": backend_in_use(config.backend),
            "dtype": self.model.dtype.name,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.kept,
            "new_tokens": new,
            **counted,
            **speed(clock, new),
            "programs": programs.PROGRAMS.statistics(),
            "cache_bytes": {name: n // engine.slots for name, n in engine.cache_bytes.items()},
            **adaptive,
        }


def backend_in_use(backend: str) -> str:
    """Which kernels run under `backend`.

    Raises:
      NotImplementedError: `mosaic_gpu` without a device that can run it.
    """
    return "mosaic_gpu" if use_mosaic_gpu(backend, "generate", None) else "xla"


def since(now: Clock, before: Clock) -> Clock:
    """The seconds between two looks at a clock."""
    names = [field.name for field in dataclasses.fields(Clock)]
    return Clock(**{name: getattr(now, name) - getattr(before, name) for name in names})
