"""`generate` and `stream`: prompts in, texts and statistics out.

A thin host around the engine, which it asks for a chunk of rounds at a time: to stream text, to
find stop strings, to be interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from quantspec_jax.checks import require
from quantspec_jax.engine.engine import Engine, TokenLogprob
from quantspec_jax.engine.reply import Reply, backend_in_use
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.loading import Model
from quantspec_jax.text.prompts import read_prompts

OnText = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns, one entry a prompt in each list.

    text      the new text, without special tokens, cut before a stop string
    tokens    the new token ids, EOS included
    stats     a mapping of statistics; its keys are those of `quantspec generate --json`
    logprobs  one a new token, where the configuration asks for them (`GenerateConfig.logprobs`)
    drafted   which of the new tokens the draft proposed; the others are the target's own
    """

    text: list[str]
    tokens: list[list[int]]
    stats: list[dict[str, Any]]
    logprobs: list[list[TokenLogprob]]
    drafted: list[list[bool]]


class _Run:
    """One call of `generate`: an engine with a slot a prompt, and their replies."""

    def __init__(
        self,
        model: Model,
        prompts: list[list[int]],
        config: GenerateConfig,
        key: jax.Array | None,
        progress: bool = False,
    ):
        self.prompts, self.config = prompts, config
        backend_in_use(config.backend)
        self.replies = [Reply(model, prompt, config) for prompt in prompts]
        self.engine = Engine(model, config, max(map(len, prompts)), len(prompts))
        self._key, self._progress = key, progress

    def chunks(self, heard: bool) -> Iterator[list[str]]:
        """Decode; yield the new text of each sequence after the prefill and after each chunk of
        rounds, or pieces of it if somebody, or a stop string, waits for the text."""
        heard = heard or bool(self.config.stop)
        self.engine.add(self.prompts, self.config, self._key, progress=self._progress)
        yield self._look()
        while self.engine.running:
            self.engine.step(heard=heard)
            yield self._look()

    def _look(self) -> list[str]:
        return [reply.look(self.engine, slot) for slot, reply in enumerate(self.replies)]

    def result(self) -> Generation:
        """Texts, tokens and statistics of what was produced so far."""
        for reply in self.replies:
            reply.interrupt()
        return Generation(
            [reply.text for reply in self.replies],
            [reply.tokens for reply in self.replies],
            [reply.statistics(self.engine, self.engine.clock) for reply in self.replies],
            [reply.logprobs for reply in self.replies],
            [reply.drafted for reply in self.replies],
        )


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
        for pieces in run.chunks(heard=on_text is not None):
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
    return (pieces[0] for pieces in run.chunks(heard=True) if pieces[0])
