"""The engine: a fixed number of slots, stepped by hand.

    slots = engine.add(requests)         free slots take the sequences
    engine.step()                        at most one tile of a prompt, then a chunk of rounds
    engine.read(slot)                    what the slot's sequence has made so far
    engine.remove(slot)                  the slot is free again

`generate`, `stream`, sessions and the server are callers of it. A sequence in a slot is not touched
by what comes and goes in the others.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from quantspec_jax.cache import cache_bytes, create
from quantspec_jax.cache.tiles import get_tile, put_tiles
from quantspec_jax.checks import require
from quantspec_jax.engine import draft_cost
from quantspec_jax.engine.adaptive import AdaptiveGamma, paying
from quantspec_jax.engine.bucket import bucket
from quantspec_jax.engine.prefixes import HostTile, Prefixes, names
from quantspec_jax.engine.prepare import KINDS, known_warpers, pad, program_for
from quantspec_jax.engine.programs import Ahead, Runner
from quantspec_jax.engine.statistics import NO_ROUNDS, Clock, Counters
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.logprobs import Logprobs, nothing
from quantspec_jax.generate.lookup import unseen
from quantspec_jax.generate.prefill import COMPILED, begin, end, layer, prefill
from quantspec_jax.generate.requests import Requests, requests
from quantspec_jax.generate.sampling import GREEDY, Warpers
from quantspec_jax.generate.state import NEVER, STATISTICS, DecodeState, Look, Program, insert
from quantspec_jax.generate.tiles import (
    TILE_STAGES,
    memory_of_unseen,
    stand_still,
    tile_begin,
    tile_end,
    tile_layer,
)
from quantspec_jax.loading import Model
from quantspec_jax.models.decoder import block_params
from quantspec_jax.processes import agreed, everywhere
from quantspec_jax.sharding import mesh_of, place_state

TRIAL_PAYS = 64  # new tokens; fewer are decoded sooner than the cost of a draft step is known
ROUNDS_BESIDE_PROMPTS = 4  # between two tiles of a prompt
# Between two looks where somebody waits for text; on a CPU, which takes long for them, where nobody
# does, too. A call costs the host of an H200 2 to 17 milliseconds beside its rounds.
HEARD_ROUNDS = 32
CHUNK = 128  # of an adaptive γ; and of a first call, for nobody knows how long they take
HEARD_SECONDS = 0.3  # where these rounds do not take as long
UNHEARD_SECONDS = 2.0  # between two looks for an interruption
HEARD_ROUNDS_OF_CPU, ROUNDS_OF_CPU = 4, 32
LOOKED_AT = 1024  # new tokens, or all: one program for most calls
TILES_PUT = 4  # into a slot at once
TILES_PUT_BESIDE = 16  # where others decode: a guess at what takes no longer than to read one
INSERT = jax.jit(insert, donate_argnames="state")
COUNTERS = ("rounds", "proposed", "accepted", "draft_pages", "copied")


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Of one new token: its log-probability under the target's raw distribution, and the likeliest
    tokens there with theirs, the likeliest first."""

    own: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a slot's sequence has made.

    tokens    its new token ids
    finished  whether there will be no more
    counters  of its rounds
    drafted   which tokens the draft proposed (the others are the target's own)
    logprobs  one a token, where they were asked for
    kept      tokens of the prompt that were not read again
    broken    whether the model's logits were not finite, which ended it
    """

    tokens: list[int]
    finished: bool
    counters: Counters
    drafted: list[bool]
    logprobs: list[TokenLogprob]
    kept: int = 0
    broken: bool = False


@dataclasses.dataclass
class _Slot:
    """What the host has of a slot's sequence."""

    warpers: Warpers
    logprobs: int | None
    kept: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    drafted: list[bool] = dataclasses.field(default_factory=list)
    scores: list[TokenLogprob] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Prompt:
    """A prompt that is being read, from `position` on.

    names  of its whole tiles; empty where nothing is kept
    found  tiles of its beginning in the host's memory; None: nobody looked for them
    left   of the newest tile, until the next one is on its way: its number, what shows that it is
           done, and its arrays as they come to the host
    """

    slot: int
    tokens: list[int]
    wants: Requests
    names: list[bytes]
    position: int = 0
    found: list[HostTile] | None = None
    left: tuple[int, jax.Array, Mapping[str, jax.Array]] | None = None


class Engine:
    """Decodes the sequences of `slots` slots together.

    Args:
      model: from `load`.
      config: the program's part of it counts for all slots (mode, kv, gamma, coupling, group_size,
        backend, prefill, the most logprobs), and is what requests want that say nothing else.
      longest: tokens of the longest prompt that will come.
      slots: how many sequences run at a time.
      prefixes: where prompts that are read in tiles find and leave these, besides the slots, whose
        tiles stay until others come; None: each prompt is read whole.

    Raises:
      ValueError: prompts and new tokens exceed the model's context, or the device's memory.
    """

    def __init__(
        self,
        model: Model,
        config: GenerateConfig,
        longest: int,
        slots: int = 1,
        prefixes: Prefixes | None = None,
    ):
        require(slots >= 1, "slots", slots, "an integer ≥ 1")
        self.model, self.config, self.slots = model, config, slots
        self.program, self.padded = program_for(model, config, longest)
        parts = self.program.axes.dp
        require(slots % parts == 0, "prompts", slots, f"multiples of {parts}, the mesh's dp")
        self.capacity = bucket(config.max_new_tokens)
        self.prefixes = prefixes
        self.clock = Clock()
        self.adaptive: AdaptiveGamma | None = None
        self.seconds_a_round: float | None = None  # of the last call, with what it costs to make
        self.cache_bytes: dict[str, int] = {}
        self._prompt_program = self.program.prompt
        self._runner = Runner(model, self.program, slots)
        self._state: DecodeState | None = None
        self._prompts: collections.deque[_Prompt] = collections.deque()
        self._slots: list[_Slot | None] = [None] * slots
        self._ended = np.zeros(slots, bool)  # by the host, since the last step
        self._lie: list[list[bytes]] = [[] for _ in range(slots)]  # names of a slot's whole tiles
        self._standing: dict[int, int] = {}  # where slots are to stand still in the next rounds
        self._seen: DecodeState | None = None  # on the host, what `SEEN` brings of it
        self._ahead: Ahead | None = None

    # Slots.

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerateConfig | None = None,
        keys: jax.Array | None = None,
        *,
        progress: bool = False,
    ) -> list[int]:
        """Put sequences into free slots; returns these. Prompts that are read whole are read now,
        into slots side by side; those that are read in tiles by `step`, each in the slot that has
        most of its tiles.

        Args:
          prompts: token ids of each, as many as there are free slots at most.
          config: what the sequences want; None: the engine's own.
          keys: a typed key for all, or one a sequence.
          progress: show on a terminal how far the prompts are, where they are read whole.

        Raises:
          ValueError: too many prompts, or too long ones, or the model's logits after one are not
            finite; then no slot is taken.
        """
        config = config or self.config
        number = len(prompts)
        tiles = self.config.prefill == "tiles"
        first = self._free(number, side_by_side=not tiles)
        for prompt in prompts:
            self.check(len(prompt), config)
        ends = config.end_ids(self.model.config.eos_ids, self.model.config.vocab_size)
        wants = requests(config, keys, ends, number)
        if tiles:
            each = [jax.tree.map(lambda x, i=i: x[i : i + 1], wants) for i in range(number)]
            return [self._begin_prompt(*pair, config) for pair in zip(prompts, each, strict=True)]
        taken = list(range(first, first + number))
        state = self._prefill(prompts, wants, progress)
        if number == self.slots:
            self._state = state
        else:
            self._insert(first, state)
        for slot in taken:
            self._slots[slot] = _Slot(config.warpers, config.logprobs)
        self._ended[taken] = False
        self._look()
        try:
            self._check_finite(taken)
        except ValueError:
            for slot in taken:
                self.remove(slot)
            raise
        return taken

    def check(self, length: int, config: GenerateConfig) -> None:
        """ValueError unless a prompt of `length` tokens, and what is wanted of it, fit."""
        total = self.program.cache.max_length
        longest = total - 1 if self.config.prefill == "tiles" else self.padded
        require(1 <= length <= longest, "prompt", length, f"1 to {longest} tokens")
        most = min(self.capacity, total - length)
        new = config.max_new_tokens
        require(new <= most, "max_new_tokens", new, f"at most {most} in this engine")
        most = -1 if self.config.logprobs is None else self.config.logprobs
        possible = config.logprobs is None or config.logprobs <= most
        words = "none" if most < 0 else f"at most {most}"
        require(possible, "logprobs", config.logprobs, f"{words} in this engine")

    def step(self, rounds: int | None = None, *, heard: bool = False) -> None:
        """A tile of a prompt, if one waits, and a chunk of rounds, `rounds` at most, if a sequence
        decodes; the host waits for them.

        Args:
          heard: somebody waits for the text: the host looks after fewer rounds. The text is the
            same.

        Raises:
          ValueError: no sequence was ever added; or the model's logits were not finite, which ends
            a sequence and is said at each step until it is removed.
        """
        self.advance(rounds, heard=heard)
        self._check_finite([i for i, slot in enumerate(self._slots) if slot])

    def advance(
        self, rounds: int | None = None, speculate: bool = True, heard: bool = False
    ) -> None:
        """As `step`, but of a sequence without finite logits `read` alone speaks. Without
        speculation the rounds are plain, of a token each: the tokens are the same."""
        if self._state is None:
            raise ValueError("the engine has no sequence; allowed: `step` after `add`")
        if self._prompts:
            self._read_tile()
        if self._decoding():
            rounds = rounds or self.config.rounds_per_chunk
            if self._prompts:
                rounds = min(rounds or ROUNDS_BESIDE_PROMPTS, ROUNDS_BESIDE_PROMPTS)
            self._rounds(rounds, speculate, heard)

    def read(self, slot: int, start: int = 0) -> Progress:
        """What the slot's sequence has made, its tokens from number `start` on."""
        own, seen = self._slots[slot], self._seen
        if own is None or any(prompt.slot == slot for prompt in self._prompts):
            kept = own.kept if own else 0
            return Progress([], bool(self._ended[slot]), NO_ROUNDS, [], [], kept)
        assert seen is not None
        return Progress(
            own.tokens[start:],
            bool(seen.finished[slot]) or bool(self._ended[slot]),
            Counters(int(seen.rounds[slot]), *(getattr(seen, x)[slot] for x in COUNTERS[1:])),
            own.drafted[start:],
            own.scores[start:],
            own.kept,
            bool(seen.broken[slot]),
        )

    def finish(self, slot: int) -> None:
        """End a sequence where it is; it can still be read."""
        self._ended[slot] = True
        for prompt in self._prompts:
            if prompt.slot == slot and prompt.left:  # it did not come to the host: it is read again
                del self._lie[slot][prompt.left[0] :]
        self._prompts = collections.deque(p for p in self._prompts if p.slot != slot)

    def remove(self, slot: int) -> None:
        """End a sequence and free its slot."""
        self.finish(slot)
        self._slots[slot] = None

    def compile_ahead(self) -> None:
        """Make the programs that a sequence of any kind needs, sampled or not, with log-
        probabilities or without: no sequence waits for a compiler from now on. Another γ's are made
        beside the rounds where they promise more, and used when they are there. After a first
        sequence has decoded."""
        state, gamma = self._state, self.program.gamma
        if self.adaptive is not None:
            gamma = self.adaptive.gamma
        scored = {False, self.config.logprobs is not None}
        base = draft_cost.with_gamma(self.program, gamma)
        kinds = [(base, scores) for scores in sorted(scored)]
        kinds += [(draft_cost.without_copies(self.program, 0), False)]  # to compare with
        every = dict.fromkeys(
            dataclasses.replace(program, warpers=w, logprobs=p)
            for program, p in kinds
            for w in map(known_warpers, KINDS)
        )
        meshed = mesh_of(self.model.params) is not None

        def form(x: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if meshed else None)

        if self.prefixes is not None:
            self._prepare_put()
        forms = jax.tree.map(form, state)
        prepare = functools.partial(self._runner.prepare, self.model, forms, self._limit(0))
        self._ahead = Ahead(prepare, base)
        self._ahead.make(list(every))

    def close(self) -> None:
        """No more programs are made beside the rounds."""
        if self._ahead is not None:
            self._ahead.close()

    @property
    def running(self) -> bool:
        """Whether a sequence has not finished."""
        return bool(self._prompts) or self._decoding()

    @property
    def reading(self) -> bool:
        """Whether a prompt is read in tiles, or waits for that."""
        return bool(self._prompts)

    @property
    def free_slots(self) -> int:
        """How many slots have no sequence."""
        return sum(slot is None for slot in self._slots)

    # The rest is how.

    def _decoding(self) -> bool:
        """Whether a sequence is beyond its prompt and has not finished."""
        reading, seen = {prompt.slot for prompt in self._prompts}, self._seen
        return seen is not None and any(
            slot is not None and i not in reading and not self._ended[i] and not seen.finished[i]
            for i, slot in enumerate(self._slots)
        )

    def _free(self, number: int, side_by_side: bool) -> int:
        """The first of `number` free slots, which may have to lie side by side."""
        require(number >= 1, "prompts", number, "one or more")
        free = [i for i, slot in enumerate(self._slots) if slot is None]
        for first, last in zip(free, free[number - 1 :], strict=False):
            if last - first == number - 1 or not side_by_side:
                return first
        where = " side by side" if side_by_side else ""
        words = f"there are {number} prompts; free slots{where}: fewer, {len(free)} free"
        raise ValueError(words)

    def _rounds(self, rounds: int | None, speculate: bool, heard: bool) -> None:
        """A chunk of rounds, or if it is heard a piece of one; None: as long as they may be."""
        assert self._state is not None
        if self._ended.any():
            ended = self._state.finished | jnp.asarray(self._ended)
            self._state = dataclasses.replace(self._state, finished=ended)
            self._ended[:] = False
        for slot, length in self._standing.items():
            self._stand_still(slot, length)
        self._standing.clear()
        used = [slot for slot in self._slots if slot is not None]
        program = dataclasses.replace(
            self.program,
            warpers=known_warpers(
                functools.reduce(operator.or_, (slot.warpers for slot in used), GREEDY)
            ),
            logprobs=any(slot.logprobs is not None for slot in used),
        )
        most = self._most_rounds(heard)
        # Where several rounds read the same pages a call would choose them anew: whether somebody
        # waits may not matter.
        if program.policy.every not in (None, 1):
            rounds, most = min(rounds or HEARD_ROUNDS, HEARD_ROUNDS), None
        adaptive, look = self.config.adapts and speculate, NEVER
        rounds = rounds or (CHUNK if adaptive or most is None else most)
        if not speculate:
            program = draft_cost.without_copies(program, 0)
        if adaptive:
            if self.adaptive is None:
                self._begin_adaptive(program)
            assert self.adaptive is not None
            gamma, rounds, look = self.adaptive.next_chunk(rounds, most, self._may_end_early)
            program = draft_cost.with_gamma(program, gamma)
        elif most is not None:
            rounds = min(rounds, most)
        if self._ahead is not None:
            program = self._ahead.ready(program)
        before = self._seen
        self._state, seconds = self._decode(self._state, rounds, program, look)
        self.clock.decode += seconds
        self._look(rounds * (max(program.gamma, program.lookup) + 1))
        change = {name: getattr(self._seen, name) - getattr(before, name) for name in COUNTERS}
        rounds = int(change["rounds"].max())
        self.seconds_a_round = seconds / max(rounds, 1)
        if adaptive and self.adaptive is not None:
            proposed, accepted = (change[x].sum(0) for x in COUNTERS[1:3])
            self.adaptive.observe(rounds, proposed, accepted, last=not self._decoding())

    def _most_rounds(self, heard: bool) -> int | None:
        """Of a call; None: as many as there are. Several processes have to ask for as many each: of
        these none looks at its clock."""
        if jax.default_backend() == "cpu":
            return HEARD_ROUNDS_OF_CPU if heard else ROUNDS_OF_CPU
        if self.seconds_a_round is None or jax.process_count() > 1:
            return HEARD_ROUNDS if heard else None
        seconds = HEARD_SECONDS if heard else UNHEARD_SECONDS
        return max(HEARD_ROUNDS, int(seconds / max(self.seconds_a_round, 1e-9)))

    # Prompts in tiles. What lies in a slot stays there when its sequence is over: a prompt that
    # begins alike keeps it in place, and the slot stands still behind it until it is read.

    def _begin_prompt(self, tokens: Sequence[int], wants: Requests, config: GenerateConfig) -> int:
        """A prompt waits for its turn in a slot that stands still; returns the slot."""
        if self._state is None:
            self._state = self._empty(memory_of_unseen(self._prompt_program, self.slots))
            self._look()
        g, ids = self.program.cache.group_size, list(map(int, tokens))
        every = names(ids, g) if self.prefixes is not None else []
        useful = every[: self._to_keep(len(ids))]
        slot = self._slot_for(useful)
        lie = self._lie[slot] = self._lie[slot][: self._same(slot, useful)]
        self._standing.pop(slot, None)
        self._stand_still(slot, g * len(lie))
        self._slots[slot] = _Slot(config.warpers, config.logprobs)
        self._ended[slot] = False
        self._prompts.append(_Prompt(slot, ids, wants, every, g * len(lie)))
        return slot

    def _to_keep(self, length: int) -> int:
        """How many tiles of a prompt can be kept: what the next position reads in full precision
        has to be read again, and the last token."""
        return min(self._settled(length), (length - 1) // self.program.cache.group_size)

    def _settled(self, length: int) -> int:
        """Whole tiles of `length` tokens that no later one changes: no flush codes them again."""
        cache, g = self.program.cache, self.program.cache.group_size
        coded = int(cache.codec.quantized_length(jnp.int32(length), g))
        return coded // g if cache.num_tiles else length // g

    def _same(self, slot: int, wanted: Sequence[bytes]) -> int:
        """How many of a prompt's tiles lie in a slot. (Names stand for all before them, too.)"""
        return sum(map(operator.eq, self._lie[slot], wanted))

    def _slot_for(self, wanted: Sequence[bytes]) -> int:
        """The free slot where most of a prompt's tiles lie, less those of others, which would be
        lost."""

        def gain(slot: int) -> int:
            same = self._same(slot, wanted)
            return same - (len(self._lie[slot]) - same)

        return max((i for i in range(self.slots) if self._slots[i] is None), key=gain)

    def _look_up(self, prompt: _Prompt) -> None:
        """What is kept of its beginning, now that prompts before it were read."""
        prompt.found, length = [], len(prompt.tokens)
        own = self._slots[prompt.slot]
        assert own is not None
        if self.prefixes is not None:
            prompt.found = self.prefixes.find(prompt.names[: self._to_keep(length)])
            number = max(len(self._lie[prompt.slot]), len(prompt.found))
            own.kept = self.program.cache.group_size * number
            self.prefixes.count(own.kept, length - own.kept)

    def _put_back(self, prompt: _Prompt) -> bool:
        """What was found and does not lie in the slot goes there, beside others that decode some of
        it at a time; returns whether this took the prompt's turn."""
        assert self._state is not None
        lie, found, beside = self._lie[prompt.slot], prompt.found or [], self._decoding()
        begun = len(lie)
        end = min(len(found), begun + TILES_PUT_BESIDE) if beside else len(found)
        while len(lie) < end:
            first = len(lie)
            number = next(n for n in self._together if n <= end - first)
            self._put(prompt.slot, first, found[first : first + number])
            lie += prompt.names[first : first + number]
            prompt.position = self.program.cache.group_size * len(lie)
            self._standing[prompt.slot] = prompt.position
        if not beside or len(lie) == begun:
            return False
        jax.block_until_ready(self._state.cache.layers)
        return True

    def _put(self, slot: int, first: int, tiles: Sequence[HostTile]) -> None:
        """Tiles from the host's memory into a slot, one after the other from number `first` on."""
        assert self._state is not None
        new: Any = {name: np.concatenate([x[name] for x in tiles], 2) for name in tiles[0]}
        if self.program.mesh is None:
            new = jax.device_put(new)  # once for all layers
        layers = list(self._state.cache.layers)
        try:
            for i, one in enumerate(layers):
                call = (one, new, *map(np.int32, (i, slot, first)))
                layers[i] = self._run(put_tiles, *call, which=(i, len(tiles)), **self._dealt)
        finally:
            self._state = _with_layers(self._state, tuple(layers))

    def _prepare_put(self) -> None:
        """Make what `_put` runs."""
        assert self._state is not None
        layers, none = self._state.cache.layers, np.int32(0)
        tile = jax.eval_shape(functools.partial(get_tile, **self._dealt), layers, none, none)
        for number in self._together:
            new = {
                name: jax.ShapeDtypeStruct(
                    (*x.shape[:2], number * x.shape[2], *x.shape[3:]), x.dtype
                )
                for name, x in tile.items()
            }
            for i, one in enumerate(layers):
                call = (one, new, none, none, none)
                self._program(put_tiles, *call, which=(i, number), **self._dealt)

    @property
    def _together(self) -> tuple[int, ...]:
        """How many tiles are put at once."""
        return (TILES_PUT, 1) if self.program.axes.cp == 1 else (1,)

    @property
    def _dealt(self) -> dict[str, Any]:
        """How tiles lie in the cache."""
        return {"group_size": self.program.cache.group_size, "devices": self.program.axes.cp}

    def _stand_still(self, slot: int, length: int) -> None:
        """The slot's length is what it has of a prompt."""
        assert self._state is not None
        layers, rest = self._state.cache.layers, _with_layers(self._state, ())
        rest = self._run(stand_still, rest, np.int32(slot), np.int32(length))
        self._state = _with_layers(rest, layers)

    def _read_tile(self) -> None:
        """A tile of the prompt that came first, or what is kept of it comes into its slot; after
        its last tile the sequence decodes."""
        started, compiled = time.perf_counter(), self._runner.compile_seconds
        prompt = self._prompts[0]
        if prompt.found is None:
            self._look_up(prompt)
        if not self._put_back(prompt):
            self._read_next(prompt)
        spent = time.perf_counter() - started
        self.clock.compile = self._runner.compile_seconds
        self.clock.prefill += spent - (self._runner.compile_seconds - compiled)

    def _read_next(self, prompt: _Prompt) -> None:
        """The tile at its position. The host waits for the one before it, and for this one where it
        is the last, or others decode."""
        g = self.program.cache.group_size
        number, part = prompt.position // g, prompt.tokens[prompt.position : prompt.position + g]
        hidden = self._run_tile(prompt, part)
        tile = self._copied(prompt.slot, number) if prompt.names and len(part) == g else {}
        self._settle(prompt)
        prompt.left = (number, hidden, tile)
        prompt.position += len(part)
        self._lie[prompt.slot] = prompt.names[: prompt.position // g]
        self._standing[prompt.slot] = prompt.position
        if prompt.position == len(prompt.tokens):
            self._settle(prompt)
            self._end_prompt(prompt, hidden, len(part) - 1)
        elif self._decoding():
            self._settle(prompt)

    def _run_tile(self, prompt: _Prompt, part: list[int]) -> jax.Array:
        """All blocks on a tile; its hidden states after the final norm."""
        assert self._state is not None
        params, program = self.model.params, self._prompt_program
        tokens = np.zeros((1, program.cache.group_size), np.int32)
        tokens[0, : len(part)] = part
        numbers = (prompt.slot, prompt.position, len(prompt.tokens))
        tokens, *where = jax.device_put((tokens, *map(np.int32, numbers)))
        x, h = self._run(tile_begin, params, tokens, program=program)
        layers = list(self._state.cache.layers)
        try:
            for i, of_layer in enumerate(layers):
                call = (*block_params(params, i), x, h, of_layer, *where)
                x, h, layers[i] = self._run(tile_layer, *call, which=i, program=program)
        finally:  # interrupted, too: what was donated is gone
            self._state = _with_layers(self._state, tuple(layers))
        return h

    def _copied(self, slot: int, number: int) -> Mapping[str, jax.Array]:
        """A tile out of the cache, on its way to the host."""
        assert self._state is not None
        call = (self._state.cache.layers, np.int32(slot), np.int32(number))
        tile = self._run(get_tile, *call, **self._dealt)
        tile = everywhere(tile, mesh_of(self.model.params))
        for x in tile.values():
            x.copy_to_host_async()
        return tile

    def _settle(self, prompt: _Prompt) -> None:
        """The newest tile of a prompt is done, and kept."""
        if prompt.left is None:
            return
        number, hidden, tile = prompt.left
        prompt.left = None
        jax.block_until_ready(hidden)
        if tile and self.prefixes is not None:
            self.prefixes.keep(prompt.names[: number + 1], jax.device_get(tile))

    def _end_prompt(self, prompt: _Prompt, hidden: jax.Array, row: int) -> None:
        """Its first token; the slot decodes from now on."""
        length = len(prompt.tokens)
        seen = np.zeros((1, self.model.config.vocab_size), bool)
        seen[0, prompt.tokens] = True
        tokens = pad([prompt.tokens], self.program.cache.max_length)
        call = (self.model.params, hidden, jnp.int32(row), jnp.asarray(seen), *tokens, prompt.wants)
        static: dict[str, Any] = {"program": self._prompt_program, "capacity": self.capacity}
        static |= {"logprobs": self.config.logprobs, "lookup": self.program.lookup}
        one = self._runner.ready(TILE_STAGES[tile_end], *call, **static)(*call)
        assert self._state is not None
        layers = self._state.cache.layers
        self._state = _with_layers(self._state, ())
        self._insert(prompt.slot, one)
        self._state = _with_layers(self._state, layers)
        del self._standing[prompt.slot]
        del self._lie[prompt.slot][self._settled(length) :]
        self._prompts.popleft()
        self._look()

    def _run(self, stage: Any, *args: Any, which: Hashable = 0, **static: Any) -> Any:
        return self._program(stage, *args, which=which, **static)(*args)

    def _program(self, stage: Any, *args: Any, which: Hashable = 0, **static: Any) -> Any:
        """Of a stage whose arguments have one form wherever `which` is the same. (Over a mesh they
        may lie another way.)"""
        if self.program.mesh is not None:
            return self._runner.ready(TILE_STAGES[stage], *args, **static)
        return self._runner.known((stage, which), TILE_STAGES[stage], *args, **static)

    # Whole prompts.

    def _insert(self, first: int, state: DecodeState) -> None:
        """Sequences into the slots from `first` on."""
        if self._state is None:

            def room(x: jax.Array) -> jax.Array:
                return jnp.zeros((self.slots, *x.shape[1:]), x.dtype)

            self._state = self._empty(jax.tree.map(room, state.memory))
        call = (self._state, jnp.int32(first), state)
        self._state = self._runner.ready(INSERT, *call)(*call)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], wants: Requests, progress: bool
    ) -> DecodeState:
        tokens, lengths = pad(prompts, self.padded)
        disable = None if progress else True
        layers = self.model.config.num_layers
        with tqdm(total=layers, desc="prompt", unit=" layers", leave=False, disable=disable) as bar:
            started, compiled = time.perf_counter(), self._runner.compile_seconds
            state = prefill(
                self.model.params_for(self.program.cache),
                tokens,
                lengths,
                wants,
                program=self.program.prompt,
                capacity=self.capacity,
                logprobs=self.config.logprobs,
                lookup=self.program.lookup,
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

    def _empty(self, memory: Any) -> DecodeState:
        """All slots without a sequence: finished before they began."""
        config, batch = self.model.config, self.slots
        self._runner.made("cache")
        mesh = mesh_of(self.model.params)
        cache = create(config, self.program.cache.arrays, batch)
        self.cache_bytes = cache_bytes(cache, self.program.cache.max_length)

        def each(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
            return jnp.zeros((batch, *shape), dtype)

        number, program = self.config.logprobs, self.program
        state = DecodeState(
            cache=cache,
            requests=requests(self.config, jax.random.key(0), (), batch),
            memory=memory,
            seen=each(config.vocab_size, dtype=bool),
            pending=each(),
            tokens=each(self.capacity),
            count=each(),
            finished=~each(dtype=bool),
            broken=each(dtype=bool),
            rounds=each(),
            statistics=each(STATISTICS),
            drafted=each(self.capacity, dtype=bool),
            logprobs=None if number is None else nothing(batch, self.capacity, number),
            lookup=unseen(batch, program.cache.max_length, program.lookup),
        )
        return place_state(state, mesh)

    @property
    def _may_end_early(self) -> bool:
        """Whether calls may end early. (Parts of a batch would end apart.)"""
        return self.config.adapts and self.program.axes.dp == 1

    def _limit(self, rounds: int, look: Look = NEVER) -> tuple[int, ...]:
        """When a call ends."""
        return (rounds, *look) if self._may_end_early else (rounds,)

    def _decode(
        self, state: DecodeState, rounds: int, program: Program, look: Look = NEVER
    ) -> tuple[DecodeState, float]:
        out = self._runner.decode(self.model, state, self._limit(rounds, look), program)
        self.clock.compile = self._runner.compile_seconds
        return out

    def _begin_adaptive(self, program: Program) -> None:
        """With the cost that was given, or known, or is measured now."""
        assert self._state is not None
        cost = self.config.draft_cost
        if cost is None:
            key = draft_cost.key_of(self.model, program, self.slots)
            cost = agreed(draft_cost.known(key))
            if cost is None:
                started, compiled = time.perf_counter(), self.clock.compile
                cost = self._cost_of_drafts(program, key)
                spent = time.perf_counter() - started
                self.clock.trial += spent - (self.clock.compile - compiled)
        self.adaptive = AdaptiveGamma(cost, self.program.cache.group_size, self.program.gamma)

    def _cost_of_drafts(self, program: Program, key: str) -> float:
        """A guess where drafts cannot pay, or few tokens are asked for; else measured. Both are
        kept, so that the next call has the same."""
        assert self._state is not None
        guess = draft_cost.known(f"{key}-guess")
        if guess is None:
            guess = draft_cost.guessed(self.model, self._state, program, self._runner.ready)
            self.clock.compile = self._runner.compile_seconds
            if guess is not None:
                draft_cost.keep(f"{key}-guess", guess)
        if guess is not None and not paying(guess, self.program.gamma):
            return guess
        if self.config.max_new_tokens < TRIAL_PAYS:
            return guess or draft_cost.by_bytes(self.model, program, self.slots)
        self._state, cost = draft_cost.measured(self._state, program, self._decode)
        cost = agreed(cost) or cost
        draft_cost.keep(key, cost)
        return cost

    def _look(self, most: int = 1) -> None:
        """Bring what the host reads of the state to it: counters, and at most `most` new tokens of
        each sequence."""
        assert self._state is not None
        reading = {prompt.slot for prompt in self._prompts}
        width = self.capacity if most > LOOKED_AT else min(LOOKED_AT, self.capacity)
        # The cache's arrays, hundreds of them, are no part of it.
        state = dataclasses.replace(self._state, **NOT_LOOKED_AT)
        found = self._runner.ready(SEEN, state, width=width)(state)
        self._seen = seen = jax.device_get(everywhere(found, mesh_of(self.model.params)))
        begin = np.maximum(seen.count - width, 0).tolist()
        for i, slot in enumerate(self._slots):
            if slot is None or i in reading:
                continue
            new = slice(len(slot.tokens) - begin[i], int(seen.count[i]) - begin[i])
            slot.tokens += seen.tokens[i, new].tolist()
            slot.drafted += seen.drafted[i, new].tolist()
            if slot.logprobs is not None:
                each = Logprobs(*(x[i, new] for x in seen.logprobs))
                slot.scores += _scores(each, slot.logprobs)

    def _check_finite(self, slots: list[int]) -> None:
        """ValueError where the model made no number of what a slot holds."""
        seen = self._seen
        assert seen is not None
        broken = [slot for slot in slots if seen.broken[slot]]
        if broken:
            which = ", ".join(
                f"{slot} (after {int(seen.count[slot])} new tokens)" for slot in broken
            )
            raise ValueError(
                "model: its logits are not finite (NaN or infinity), so there is no next token; "
                f"sequence {which}. The weights may be damaged: load or convert the source again"
            )


def _with_layers(state: DecodeState, layers: tuple[Any, ...]) -> DecodeState:
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers))


def _seen(state: DecodeState, width: int) -> DecodeState:
    """What the host reads after each chunk of rounds, in one program: counters; and of new tokens,
    of whether they were drafted and of their log-probabilities [B, M, ...] the newest `width`
    entries, or the first ones where there are fewer."""
    index = jnp.maximum(state.count - width, 0)[:, None] + jnp.arange(width)[None]

    def cut(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)

    names = ("tokens", "drafted", "logprobs")
    rows = {name: jax.tree.map(cut, getattr(state, name)) for name in names}
    return dataclasses.replace(state, **rows)


SEEN = jax.jit(_seen, static_argnames="width")
NOT_LOOKED_AT: dict[str, Any] = dict.fromkeys(
    ("cache", "requests", "memory", "seen", "pending", "lookup")
)


def _scores(scores: Logprobs, number: int) -> list[TokenLogprob]:
    """Of the tokens of one sequence, with `number` alternatives each."""
    own, ids, top = (x.tolist() for x in scores)
    return [
        TokenLogprob(p, tuple(zip(i[:number], t[:number], strict=True)))
        for p, i, t in zip(own, ids, top, strict=True)
    ]
