"""How to decode."""

from __future__ import annotations

import dataclasses
from typing import Literal

from quantspec_jax.cache.codecs import CODECS, EXACT_TILES, VIEWS
from quantspec_jax.checks import is_int, is_number, require
from quantspec_jax.generate.couplings import COUPLINGS
from quantspec_jax.generate.logprobs import MOST as MOST_LOGPROBS
from quantspec_jax.generate.policies import POLICIES, policy
from quantspec_jax.generate.sampling import Warpers

Mode = Literal["quantspec", "autoregressive"]
Backend = Literal["auto", "mosaic_gpu", "xla"]
Prefill = Literal["whole", "tiles"]

MODES: tuple[Mode, ...] = ("quantspec", "autoregressive")
BACKENDS: tuple[Backend, ...] = ("auto", "mosaic_gpu", "xla")
PREFILLS: tuple[Prefill, ...] = ("whole", "tiles")
TARGET_VIEW = CODECS["hierarchical"].views[0]  # of mode quantspec
PLAIN_VIEW = CODECS["full"].views[0]  # of autoregressive decoding, unless `kv` says otherwise
PENALTIES = (1e-30, 1e30)  # beyond, a logit leaves float32
COPIES = 7  # passes of 8 rows: what the kernels' products have at once
KV = (*VIEWS, "aqua")  # of AQUA-KV, the bits that are stored with the checkpoint


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to decode. Defaults as on the command line; `temperature` 0 is greedy.

    `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 mean off. `kv` None: `int8` in mode
    quantspec (where nothing else is allowed), `full` in mode autoregressive.

    gamma: tokens drafted a round (mode quantspec alone). "auto": as many, 0 to 15, as pay off at
      the acceptance of late and at what a draft step costs; where drafting does not pay,
      speculation switches itself off and decoding is plain (`engine.adaptive`). What it chooses
      depends on counts and on that cost alone, so a key gives one text on one machine. Sampled text
      changes with a cost that is measured anew (another device or version, a cache folder that was
      emptied) and with the company of a batch, unless the coupling is "invariant"; greedy text does
      not, up to ties in bfloat16.
    lookup: tokens that a round copies, in place of drafts, where the text's last ones stood before
      (`generate.lookup`; `prompt_lookup_num_tokens` of transformers); 0: none. None: 7 with gamma
      "auto", else 0.
    draft_cost: what a draft step costs over a plain one, for "auto"; None: it is measured, once for
      a model, device and context bucket, or where drafts cannot pay guessed
      (`engine.draft_cost`).
    coupling: how sampled proposals are accepted (`generate.couplings`).
    draft_policy, draft_share: which pages of the cache a draft reads, and how large a share of its
      coded tokens (`generate.policies`); None: the policy's own. "auto": what promises most at the
      cache's length, by bytes, layers and the acceptance that was measured (`cost.best_reading`);
      short contexts are read whole.
    draft_every: rounds that read the same pages, of a policy that chooses anew; None: its own.
    draft_view: in which view a draft reads them, int4, or int8 as the target does.
    exact_tiles: tiles of `group_size` tokens at the beginning, where attention sinks lie, that a
      draft reads as finely as the target does.
    stop_ids: token ids that end a sequence, beside the model's own and where these are ignored.
    pass_width: rows an autoregressive pass is padded to.
    max_length: tokens the cache is allocated for; None: what the prompts and `max_new_tokens` need,
      rounded up to a bucket.
    rounds_per_chunk: rounds decoded on the device between two looks of the host (interruption), at
      most; None: 128 with gamma "auto", which is chosen for so many, else as many as take 2
      seconds. Where 32 do not take as long, the host looks after 2 seconds, or after 0.3 where text
      is streamed or stop strings are looked for; after 32 where several rounds read the same pages;
      on a CPU after 32, and after 4 where text is streamed or stop strings are looked for.
    logprobs: how many alternatives, 0 to 20, are reported at each new token beside its own
      log-probability, by the target's raw distribution (`generate.logprobs`); None: none, not even
      its own.
    prefill: how prompts are read: `whole`, in full precision, or in `tiles` of G tokens, each of
      which reads those before it as the target's view has them (`generate.tiles`). What is kept
      for other prompts, saved, or read while other sequences decode, is read in tiles.
    """

    max_new_tokens: int = 256
    gamma: int | Literal["auto"] = "auto"
    mode: Mode = "quantspec"
    kv: str | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_ids: tuple[int, ...] = ()
    coupling: str = "block"
    draft_policy: str = "auto"
    draft_share: float | None = None
    draft_every: int | None = None
    draft_view: str | None = None
    exact_tiles: int = EXACT_TILES
    pass_width: int = 1
    group_size: int = 128
    max_length: int | None = None
    backend: Backend = "auto"
    rounds_per_chunk: int | None = None
    draft_cost: float | None = None
    logprobs: int | None = None
    prefill: Prefill = "whole"
    lookup: int | None = None

    def __post_init__(self) -> None:
        def positive(name: str) -> None:
            value = getattr(self, name)
            require(is_int(value) and value >= 1, name, value, "an integer ≥ 1")

        positive("max_new_tokens")
        positive("pass_width")
        if self.rounds_per_chunk is not None:
            positive("rounds_per_chunk")
        require(
            self.gamma == "auto" or (is_int(self.gamma) and 1 <= self.gamma < self.group_size),
            "gamma",
            self.gamma,
            f"an integer from 1 to {self.group_size - 1}, or auto",
        )
        require(
            self.draft_cost is None or (is_number(self.draft_cost) and self.draft_cost > 0),
            "draft_cost",
            self.draft_cost,
            "a number > 0",
        )
        require(self.mode in MODES, "mode", self.mode, ", ".join(MODES))
        copies = self.lookup in (None, 0) or self.mode == "quantspec"
        require(copies, "lookup", self.lookup, "None or 0 in mode autoregressive")
        require(
            self.lookup is None or (is_int(self.lookup) and 0 <= self.lookup < self.group_size),
            "lookup",
            self.lookup,
            f"an integer from 0 to {self.group_size - 1}, or None",
        )
        require(self.prefill in PREFILLS, "prefill", self.prefill, ", ".join(PREFILLS))
        number = self.logprobs is None or (
            is_int(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS
        )
        require(number, "logprobs", self.logprobs, f"an integer from 0 to {MOST_LOGPROBS}, or None")
        require(self.kv in (None, *KV), "kv", self.kv, ", ".join(KV))
        require(self.coupling in COUPLINGS, "coupling", self.coupling, ", ".join(COUPLINGS))
        self._check_policy()
        require(
            is_int(self.exact_tiles) and self.exact_tiles >= 0,
            "exact_tiles",
            self.exact_tiles,
            "an integer ≥ 0",
        )
        if self.mode == "quantspec":
            require(
                self.kv in (None, TARGET_VIEW), "kv", self.kv, "int8 in mode quantspec (its target)"
            )
            require(
                self.pass_width == 1,
                "pass_width",
                self.pass_width,
                "1 in mode quantspec (γ+1 rows)",
            )
        numbers = {
            "temperature": (lambda v: v >= 0, "a number ≥ 0 (0 is greedy)"),
            "top_p": (lambda v: 0 < v <= 1, "a number in (0, 1]"),
            "min_p": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
            "repetition_penalty": (
                lambda v: PENALTIES[0] <= v <= PENALTIES[1],
                "a number from {:g} to {:g}".format(*PENALTIES),
            ),
        }
        for name, (allowed, words) in numbers.items():
            value = getattr(self, name)
            finite = is_number(value) and value == value and value not in (float("inf"),)
            require(finite and allowed(value), name, value, words)
        require(is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "an integer ≥ 0")
        require(self.backend in BACKENDS, "backend", self.backend, ", ".join(BACKENDS))
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        require(all(isinstance(s, str) and s for s in stop), "stop", self.stop, "non-empty strings")
        object.__setattr__(self, "stop", stop)
        ids = tuple(self.stop_ids)
        require(all(is_int(i) and i >= 0 for i in ids), "stop_ids", ids, "integers ≥ 0")
        object.__setattr__(self, "stop_ids", ids)

    def _check_policy(self) -> None:
        views = CODECS["hierarchical"].views
        require(self.draft_view in (None, *views), "draft_view", self.draft_view, ", ".join(views))
        if self.draft_policy == "auto":
            alone = "None with draft_policy auto, which chooses it"
            require(self.draft_share is None, "draft_share", self.draft_share, alone)
            require(self.draft_every is None, "draft_every", self.draft_every, alone)
        else:
            policy(self.draft_policy, self.draft_share, self.draft_every)
            chosen = POLICIES[self.draft_policy]
            possible = self.prefill == "whole" or chosen.votes or not chosen.observes
            words = "one that need not see the prompt as a whole, with prefill tiles"
            require(possible, "draft_policy", self.draft_policy, words)
        drafts = self.mode == "quantspec" or self.draft_policy in ("all", "auto")
        require(drafts, "draft_policy", self.draft_policy, "all in mode autoregressive: no draft")

    def end_ids(self, eos_ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
        """The ids that end a sequence: the model's, unless they are ignored, and `stop_ids`."""
        for token in self.stop_ids:
            allowed = f"0 to {vocab_size - 1}, the vocabulary"
            require(token < vocab_size, "a token id of stop_ids", token, allowed)
        return tuple(dict.fromkeys((() if self.ignore_eos else eos_ids) + self.stop_ids))

    @property
    def copies(self) -> int:
        """What `lookup` stands for."""
        if self.lookup is not None:
            return self.lookup
        return min(COPIES, self.group_size - 1) if self.adapts else 0

    @property
    def adapts(self) -> bool:
        """Whether γ is chosen anew as proposals are accepted."""
        return self.mode == "quantspec" and self.gamma == "auto"

    @property
    def warpers(self) -> Warpers:
        """What it takes beyond the argmax of the logits."""
        drawn = self.temperature > 0
        return Warpers(
            drawn or self.repetition_penalty != 1,
            drawn and self.top_k > 0,
            drawn and self.top_p < 1,
        )

    @property
    def target_view(self) -> str:
        """What the target reads of the cache."""
        return self.kv or (TARGET_VIEW if self.mode == "quantspec" else PLAIN_VIEW)
