"""Between HTTP and the scheduler: requests to jobs, in a thread that steps them, and events back.
Knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import secrets
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import jax

from quantspec_jax.checks import require
from quantspec_jax.engine.engine import Engine
from quantspec_jax.engine.prefixes import Prefixes
from quantspec_jax.engine.scheduler import BusyError, ClosedError, Event, Job, Scheduler
from quantspec_jax.engine.statistics import Clock
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.logprobs import MOST as MOST_LOGPROBS
from quantspec_jax.loading import Model
from quantspec_jax.memory import give_back
from quantspec_jax.server.metrics import Metrics
from quantspec_jax.server.requests import ChatRequest, CompletionRequest, RefusedError
from quantspec_jax.text.chat import conversation_ids
from quantspec_jax.text.prompts import encode, read_prompts


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How to serve.

    slots        sequences that decode at a time
    max_length   tokens of a prompt and its answer together
    queue        requests that may wait
    seconds      that a request may take, waiting included
    cache_bytes  of the host's memory, for prompts that come again
    body_bytes   of a request
    body_seconds until a request's body has to be there
    api_key      that clients have to give; None: none
    name         of the model
    """

    slots: int = 4
    max_length: int = 8192
    queue: int = 64
    seconds: float = 600.0
    cache_bytes: int = 4 << 30
    body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    api_key: str | None = None
    name: str = "model"

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "queue", "seconds", "body_bytes", "body_seconds"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a number > 0")
        require(self.cache_bytes >= 0, "cache_bytes", self.cache_bytes, "0 or more bytes")
        require(self.api_key != "", "api_key", self.api_key, "a text of one character or more")


class Service:
    """A model that answers.

    Args:
      model: from `load`.
      decoding: the program's part of it counts (mode, gamma, draft policy, coupling, backend).
    """

    def __init__(self, model: Model, decoding: GenerateConfig, config: ServerConfig):
        self.model, self.config = model, config
        length = min(config.max_length, model.config.max_context)
        require(length >= 2, "max_length", length, "2 tokens or more")
        self.length = length
        self._base = dataclasses.replace(
            decoding,
            max_length=length,
            max_new_tokens=length - 1,
            prefill="tiles",
            logprobs=MOST_LOGPROBS,
        )
        prefixes = Prefixes(config.cache_bytes)
        engine = Engine(model, self._base, 1, config.slots, prefixes)
        self.metrics = Metrics()
        self.scheduler = Scheduler(engine, config.queue, self.metrics.ended)
        self.metrics.watch(self.scheduler)
        self._stopping = threading.Event()
        self.broken: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Make the programs that requests need, and the thread that steps."""
        engine = self.scheduler.engine
        new = min(4, self.length - 1)
        wish = dataclasses.replace(
            self._base, max_new_tokens=new, ignore_eos=True, logprobs=None, temperature=0.0
        )
        prompt = [0] * max(1, min(2 * self._base.group_size + 1, self.length - new))
        for _ in range(2):  # the second one keeps a tile of the first one
            (slot,) = engine.add([prompt], wish)
            while engine.running:
                engine.advance(1)
            engine.remove(slot)
        engine.compile_ahead()
        give_back()
        engine.clock = Clock()
        self._thread.start()

    def end(self) -> None:
        """End what runs and what waits, whose clients are told; no more is taken."""
        self._stopping.set()
        self.scheduler.cancel()

    def stop(self) -> None:
        """The same, and wait until it has."""
        self.end()
        if self._thread.is_alive():
            self._thread.join()
        self.scheduler.engine.close()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if not self.scheduler.step():
                    self.scheduler.wait(1.0)
        except Exception as error:  # not a request's fault, these are checked before
            self.broken = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            self.scheduler.fail()

    # Requests.

    def ids(self, request: CompletionRequest | ChatRequest) -> list[list[int]]:
        """Token ids of its prompts; ValueError where they are none."""
        tokenizer = self.model.tokenizer
        if isinstance(request, ChatRequest):
            return [conversation_ids([m.plain() for m in request.messages], tokenizer)]
        vocabulary = self.model.config.vocab_size
        return [ids for p in request.prompts for ids in read_prompts(p, tokenizer, vocabulary)]

    def wish(self, request: CompletionRequest | ChatRequest, prompt: int) -> GenerateConfig:
        """How a request wants a prompt of so many tokens continued."""
        room = self.length - prompt
        if room < 1:
            words = f"the prompt has {prompt} tokens; allowed: 1 to {self.length - 1}"
            raise RefusedError(400, words, "prompt", "context_length_exceeded")
        new = room if request.most_tokens is None else request.most_tokens
        if new > room:
            words = f"{prompt} prompt tokens and max_tokens {new}; allowed: {self.length} together"
            raise RefusedError(400, words, "max_tokens", "context_length_exceeded")

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return dataclasses.replace(
            self._base,
            max_new_tokens=new,
            temperature=float(given(request.temperature, 1.0)),
            top_p=float(given(request.top_p, 1.0)),
            top_k=max(given(request.top_k, 0), 0),  # −1, elsewhere, means off
            min_p=float(given(request.min_p, 0.0)),
            repetition_penalty=float(given(request.repetition_penalty, 1.0)),
            stop=request.stops,
            ignore_eos=request.ignore_eos,
            logprobs=request.alternatives,
        )

    async def jobs(self, request: CompletionRequest | ChatRequest) -> Answers:
        """Submit a request's sequences, `n` of each prompt.

        Raises:
          ValueError, RefusedError: it cannot be answered, or not now.
        """
        # Tokenizer and template may take a while; other requests go on.
        prompts = await asyncio.to_thread(self.ids, request)
        seed = secrets.randbits(32) if request.seed is None else request.seed & 0xFFFFFFFF
        answers = Answers(self)
        for prompt in prompts:
            wish = self.wish(request, len(prompt))
            for _ in range(request.n):
                key = functools.partial(_key, seed, len(answers.jobs))
                answers.add(prompt, wish, key, request.speculate)
        try:
            self.scheduler.submit(*answers.jobs)
        except ClosedError:
            raise RefusedError(503, "the server cannot answer any more") from None
        except BusyError:
            words = f"{self.config.queue} requests are waiting already"
            raise RefusedError(
                429, words, code="queue_full", headers={"Retry-After": "2"}
            ) from None
        return answers

    def tokenize(self, prompt: str, special: bool) -> list[int]:
        """Token ids of a text."""
        return encode(prompt, self.model.tokenizer, special=special) if prompt else []


def _key(seed: int, number: int) -> jax.Array:
    """The key that `generate` gives sequence `number` of a call with `jax.random.key(seed)`."""
    return jax.random.fold_in(jax.random.key(seed), number)[None]


class Answers:
    """The sequences of one request, and their events as they come."""

    def __init__(self, service: Service):
        self.jobs: list[Job] = []
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def add(
        self, prompt: Sequence[int], wish: GenerateConfig, key: Any, speculate: bool = True
    ) -> None:
        """One more sequence."""
        number, loop, events = len(self.jobs), self._loop, self._events

        def listen(event: Event) -> None:  # knows no answers, which would keep each other
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, (number, event))

        seconds = self._service.config.seconds
        self.jobs.append(Job(list(prompt), wish, key, listen, seconds, speculate))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(number, event) of all sequences until each has ended.

        Raises:
          RefusedError: one took too long, or cannot be answered.
        """
        left = len(self.jobs)
        while left:
            number, event = await self._events.get()
            if event.finish_reason == "interrupted":
                if self.jobs[number].late:
                    words = f"it took over {self._service.config.seconds:g} seconds"
                    raise RefusedError(504, words, code="timeout")
                raise RefusedError(503, "the server ended the request")
            if event.finish_reason == "broken":
                raise RefusedError(500, "the model's logits are not finite")
            left -= event.finish_reason is not None
            yield number, event

    def close(self) -> None:
        """Nobody wants more of it."""
        self._service.scheduler.cancel(*self.jobs)

    async def close_when_gone(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Close when the client has gone, or has all of the answer."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.close()
