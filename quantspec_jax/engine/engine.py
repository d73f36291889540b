"""The engine: a fixed number of slots, stepped by hand.

    slots = engine.add(requests)         prompts run; free slots take the sequences
    engine.step()                        a chunk of rounds for all slots
    engine.read(slot)                    what the slot's sequence has made so far
    engine.remove(slot)                  the slot is free again

`generate` and `stream` are callers of it. A sequence in a slot is not touched by what comes and
goes in the others.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from quantspec_jax.cache import cache_bytes, create
from quantspec_jax.checks import require
from quantspec_jax.engine import draft_cost
from quantspec_jax.engine.adaptive import AdaptiveGamma
from quantspec_jax.engine.bucket import bucket
from quantspec_jax.engine.prepare import known_sampled, pad, program_for
from quantspec_jax.engine.programs import Runner
from quantspec_jax.engine.statistics import Clock, Counters
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.prefill import COMPILED, begin, end, layer, prefill
from quantspec_jax.generate.requests import Requests, requests
from quantspec_jax.generate.state import DecodeState, Program, insert
from quantspec_jax.loading import Model
from quantspec_jax.sharding import mesh_of, place_cache

TRIAL_PAYS = 64  # new tokens; fewer are decoded sooner than the cost of a draft step is known
INSERT = jax.jit(insert, donate_argnames="state")


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a slot's sequence has made: its new token ids, whether it has finished, counters."""

    tokens: list[int]
    finished: bool
    counters: Counters


class Engine:
    """Decodes the sequences of `slots` slots together.

    Args:
      model: from `load`.
      config: the program's part of it counts for all slots (mode, kv, gamma, coupling, group_size,
        backend), and is what requests want that say nothing else.
      longest: tokens of the longest prompt that will come.
      slots: how many sequences run at a time.

    Raises:
      ValueError: prompts and new tokens exceed the model's context, or the device's memory.
    """

    def __init__(self, model: Model, config: GenerateConfig, longest: int, slots: int = 1):
        require(slots >= 1, "slots", slots, "an integer ≥ 1")
        self.model, self.config, self.slots = model, config, slots
        self.program, self.padded = program_for(model, config, longest)
        self.capacity = bucket(config.max_new_tokens)
        self.clock = Clock()
        self.adaptive: AdaptiveGamma | None = None
        self.cache_bytes: dict[str, int] = {}
        self._runner = Runner(model, self.program, slots)
        self._state: DecodeState | None = None
        self._used = np.zeros(slots, bool)
        self._ended = np.zeros(slots, bool)  # by the host, since the last step
        self._sampled = np.zeros(slots, bool)
        self._seen: dict[str, np.ndarray] = {}

    # Slots.

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerateConfig | None = None,
        keys: jax.Array | None = None,
        *,
        progress: bool = False,
    ) -> list[int]:
        """Run prompts and put their sequences into free slots, side by side; returns these.

        Args:
          prompts: token ids of each, as many as there are free slots at most.
          config: what the sequences want; None: the engine's own.
          keys: a typed key for all, or one a sequence.
          progress: show on a terminal how far the prompts are.

        Raises:
          ValueError: too many prompts, or too long ones, or the model's logits after one are not
            finite; then no slot is taken.
        """
        config = config or self.config
        number = len(prompts)
        first = self._free(number)
        lengths = [len(prompt) for prompt in prompts]
        allowed = f"1 to {self.padded}"
        require(min(lengths) >= 1 and max(lengths) <= self.padded, "prompt", lengths, allowed)
        most = min(self.capacity, self.program.cache.max_length - max(lengths))
        new = config.max_new_tokens
        require(new <= most, "max_new_tokens", new, f"at most {most} in this engine")
        ends = config.end_ids(self.model.config.eos_ids, self.model.config.vocab_size)
        wants = requests(config, keys, ends, number)
        state = self._prefill(prompts, wants, progress)
        if number == self.slots:
            self._state = state
        else:
            running = self._empty(state) if self._state is None else self._state
            call = (running, jnp.int32(first), state)
            self._state = self._runner.ready(INSERT, *call)(*call)
        taken = list(range(first, first + number))
        self._used[taken], self._ended[taken] = True, False
        self._sampled[taken] = config.temperature > 0
        self._look()
        try:
            self._check_finite(taken)
        except ValueError:
            for slot in taken:
                self.remove(slot)
            raise
        return taken

    def step(self, rounds: int | None = None) -> None:
        """A chunk of rounds, `rounds` at most; the host waits for them.

        Raises:
          ValueError: no sequence was ever added; or the model's logits were not finite, which ends
            a sequence and is said at each step until it is removed.
        """
        if self._state is None:
            raise ValueError("the engine has no sequence; allowed: `step` after `add`")
        rounds = rounds or self.config.rounds_per_chunk
        if self._ended.any():
            ended = self._state.finished | jnp.asarray(self._ended)
            self._state = dataclasses.replace(self._state, finished=ended)
            self._ended[:] = False
        program = dataclasses.replace(
            self.program, sampled=known_sampled(bool((self._sampled & self._used).any()))
        )
        if self.config.mode == "quantspec" and self.config.gamma == "auto":
            if self.adaptive is None:
                self._begin_adaptive(program)
            assert self.adaptive is not None
            gamma, rounds = self.adaptive.next_chunk(rounds)
            program = draft_cost.with_gamma(program, gamma)
        before = self._seen
        self._state, seconds = self._decode(self._state, rounds, program)
        self.clock.decode += seconds
        self._look()
        if self.adaptive is not None:
            change = {name: self._seen[name] - before[name] for name in COUNTERS}
            self.adaptive.observe(
                int(change["rounds"].max()), *(change[x].sum(0) for x in COUNTERS[1:3])
            )
        self._check_finite(np.flatnonzero(self._used).tolist())

    def read(self, slot: int, start: int = 0) -> Progress:
        """What the slot's sequence has made, its tokens from number `start` on."""
        seen = self._seen
        count = int(seen["count"][slot])
        return Progress(
            seen["tokens"][slot, start:count].tolist(),
            bool(seen["finished"][slot]) or bool(self._ended[slot]),
            Counters(int(seen["rounds"][slot]), *(seen[x][slot] for x in COUNTERS[1:])),
        )

    def finish(self, slot: int) -> None:
        """End a sequence where it is; it can still be read."""
        self._ended[slot] = True

    def remove(self, slot: int) -> None:
        """End a sequence and free its slot."""
        self.finish(slot)
        self._used[slot] = False

    @property
    def running(self) -> bool:
        """Whether a sequence has not finished."""
        unfinished = self._used & ~self._ended
        return bool((unfinished & ~self._seen["finished"]).any()) if self._seen else False

    # The rest is how.

    def _free(self, number: int) -> int:
        """The first of `number` free slots side by side."""
        require(number >= 1, "prompts", number, "one or more")
        for first in range(self.slots - number + 1):
            if not self._used[first : first + number].any():
                return first
        free = int((~self._used).sum())
        raise ValueError(f"there are {number} prompts; free slots side by side: fewer, {free} free")

    def _prefill(
        self, prompts: Sequence[Sequence[int]], wants: Requests, progress: bool
    ) -> DecodeState:
        tokens, lengths = pad(prompts, self.padded)
        disable = None if progress else True
        layers = self.model.config.num_layers
        with tqdm(total=layers, desc="prompt", unit=" layers", leave=False, disable=disable) as bar:
            started, compiled = time.perf_counter(), self._runner.compile_seconds
            state = prefill(
                self.model.params,
                tokens,
                lengths,
                wants,
                program=self.program.prompt,
                capacity=self.capacity,
                run=functools.partial(self._stage, bar, tokens.size),
            )
            jax.block_until_ready(state)
            spent = time.perf_counter() - started
        self.clock.compile = self._runner.compile_seconds
        self.clock.prefill += spent - (self._runner.compile_seconds - compiled)
        self.cache_bytes = cache_bytes(state.cache, self.program.cache.max_length)
        return state

    def _stage(self, bar: tqdm, tokens: int, stage: Any, *args: Any, **static: Any) -> Any:
        """Run a stage of the prefill; the host waits for it only to show how far it is."""
        results = 0
        if stage is begin:  # hidden states lie on the device until the end
            results = 2 * tokens * self.model.config.hidden_size * self.model.dtype.itemsize
        elif stage is end:
            self._runner.made("cache")
        out = self._runner.ready(COMPILED[stage], *args, results=results, **static)(*args)
        if stage is layer and not bar.disable:
            jax.block_until_ready(out)
            bar.update()
        return out

    def _empty(self, like: DecodeState) -> DecodeState:
        """All slots without a sequence: finished before they began."""
        cache = create(self.model.config, self.program.cache.arrays, self.slots)
        cache = place_cache(cache, mesh_of(self.model.params))

        def rows(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x[:1], (self.slots, *x.shape[1:])).copy()

        names = [field.name for field in dataclasses.fields(like) if field.name != "cache"]
        small = jax.tree.map(rows, {name: getattr(like, name) for name in names})
        small |= {
            "finished": jnp.ones(self.slots, bool),
            "count": jnp.zeros(self.slots, jnp.int32),
        }
        return DecodeState(cache=cache, **small)

    def _decode(
        self, state: DecodeState, rounds: int, program: Program
    ) -> tuple[DecodeState, float]:
        out = self._runner.decode(self.model, state, rounds, program)
        self.clock.compile = self._runner.compile_seconds
        return out

    def _begin_adaptive(self, program: Program) -> None:
        """With the cost that was given, or known, or is measured now."""
        assert self._state is not None
        cost = self.config.draft_cost
        if cost is None:
            key = draft_cost.key_of(self.model, program, self.slots)
            cost = draft_cost.known(key)
            if cost is None and self.config.max_new_tokens < TRIAL_PAYS:
                cost = draft_cost.by_bytes(self.model, program, self.slots)
            if cost is None:
                started, compiled = time.perf_counter(), self.clock.compile
                self._state, cost = draft_cost.measured(self._state, program, self._decode)
                spent = time.perf_counter() - started
                self.clock.trial += spent - (self.clock.compile - compiled)
                draft_cost.keep(key, cost)
        self.adaptive = AdaptiveGamma(cost, self.program.cache.group_size, self.program.gamma)

    def _look(self) -> None:
        """Bring what the host reads of the state to it."""
        assert self._state is not None
        names = ("tokens", "count", "finished", "broken", *COUNTERS)
        self._seen = jax.device_get({name: getattr(self._state, name) for name in names})

    def _check_finite(self, slots: list[int]) -> None:
        """ValueError where the model made no number of what a slot holds."""
        broken = [slot for slot in slots if self._seen["broken"][slot]]
        if broken:
            which = ", ".join(
                f"{slot} (after {int(self._seen['count'][slot])} new tokens)" for slot in broken
            )
            raise ValueError(
                "model: its logits are not finite (NaN or infinity), so there is no next token; "
                f"sequence {which}. The weights may be damaged: load or convert the source again"
            )


COUNTERS = ("rounds", "proposed", "accepted", "draft_pages")
