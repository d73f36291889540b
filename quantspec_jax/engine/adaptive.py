"""Adaptive γ: how many tokens to draft a round. Where drafting does not pay, speculation switches
itself off and decoding is plain.

With acceptance α a round that drafts γ tokens yields 1 + α + … + α^γ of them (fewer next to a
flush) and costs 1 + γ c, in units of a plain step; c is what a draft step adds. γ is what makes the
most of that, chosen for a chunk of rounds: each γ is a compiled program of its own, as fast as if
it had been asked for, and another one is taken only where it promises one per cent.

α is the share of accepted ones among the proposals that were tried, each round counting a little
less than the next one. Plain decoding learns nothing of α, so a few rounds draft again now and
then, after a wait that doubles each time they were in vain.

All of this depends on counts of accepted tokens and on c, never on a clock: given c, a key gives
one text.
"""

from __future__ import annotations

import numpy as np

from quantspec_jax.cost import tokens_a_round

MOST_DRAFTED = 7  # a pass of 8 rows is one block of the kernels' products
LADDER = (0, 1, 2, 4, MOST_DRAFTED)  # few programs; between them little is to be gained
FADING = 0.99  # of evidence, a round
PRIOR = (0.9, 4.0)  # acceptance assumed before anything was seen, and the tries it weighs
GAIN = 1.01  # that another γ has to promise
SETTLED, FIRST_ROUNDS = 48.0, 12  # tries until which chunks are short
PROBE_ROUNDS, OLD_TRIES = 4, 4.0
FIRST_WAIT, LONGEST_WAIT = 64, 512  # rounds of plain decoding before drafting is tried again


class AdaptiveGamma:
    """Chooses γ between chunks of rounds.

    Args:
      cost: c.
      group_size: G, whose flushes cut rounds short.
      most: the largest γ.
    """

    def __init__(self, cost: float, group_size: int, most: int = MOST_DRAFTED):
        self.cost, self.group_size = cost, group_size
        most = min(most, group_size - 1)
        self.gammas = tuple(gamma for gamma in LADDER if gamma <= most)
        self._accepted, self._tried = PRIOR[0] * PRIOR[1], PRIOR[1]
        self._wait, self._waited = FIRST_WAIT, 0
        self.gamma = max(self.gammas, key=self._yield)

    @property
    def acceptance(self) -> float:
        """α of late."""
        return self._accepted / self._tried

    def _yield(self, gamma: int) -> float:
        """Tokens for what a plain step costs."""
        tokens = tokens_a_round(round(self.acceptance, 3), gamma, self.group_size)
        return tokens / (1 + self.cost * gamma)

    def observe(self, rounds: int, proposed: np.ndarray, accepted: np.ndarray) -> None:
        """What a chunk of rounds with the chosen γ did: [COUNTED] proposals that counted and
        accepted ones, by their place in the round, of all sequences."""
        before = np.concatenate([proposed[:1], accepted[:-1]])
        tried = int(np.minimum(proposed, before).sum())
        fading = FADING**rounds
        self._accepted = fading * self._accepted + int(accepted.sum())
        self._tried = fading * self._tried + tried
        self._waited = 0 if self.gamma else self._waited + rounds

    def next_chunk(self, rounds: int) -> tuple[int, int]:
        """(γ, rounds) of the next chunk, `rounds` at most."""
        if self.gamma == 0 and self._waited >= self._wait:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            # What was seen long ago weighs little beside what the probe will see.
            fading = min(1.0, OLD_TRIES / self._tried)
            self._accepted, self._tried = fading * self._accepted, fading * self._tried
            self.gamma = max(1, max(self.gammas[1:], key=self._yield))
            return self.gamma, min(rounds, PROBE_ROUNDS)
        best = max(self.gammas, key=self._yield)
        if self._yield(best) > GAIN * self._yield(self.gamma):
            self._wait = FIRST_WAIT if best else self._wait
            self.gamma = best
        return self.gamma, min(rounds, FIRST_ROUNDS) if self._tried < SETTLED else rounds
