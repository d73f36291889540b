"""`/metrics`, in Prometheus' form. Of requests counts and seconds alone are kept."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from quantspec_jax.engine.programs import PROGRAMS
from quantspec_jax.engine.scheduler import Job, Scheduler

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"quantspec_{name}", words, labels, registry=self._registry)

        self._requests = counter("requests", "sequences that ended, by how", "finish_reason")
        self._new = counter("new_tokens", "tokens made")
        self._prompt = counter("prompt_tokens", "tokens of prompts")
        self._hits = counter("cached_prompt_tokens", "tokens of prompts that were kept: hits")
        self._misses = counter("read_prompt_tokens", "tokens of prompts that were read: misses")
        self._rounds = counter("rounds", "rounds of all sequences")
        self._proposed = counter("proposed_tokens", "drafted tokens that counted")
        self._accepted = counter("accepted_tokens", "drafted tokens that were accepted")

        def histogram(name: str, words: str) -> Histogram:
            return Histogram(
                f"quantspec_{name}_seconds", words, buckets=SECONDS, registry=self._registry
            )

        self._first = histogram("time_to_first_token", "from a request's arrival")
        self._waited = histogram("queue", "until a request had a slot")

    def watch(self, scheduler: Scheduler) -> None:
        """Gauges of what is now."""
        engine = scheduler.engine

        def gauge(name: str, words: str, value: Callable[[], float]) -> None:
            Gauge(f"quantspec_{name}", words, registry=self._registry).set_function(value)

        gauge("queue", "sequences that wait", lambda: scheduler.waiting)
        gauge("slots", "sequences that can decode at a time", lambda: engine.slots)
        gauge("slots_in_use", "sequences in slots", lambda: scheduler.running)
        gauge("cache_bytes", "of all slots", lambda: engine.cache_bytes.get("total", 0))
        prefixes = engine.prefixes
        if prefixes is not None:
            gauge("kept_bytes", "of tiles kept for other prompts", lambda: prefixes.bytes)
        gauge("decode_seconds", "spent in rounds", lambda: engine.clock.decode)
        gauge("prefill_seconds", "spent in prompts", lambda: engine.clock.prefill)
        gauge("tokens_per_second", "new tokens, over seconds in rounds", lambda: _rate(scheduler))
        gauge("acceptance_rate", "accepted over proposed", lambda: _acceptance(scheduler))
        gauge("programs_kept", "compiled programs", lambda: PROGRAMS.statistics()["kept"])
        gauge("programs_made", "compilations so far", lambda: PROGRAMS.statistics()["made"])

    def ended(self, job: Job) -> None:
        """A sequence is over."""
        reply = job.reply
        assert reply is not None
        self._requests.labels(reply.finish_reason or "interrupted").inc()
        self._new.inc(len(reply.tokens))
        if job.slot is None:
            return
        self._prompt.inc(len(job.prompt))
        self._hits.inc(reply.kept)
        self._misses.inc(len(job.prompt) - reply.kept)
        if reply.counters is not None:
            self._rounds.inc(reply.counters.rounds)
            proposed, accepted = reply.counters.totals
            self._proposed.inc(proposed)
            self._accepted.inc(accepted)
        if job.first_token is not None:
            self._first.observe(job.first_token)
        if job.waited is not None:
            self._waited.observe(job.waited)

    def text(self) -> bytes:
        """What is scraped."""
        return generate_latest(self._registry)


def _rate(scheduler: Scheduler) -> float:
    seconds = scheduler.engine.clock.decode
    return scheduler.totals.new_tokens / seconds if seconds else 0.0


def _acceptance(scheduler: Scheduler) -> float:
    totals = scheduler.totals
    return totals.accepted / totals.proposed if totals.proposed else 0.0
