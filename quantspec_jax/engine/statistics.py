"""What is known of a sequence's decoding: the keys of `quantspec generate --json`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from quantspec_jax.generate.state import COUNTED

COPIED_NAMES = ("lookup_rounds", "lookup_proposed", "lookup_accepted")


@dataclasses.dataclass
class Clock:
    """Seconds by part; none of them in another one.

    compile  making programs
    prefill  prompts
    trial    measuring what a draft step costs, where nobody had
    decode   rounds
    """

    compile: float = 0.0
    prefill: float = 0.0
    trial: float = 0.0
    decode: float = 0.0


@dataclasses.dataclass(frozen=True)
class Counters:
    """Of one sequence: rounds, [COUNTED] drafts that counted and accepted ones by place, [2] pages
    that drafts read and that there were, and [3] rounds that copied, copies and accepted ones."""

    rounds: int
    proposed: np.ndarray
    accepted: np.ndarray
    draft_pages: np.ndarray
    copied: np.ndarray

    @property
    def totals(self) -> tuple[int, int]:
        """Proposals that counted, drafts and copies, and accepted ones."""
        _, proposed, accepted = self.copied.tolist()
        return int(self.proposed.sum()) + proposed, int(self.accepted.sum()) + accepted

    def statistics(self, new_tokens: int) -> dict[str, Any]:
        """rounds, proposed, accepted, acceptance_rate, tokens_per_round; of them, of rounds that
        copied, lookup_rounds, lookup_proposed, lookup_accepted; of the others accepted_by_position
        and draft_read_share (of the planes' tokens; null where nothing was drafted, or coded)."""
        proposed, accepted = self.totals
        read, coded = self.draft_pages
        later = max(new_tokens - 1, 0)  # the first token is the prefill's
        places = int(np.count_nonzero(self.proposed))
        return {
            "rounds": self.rounds,
            "proposed": proposed,
            "accepted": accepted,
            "acceptance_rate": accepted / proposed if proposed else None,
            "accepted_by_position": (
                (self.accepted[:places] / self.proposed[:places]).round(4).tolist()
            ),
            "draft_read_share": float(read / coded) if coded else None,
            **dict(zip(COPIED_NAMES, self.copied.tolist(), strict=True)),
            "tokens_per_round": later / self.rounds if self.rounds else None,
        }


NO_ROUNDS = Counters(0, *(np.zeros(n, np.int32) for n in (COUNTED, COUNTED, 2, 3)))


def speed(clock: Clock, new_tokens: int) -> dict[str, Any]:
    """The seconds, and the tokens a second that one sequence had."""
    later = max(new_tokens - 1, 0)
    return {
        "prefill_seconds": clock.prefill,
        "decode_seconds": clock.decode,
        "decode_tokens_per_second": later / clock.decode if clock.decode else None,
        "compile_seconds": clock.compile,
        "trial_seconds": clock.trial,
    }
