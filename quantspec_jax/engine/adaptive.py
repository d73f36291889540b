"""Adaptive γ: how many tokens to draft a round. Where drafting does not pay, speculation switches
itself off and decoding is plain.

A round that drafts γ tokens yields 1 + s₁ + … + s_γ of them, sᵢ being the share of rounds that
accept place i, and costs 1 + γ c, in units of a plain step; c is what a draft step adds, measured
with γ = 4. A part of it is the verification's, which costs more than a plain step however few rows
it has, and more rows cost more than in proportion. γ is what makes the most of that, chosen for a
chunk of rounds: each γ is a compiled program of its own, as fast as if it had been asked for, and
another one is taken only where it promises one per cent. The first is 4, unless plain decoding or
another one promises much more.

sᵢ = sᵢ₋₁ aᵢ, aᵢ the share of the rounds that reached place i which accept it. It is counted, each
round a little less than the next one, and leans on α, the acceptance of all proposals that were
reached: rejections come in clusters, so a dozen rounds say little of a place, and what was seen of
a place that is no longer drafted is soon forgotten. Plain decoding learns nothing, so a few rounds
draft again now and then, after a wait that doubles each time they were in vain; not where drafts
would not pay if all were accepted (a draft step of SmolLM2 on two cores takes 1.6 plain steps).
A call of rounds costs the host some milliseconds before it begins. So a chunk is as long as it may
be, and the first with another γ ends after `LEARNING_ROUNDS` of it only where the share of its
proposals that was accepted lets another γ promise `EARLY_GAIN` (`Look`): the loop itself sees that.

All of this depends on counts of accepted tokens and on c, never on a clock: given c, a key gives
one text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from quantspec_jax.engine.draft_cost import TRIAL_GAMMA
from quantspec_jax.generate.state import COUNTED, NEVER, SHARES, Look

MOST_DRAFTED = 15  # passes of 16 rows: two blocks of the kernels' products
LADDER = (0, 1, 2, 4, 7, MOST_DRAFTED)  # few programs; between them little is to be gained
FADING = 0.993  # of evidence, a round
STALE = 0.96  # of what is known of places beyond those that are drafted
PRIOR = (0.9, 4.0)  # acceptance assumed before anything was seen, and the tries it weighs
LEANING = 16.0  # rounds that α weighs beside the counts of a place
GAIN = 1.01  # that another γ has to promise
GUESS = 1.1  # and before anything was seen: the trial's program is there, another one takes seconds
# What a verification of a few rows takes over a plain step: an assumption. On an H200 the rounds
# of SmolLM2 with γ = 4 and 7 leave nothing for it. It is at most a half of what is measured.
VERIFICATION = 0.08
# What a round takes over what that makes of it: of γ = 7 1.08 with Qwen2.5-Coder-1.5B and 0.99 with
# SmolLM2, of γ = 15 1.11 with SmolLM2.
BEYOND = {7: 1.08, MOST_DRAFTED: 1.16}
LEARNING_ROUNDS = 32  # of the first chunk with a γ, before its acceptance is judged
EARLY_GAIN = 1.05  # that another one has to promise then: it costs a call
PROBE_ROUNDS, OLD_TRIES = 4, 4.0
FIRST_WAIT, LONGEST_WAIT = 64, 512  # rounds of plain decoding before drafting is tried again


def price(cost: float, gamma: int) -> float:
    """What a round takes, in plain steps, where one with γ = 4 takes 1 + 4 c."""
    if gamma == 0:
        return 1.0
    verification = min(VERIFICATION, TRIAL_GAMMA * cost / 2)
    step = cost - verification / TRIAL_GAMMA
    return (1 + verification + step * gamma) * BEYOND.get(gamma, 1.0)


def paying(cost: float, most: int) -> tuple[int, ...]:
    """γ from 1 to `most` that pay if all is accepted: to try another would only compile its
    program."""
    return tuple(g for g in LADDER if 0 < g <= most and 1 + g > price(cost, g))


@functools.cache
def stays_best(cost: float, gamma: int, gammas: tuple[int, ...], group_size: int) -> Look:
    """The shares of accepted proposals at which none of the others promises `EARLY_GAIN` over γ, if
    each place is accepted alike."""
    counted = 1 - np.arange(1, max(gammas) + 1) / group_size

    def accepted(acceptance: float, g: int) -> float:
        return float(np.sum(acceptance ** np.arange(1, g + 1) * counted[:g]))

    def promised(acceptance: float, g: int) -> float:
        return (1 + accepted(acceptance, g)) / price(cost, g)

    shares = [
        accepted(a, gamma) / float(counted[:gamma].sum())
        for a in np.linspace(0, 1, 201)
        if max(promised(a, g) for g in gammas) <= EARLY_GAIN * promised(a, gamma)
    ]
    if not shares:
        return Look(LEARNING_ROUNDS, SHARES + 1, 0)
    return Look(LEARNING_ROUNDS, math.floor(min(shares) * SHARES), math.ceil(max(shares) * SHARES))


class AdaptiveGamma:
    """Chooses γ between chunks of rounds.

    Args:
      cost: c.
      group_size: G, whose flushes cut rounds short.
      most: the largest γ.
    """

    def __init__(self, cost: float, group_size: int, most: int = MOST_DRAFTED):
        self.cost, self._group_size = cost, group_size
        most = min(most, group_size - 1)
        self.gammas = (0, *paying(cost, most))
        self._accepted, self._tried = PRIOR[0] * PRIOR[1], PRIOR[1]
        self._by_place = np.zeros((2, most))  # rounds that reached a place, and that accepted it
        self._counted = 1 - np.arange(1, most + 1) / group_size  # share of rounds that reach it
        self._wait, self._waited = FIRST_WAIT, 0
        # Rounds that are left of the chunk; how many are done, and what they did.
        self._left = self._done = 0
        self._look = NEVER  # of the chunk
        self._unread = np.zeros((2, COUNTED), int)
        self.gamma = TRIAL_GAMMA if TRIAL_GAMMA in self.gammas else self._best(self.gammas)
        self._chosen: int | None = None  # for the last chunk that was no try

    @property
    def acceptance(self) -> float:
        """α of late."""
        return self._accepted / self._tried

    def _best(self, gammas: Sequence[int]) -> int:
        """The γ that yields most."""
        return max(gammas, key=self._yield)

    def _yield(self, gamma: int) -> float:
        """Tokens for what a plain step costs."""
        share, tokens = 1.0, 1.0
        for (reached, accepted), counted in zip(
            self._by_place.T[:gamma], self._counted, strict=False
        ):
            share *= (accepted + LEANING * self.acceptance) / (reached + LEANING)
            tokens += share * counted
        return tokens / price(self.cost, gamma)

    def observe(
        self, rounds: int, proposed: np.ndarray, accepted: np.ndarray, last: bool = False
    ) -> None:
        """What rounds with the chosen γ did: [COUNTED] proposals that counted and accepted ones, by
        their place in the round, of all sequences. It is read at the end of the chunk, or if these
        were the `last` rounds of all sequences."""
        self._done += rounds
        self._unread += np.stack([proposed, accepted])
        if last or self._look.ends(self._done, *map(int, self._unread.sum(1))):
            self._left = 0
        if not self._left:
            self._read(self._done, *self._unread)
            self._done, self._unread[:] = 0, 0

    def _read(self, rounds: int, proposed: np.ndarray, accepted: np.ndarray) -> None:
        before = np.concatenate([proposed[:1], accepted[:-1]])
        reached = np.minimum(proposed, before)
        fading = FADING**rounds
        self._accepted = fading * self._accepted + int(accepted.sum())
        self._tried = fading * self._tried + int(reached.sum())
        places = self._by_place.shape[1]
        self._by_place *= np.where(proposed[:places] > 0, fading, STALE**rounds)
        self._by_place += np.stack([reached[:places], accepted[:places]])
        self._waited = 0 if self.gamma else self._waited + rounds

    def next_chunk(
        self, rounds: int, most: int | None = None, looks: bool = True
    ) -> tuple[int, int, Look]:
        """(γ, rounds, when fewer are enough) of the next chunk, `rounds` at most; or of the rest of
        one that is done in pieces: of `rounds` or `most` rounds, or because the loop does not look.
        It is chosen, and read, as if it were not."""
        if not self._left:
            self._left = self._choose(rounds)
        number = min(self._left, rounds, rounds if most is None else most)
        looks &= not self._done  # later pieces would count from their own first round on
        if not looks and self._done < self._look.rounds:
            number = min(number, self._look.rounds - self._done)
        self._left -= number
        return self.gamma, number, self._look if looks else NEVER

    def _choose(self, rounds: int) -> int:
        """Choose γ; for how many rounds."""
        self._look = NEVER
        if self.gamma == 0 and self._waited >= self._wait and len(self.gammas) > 1:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            # What was seen long ago weighs little beside what the probe will see.
            fading = min(1.0, OLD_TRIES / self._tried)
            self._accepted, self._tried = fading * self._accepted, fading * self._tried
            self._by_place *= fading
            self.gamma = self._best(self.gammas[1:])
            return min(rounds, PROBE_ROUNDS)
        before, best = self._chosen, self._best(self.gammas)
        guessed = best > 0 and self._tried == PRIOR[1]  # nothing was observed
        if self._yield(best) > (GUESS if guessed else GAIN) * self._yield(self.gamma):
            self._wait = FIRST_WAIT if best else self._wait
            self.gamma = best
        self._chosen = self.gamma
        if self.gamma and self.gamma != before:
            self._look = stays_best(self.cost, self.gamma, self.gammas, self._group_size)
        # Plain decoding is left in time to try again.
        waits = self.gamma == 0 and len(self.gammas) > 1
        return min(rounds, max(self._wait - self._waited, 1)) if waits else rounds
