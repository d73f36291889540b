"""Requests that come and go: a queue before the engine's slots.

    submit ─ queue ─ slot ─┬─ tiles of the prompt ─┬─ rounds ─ events ─ slot free
                cancel ────┴───────────────────────┘

`step` is called by one thread, everything else by any. A request waits until a slot is free: the
slots' memory is there from the start, so what fits into a slot can be admitted, and what does not
is refused when it comes. While a prompt is read, a tile at a time, others decode between the tiles.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from quantspec_jax.checks import require
from quantspec_jax.engine.engine import Engine, TokenLogprob
from quantspec_jax.engine.reply import Reply
from quantspec_jax.generate.config import GenerateConfig

# Between two looks: so long a cancelled request keeps its slot, one that comes waits for its turn,
# and text for its reader. Fewer rounds would cost more, for a call takes the host milliseconds.
SECONDS = 0.15
FEWEST_ROUNDS, MOST_ROUNDS = 2, 32


@dataclasses.dataclass(frozen=True)
class Event:
    """What is new of a request.

    spans          text, and whether the token that completed it was drafted
    tokens, logprobs  new token ids, and of each its log-probabilities where they were asked for
    finish_reason  eos, stop or length, interrupted or broken; None: more will come
    """

    spans: list[tuple[str, bool]]
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None


class Job:
    """One request.

    Args:
      prompt: token ids.
      config: what it wants.
      key: makes its typed key, of shape (1,).
      listener: called with each event, in the thread that steps.
      seconds: after which it is ended; None: never.
      speculate: False: rounds without a draft will do, where all that run want no more.
    """

    def __init__(
        self,
        prompt: list[int],
        config: GenerateConfig,
        key: Callable[[], jax.Array],
        listener: Callable[[Event], None],
        seconds: float | None = None,
        speculate: bool = True,
    ):
        self.speculate = speculate
        self.prompt, self.config, self.key, self.listener = prompt, config, key, listener
        self.submitted = time.monotonic()
        self.deadline = None if seconds is None else self.submitted + seconds
        self.first_token: float | None = None  # seconds after it was submitted
        self.waited: float | None = None  # seconds until it had a slot
        self.slot: int | None = None
        self.cancelled = False
        self.reply: Reply | None = None
        self._sent = [0, 0]  # spans and tokens

    def news(self) -> Event:
        """What was not sent before."""
        reply = self.reply
        assert reply is not None
        spans, tokens = self._sent
        self._sent = [len(reply.spans), max(tokens, len(reply.tokens))]
        new = reply.tokens[tokens:]
        scores = reply.logprobs[tokens:]
        return Event(reply.spans[spans:], new, scores, reply.finish_reason)

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def over(self) -> bool:
        """Whether nobody wants more of it."""
        return self.cancelled or self.late


class BusyError(Exception):
    """The queue is full."""


class ClosedError(Exception):
    """The engine does not go on."""


def rounds_between_looks(seconds_a_round: float | None, before: int) -> int:
    """What fits into `SECONDS`, by the last call, and twice as many as `before` at most (0 for a
    request's first), so that its text begins soon."""
    if seconds_a_round is None or not before:
        return FEWEST_ROUNDS
    fitting = int(SECONDS / max(seconds_a_round, 1e-9))
    return max(FEWEST_ROUNDS, min(2 * before, fitting, MOST_ROUNDS))


class Pace:
    """Steps of an engine as the server takes them."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.rounds = 0  # of the last step; 0 until the newest request decodes

    def advance(self, speculate: bool = True) -> None:
        """A step (`Engine.advance`)."""
        self.rounds = rounds_between_looks(self.engine.seconds_a_round, self.rounds)
        self.engine.advance(self.rounds, speculate)
        if self.engine.reading:
            self.rounds = 0


@dataclasses.dataclass
class Totals:
    """Since the start."""

    new_tokens: int = 0
    proposed: int = 0
    accepted: int = 0


class Scheduler:
    """Gives the slots of an engine to requests, first come, first served.

    Args:
      engine: whose prompts are read in tiles.
      most_waiting: requests in the queue.
      on_end: called with each request that is over.
    """

    def __init__(
        self,
        engine: Engine,
        most_waiting: int = 64,
        on_end: Callable[[Job], None] = lambda job: None,
    ):
        allowed = "tiles, in an engine whose requests come and go"
        require(engine.config.prefill == "tiles", "prefill", engine.config.prefill, allowed)
        self.engine, self.most_waiting, self.on_end = engine, most_waiting, on_end
        self.totals = Totals()
        self._closed = False
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: dict[int, Job] = {}
        self._pace = Pace(engine)
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in slots."""
        return len(self._running)

    def submit(self, *jobs: Job) -> None:
        """Into the queue, all of them or none.

        Raises:
          ValueError: one of them does not fit into a slot.
          BusyError: the queue has no room for them now.
          ClosedError: nobody steps any more.
        """
        for job in jobs:
            self.engine.check(len(job.prompt), job.config)
        most = self.most_waiting + self.engine.slots
        require(len(jobs) <= most, "sequences of a request", len(jobs), f"at most {most}")
        with self._changed:
            if self._closed:
                raise ClosedError
            if len(self._waiting) + len(jobs) > self.most_waiting + self.engine.free_slots:
                raise BusyError
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, *jobs: Job) -> None:
        """Nobody wants more of them: their slots are free when the rounds that run are done."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Until there is something to do, `seconds` at most."""
        with self._changed:
            if not self._waiting and not self._running:
                self._changed.wait(seconds)

    def step(self) -> bool:
        """End what is over, admit what waits, a tile and rounds, and the news of each request;
        returns whether there was anything to do."""
        self._end_those_over()
        self._admit()
        if not self._running:
            return False
        self._pace.advance(any(job.speculate for job in self._running.values()))
        for slot, job in list(self._running.items()):
            reply = job.reply
            assert reply is not None
            reply.look(self.engine, slot)
            if reply.tokens and job.first_token is None:
                job.first_token = time.monotonic() - job.submitted
            event = job.news()
            if event.spans or event.tokens or event.finish_reason:
                job.listener(event)
            if event.finish_reason is not None:
                self._end(job)
        return True

    def fail(self) -> None:
        """End all requests, and take no more: the engine does not go on."""
        with self._changed:
            self._closed = True
            jobs = [*self._running.values(), *self._waiting]
            self._waiting.clear()
        for job in jobs:
            self._interrupt(job)

    def _end_those_over(self) -> None:
        with self._changed:
            over = [job for job in self._waiting if job.over]
            for job in over:
                self._waiting.remove(job)
        for job in [*over, *(job for job in self._running.values() if job.over)]:
            self._interrupt(job)

    def _interrupt(self, job: Job) -> None:
        if job.reply is None:
            job.reply = Reply(self.engine.model, job.prompt, job.config)
        job.reply.finish_reason = "interrupted"
        job.listener(job.news())
        self._end(job)

    def _end(self, job: Job) -> None:
        reply = job.reply
        assert reply is not None
        if job.slot is not None:
            self.engine.remove(job.slot)
            del self._running[job.slot]
        self.totals.new_tokens += len(reply.tokens)
        if reply.counters is not None:
            proposed, accepted = reply.counters.totals
            self.totals.proposed += proposed
            self.totals.accepted += accepted
        self.on_end(job)

    def _admit(self) -> None:
        while self.engine.free_slots:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            (job.slot,) = self.engine.add([job.prompt], job.config, job.key())
            job.waited = time.monotonic() - job.submitted
            job.reply = Reply(self.engine.model, job.prompt, job.config)
            self._running[job.slot] = job


def statistics(job: Job) -> dict[str, Any]:
    """Of a request so far: rounds, acceptance, seconds."""
    reply = job.reply
    assert reply is not None
    counted = reply.counters.statistics(len(reply.tokens)) if reply.counters else {}
    return {**counted, "seconds_to_first_token": job.first_token, "seconds_waited": job.waited}
