"""What the decode loop carries, and what it is compiled for."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.kv_attention.read import Read
from quantspec_jax.axes import ONE, Axes
from quantspec_jax.cache import KVCache
from quantspec_jax.cache.codecs import EXACT_TILES
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.checks import require
from quantspec_jax.generate.couplings import REJECTION, Coupling
from quantspec_jax.generate.logprobs import Logprobs
from quantspec_jax.generate.lookup import Lookup
from quantspec_jax.generate.policies import ALL, Policy
from quantspec_jax.generate.requests import Requests
from quantspec_jax.generate.sampling import Warpers
from quantspec_jax.models.config import ModelConfig

COUNTED = 16  # positions of a round that statistics tell apart; the last counts all beyond, too
PAGES = 2 * COUNTED
COPIED = PAGES + 2
STATISTICS = COPIED + 3


def axes_of(mesh: Mesh | None) -> Axes:
    """Sizes of a mesh's axes."""
    return ONE if mesh is None else Axes.over(mesh.shape)


@dataclasses.dataclass(frozen=True)
class PromptProgram:
    """Everything static about a prefill: no γ, no coupling."""

    model: ModelConfig
    cache: CacheConfig
    policy: Policy = ALL
    backend: str = "auto"
    mesh: Mesh | None = None

    @property
    def axes(self) -> Axes:
        """Its sizes."""
        return axes_of(self.mesh)


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static about decoding; one `Program` and one set of shapes is one compilation.

    Args:
      model, cache: the model and the cache's shape. `cache.view` is what the target reads and
        `cache.pass_width` the rows of a target pass (γ + 1, or more as padding).
      gamma: tokens drafted a round; 0 is autoregressive decoding.
      lookup: tokens copied a round that finds some in the text (`generate.lookup`); 0: none.
      policy: which pages of the cache a draft reads.
      draft_view: in which view.
      exact_tiles: how many tiles at the beginning a draft reads as finely as the target does.
      coupling: how proposals are accepted.
      warpers: what any sequence wants. What is not in it does not happen, whatever `requests` say:
        with `GREEDY` tokens are the argmax of the logits, and `seen` stays as it is. None: the
        program finds out, in branches. A GPU's branch waits for the host.
      backend: which kernels run.
      logprobs: whether the log-probabilities of new tokens are written down.
      mesh: of the devices that the arrays are split over; None: there is one.
    """

    model: ModelConfig
    cache: CacheConfig
    gamma: int
    policy: Policy = ALL
    draft_view: str | None = None
    exact_tiles: int = EXACT_TILES
    coupling: Coupling = REJECTION
    warpers: Warpers | None = None
    backend: str = "auto"
    logprobs: bool = False
    mesh: Mesh | None = None
    lookup: int = 0

    def __post_init__(self) -> None:
        allowed = f"at least gamma + 1 = {self.gamma + 1}"
        width = self.cache.pass_width
        require(width > self.gamma, "pass_width", width, allowed)
        finest = self.cache.codec.views[0]
        drafts = self.cache.view == finest and finest != self.cache.codec.draft.view
        drafts &= not self.cache.codec.recodes
        require(not self.gamma or drafts, "view (with gamma > 0)", self.cache.view, "int8")
        views = self.cache.codec.views
        room = self.cache.group_size - 1
        words = f"0 to {room}"
        require(0 <= self.lookup <= room, "lookup", self.lookup, words)
        possible = not self.gamma or self.draft_view in (None, *views)
        require(possible, "draft_view", self.draft_view, ", ".join(views))

    @property
    def axes(self) -> Axes:
        """Sizes of the mesh."""
        return axes_of(self.mesh)

    @property
    def read(self) -> Read:
        """What the target reads of the cache."""
        codec = self.cache.codec
        return codec.draft if codec.recodes else Read(self.cache.view)

    @property
    def copying(self) -> Program:
        """Of its rounds, those that copy."""
        cache = dataclasses.replace(self.cache, pass_width=self.lookup + 1)
        return dataclasses.replace(self, gamma=self.lookup, lookup=0, cache=cache)

    @property
    def draft_read(self) -> Read:
        """What a draft reads of the cache."""
        view = self.draft_view or self.cache.codec.draft.view
        return Read(view, self.exact_tiles if view == self.cache.codec.draft.view else 0)

    @property
    def prompt(self) -> PromptProgram:
        """What the prefill depends on."""
        policy = self.policy if self.policy.observes else ALL
        return PromptProgram(self.model, self.cache.arrays, policy, self.backend, self.mesh)


SHARES = 1024  # what shares of proposals are counted in


class Look(NamedTuple):
    """When a call of the loop ends before its last round: after `rounds` of them, where fewer than
    `least` or more than `most` of each `SHARES` proposals that counted were accepted. Integers, or
    int32 arrays []."""

    rounds: Any
    least: Any
    most: Any

    def ends(self, rounds: Any, proposed: Any, accepted: Any) -> Any:
        """Whether it does: bool."""
        share = SHARES * accepted
        outside = (share < self.least * proposed) | (share > self.most * proposed)
        return (rounds == self.rounds) & outside


NEVER = Look(-1, 0, SHARES)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("cache", "requests", "memory", "seen", "pending", "tokens", "count", "finished"),
        *("broken", "rounds", "statistics", "drafted", "logprobs", "lookup"),
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state between two rounds: every array has the batch first. The pending token is the
    newest one: chosen, but not in the cache yet; its position is `cache.length`.

    cache     every token before the pending one
    requests  what the sequences want
    memory    what the draft policy remembers
    seen      [B, N] bool, tokens of the prompt and of the text so far (repetition penalty); of the
              prompt alone where no program needed to know (`Program.warpers`)
    pending   [B] int32
    tokens    [B, M] int32, new tokens, the pending one included; valid below `count`
    count     [B] int32
    finished  [B] bool, an end token was produced or the limit reached, or it is broken
    broken    [B] bool, the target's logits for the next token were not finite
    rounds    [B] int32, rounds in which the sequence took part
    statistics  [B, STATISTICS] int32, summed over the rounds: `proposed`, `accepted`,
              `draft_pages`, `copied`
    drafted   [B, M] bool, which new tokens were proposed; None: nobody asks
    logprobs  of the new tokens; None: nobody asks
    lookup    what a round may copy; None: nothing
    """

    cache: KVCache
    requests: Requests
    memory: Any
    seen: jax.Array
    pending: jax.Array
    tokens: jax.Array
    count: jax.Array
    finished: jax.Array
    broken: jax.Array
    rounds: jax.Array
    statistics: jax.Array
    drafted: jax.Array | None = None
    logprobs: Logprobs | None = None
    lookup: Lookup | None = None

    @property
    def proposed(self) -> jax.Array:
        """[B, COUNTED] int32, drafted tokens that counted, by their place in the round."""
        return self.statistics[:, :COUNTED]

    @property
    def accepted(self) -> jax.Array:
        """[B, COUNTED] int32, those of them that were accepted."""
        return self.statistics[:, COUNTED:PAGES]

    @property
    def draft_pages(self) -> jax.Array:
        """[B, 2] int32, pages that drafts read in a layer, and those that there were."""
        return self.statistics[:, PAGES:COPIED]

    @property
    def copied(self) -> jax.Array:
        """[B, 3] int32, rounds that copied, tokens that they proposed, and accepted ones; they are
        not among `proposed` and `accepted`."""
        return self.statistics[:, COPIED:]


def counted(number: jax.Array) -> jax.Array:
    """[B] → [B, COUNTED] int32: a round's first `number` places, one each."""
    place = jnp.arange(COUNTED)[None]
    ones = (place < number[:, None]).astype(jnp.int32)
    beyond = jnp.maximum(number - COUNTED, 0)[:, None]
    return jnp.where(place == COUNTED - 1, ones + beyond, ones)


def insert(state: DecodeState, slot: jax.Array | int, one: DecodeState) -> DecodeState:
    """The running batch with the sequences of `one` in its rows `slot`, `slot` + 1, ...: a pure
    function that writes those rows and nothing else, where `state` is donated.

    Both have the same cache configuration and capacity for new tokens.
    """

    def write(rows: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, new, slot, 0)

    return jax.tree.map(write, state, one)
