"""Acceptance of real rounds beside what `quantspec eval acceptance` says of the same text.

    python benchmarks/draft_acceptance.py --model M --text A.txt --text B.txt --output FILE

Generates greedily and at temperature 1, at γ = 1 and γ = 4, a round at a time, and evaluates what
came out: α is the evaluation's mean over the generated positions. A round of γ proposals, each
accepted with probability α, has (α + … + α^γ)/γ of them accepted (`predicted`).

`evaluated_at_rounds` follows the rounds over the text with the evaluation's acceptance of each
position, where rounds begin and end as they do in decoding. What is left between it and the
measured rate is chance, and that later proposals of a round read the draft's own keys and values of
the tokens before them, where the evaluation's draft reads the target's.

`accepted_at_position` [γ]: of the rounds that proposed so many, the share whose first i + 1 all
were accepted; `evaluated_at_position` the same of the evaluation.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script

import quantspec_jax as qs
from quantspec_jax.bench import record
from quantspec_jax.cache.schedule import room
from quantspec_jax.evaluate.teacher_forced import Overlap, compare

APART = 200_000  # characters between two prompts of a text


class Rounds:
    """Counts over rounds: proposals and accepted ones by their position in the round, [γ]."""

    def __init__(self, gamma: int):
        self.proposed, self.accepted = np.zeros(gamma), np.zeros(gamma)

    def add(self, proposed: int, reached: np.ndarray, weight: float = 1) -> None:
        """A round of so many proposals; reached [γ]: whether, or the chance that, the first i + 1
        were all accepted."""
        counts = weight * (np.arange(len(self.proposed)) < proposed)
        self.proposed += counts
        self.accepted += counts * reached

    @property
    def rate(self) -> float:
        """Accepted of all proposals."""
        return float(self.accepted.sum() / self.proposed.sum())

    @property
    def by_position(self) -> list[float]:
        return (self.accepted / self.proposed).tolist()


def generate(
    model: qs.Model, inputs: list[list[int]], config: qs.GenerateConfig
) -> tuple[list[list[int]], Rounds]:
    """New tokens of each sequence, and what became of the proposals of every round."""
    batch = len(inputs)
    state, program = script.prefilled(model, inputs, config)
    step = jax.jit(qs.generate_tokens, static_argnames="program", donate_argnames="state")
    rounds = Rounds(config.gamma)
    seen = np.zeros((2, batch), int)
    while not np.asarray(state.finished).all():
        state = step(model.params, model.draft_params, state, jnp.int32(1), program=program)
        now = np.array([np.asarray(x).sum(-1) for x in (state.proposed, state.accepted)])
        for proposed, accepted in (now - seen).T:
            rounds.add(proposed, np.arange(config.gamma) < accepted)
        seen = now
    return np.asarray(state.tokens)[:, : config.max_new_tokens].tolist(), rounds


def chances(seen: Overlap, sampled: bool) -> np.ndarray:
    """[N] chance that the token that follows, being what it is, was accepted: min(1, q/p)."""
    if sampled:
        return np.exp(np.minimum(0, seen.draft_log_prob - seen.log_prob))
    return (seen.top == seen.draft_top).astype(float)


def follow(chance: np.ndarray, first: int, rounds: Rounds, group_size: int) -> None:
    """Add the expected counts of the rounds over a text from position `first` on."""
    gamma, end = len(rounds.proposed), len(chance)
    begins = np.zeros(end + gamma + 2)  # the chance that a round begins at a position
    begins[first] = 1
    for n in range(first, end - gamma):
        proposed = min(gamma, room(n, group_size))
        reach = np.cumprod(np.r_[1.0, chance[n : n + proposed]])  # of at least 0 … proposed
        rounds.add(proposed, np.r_[reach[1:], np.zeros(gamma - proposed)], begins[n])
        begins[n + 1 : n + 2 + proposed] += begins[n] * (reach - np.r_[reach[1:], 0])


def measure(
    model: qs.Model, inputs: list[list[int]], gamma: int, new: int, temperature: float, known: dict
) -> dict[str, Any]:
    """One row. `known` keeps evaluations: greedy text is the same at every γ."""
    common = {"max_new_tokens": new, "ignore_eos": True}
    config = qs.GenerateConfig(gamma=gamma, temperature=temperature, **common)
    tokens, rounds = generate(model, inputs, config)
    expected, alphas = Rounds(gamma), []
    for prompt, made in zip(inputs, tokens, strict=True):
        ids = prompt + made
        if tuple(ids) not in known:
            known[tuple(ids)] = compare(model, ids, group_size=config.group_size)
        seen, first = known[tuple(ids)], len(prompt)
        same = seen.top == seen.draft_top
        alphas.append((seen.overlap if temperature else same)[first:-1].mean())
        follow(chances(seen, temperature > 0)[:-1], first, expected, config.group_size)
    alpha = float(np.mean(alphas))
    return {
        "temperature": temperature,
        "gamma": gamma,
        "rounds": int(rounds.proposed[0]),
        "proposed": int(rounds.proposed.sum()),
        "accepted": int(rounds.accepted.sum()),
        "acceptance_rate": rounds.rate,
        "evaluated": alpha,
        "predicted": sum(alpha ** (i + 1) for i in range(gamma)) / gamma,
        "evaluated_at_rounds": expected.rate,
        "accepted_at_position": rounds.by_position,
        "evaluated_at_position": expected.by_position,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser, "with its stored draft, if it has one")
    script.add_text(parser, several=True)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=500)
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--gamma", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    return parser


def main() -> int:
    """Run, record, and exit with 1 where γ = 1 differs from the evaluation by over 3 points."""
    args = make_parser().parse_args()
    model = qs.load(args.model, dtype="float32")
    inputs = script.prompts(model, args.text, [args.prompt_tokens] * args.prompts, APART)
    rows: list[dict[str, Any]] = []
    known: dict[tuple[int, ...], Overlap] = {}
    for temperature in args.temperature:
        for gamma in args.gamma:
            row = measure(model, inputs, gamma, args.new_tokens, temperature, known)
            rows.append(script.show(row))
    about = {"dtype": model.dtype.name, "draft": model.draft.describe()}
    script.write(__file__, args, rows, model=record.model_name(args.model), **about)
    first = [row for row in rows if row["gamma"] == 1]
    return int(any(abs(row["acceptance_rate"] - row["evaluated"]) > 0.03 for row in first))


if __name__ == "__main__":
    sys.exit(main())
