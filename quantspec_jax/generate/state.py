"""What the decode loop carries, and what it is compiled for."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax

from quantspec_jax.cache import HierarchicalKVCache
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static about a decode; one `Program` and one set of shapes is one compilation.

    Args:
      model, cache: the model and the cache's shape. `cache.view` is what the target reads and
        `cache.pass_width` the rows of a target pass (γ + 1, or more as padding).
      gamma: tokens drafted a round, or the most of them; 0 is autoregressive decoding.
      backend: which kernels run.
      simulated_acceptance: for measurements with random weights alone: accept each proposal with
        this probability, whatever it is. The text then means nothing.
      draft_cost: a draft step's cost over a verification's, to begin with. Each round then drafts
        as many tokens, 0 to `gamma`, as pay off at the cost that the state holds
        (`quantspec_jax.generate.adapt`). None: `gamma`.
    """

    model: ModelConfig
    cache: CacheConfig
    gamma: int
    backend: str = "auto"
    simulated_acceptance: float | None = None
    draft_cost: float | None = None

    def __post_init__(self) -> None:
        if self.cache.pass_width <= self.gamma:
            raise ValueError(
                f"pass_width is {self.cache.pass_width}; allowed: at least gamma + 1 = "
                f"{self.gamma + 1}"
            )
        if self.gamma and self.cache.view != "int8":
            raise ValueError(f"view is {self.cache.view!r} with gamma > 0; allowed: int8")
        if self.draft_cost is not None and self.draft_cost <= 0:
            raise ValueError(f"draft_cost is {self.draft_cost!r}; allowed: a number > 0, or None")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "cache",
        "keys",
        "seen",
        "pending",
        "tokens",
        "count",
        "limit",
        "finished",
        "rounds",
        "proposed",
        "accepted",
        "evidence",
        "draft_cost",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state between two rounds. The pending token is the newest one: chosen, but not in the
    cache yet; its position is `cache.length`.

    cache     every token before the pending one
    keys      [B] typed PRNG keys, one a sequence
    seen      [B, N] bool, tokens of the prompt and of the text so far (repetition penalty)
    pending   [B] int32
    tokens    [B, M] int32, new tokens, the pending one included; valid below `count`
    count     [B] int32
    limit     [B] int32, max_new_tokens
    finished  [B] bool, EOS was produced or the limit reached
    rounds    [B] int32, rounds in which the sequence took part
    proposed, accepted  [B] int32, drafted tokens that counted, and those of them that were accepted
    evidence  [B, 2] float32, accepted and tried proposals of late (`quantspec_jax.generate.adapt`)
    draft_cost  [] float32, what a draft step costs over a verification, where γ is adaptive. It may
              be set anew between two calls; greedy tokens do not depend on it
    """

    cache: HierarchicalKVCache
    keys: jax.Array
    seen: jax.Array
    pending: jax.Array
    tokens: jax.Array
    count: jax.Array
    limit: jax.Array
    finished: jax.Array
    rounds: jax.Array
    proposed: jax.Array
    accepted: jax.Array
    evidence: jax.Array
    draft_cost: jax.Array
