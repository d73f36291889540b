"""First proposals of real greedy rounds beside `quantspec eval acceptance` over the same text.

    python benchmarks/first_proposals.py --model FILE.gguf --text TEXT --output benchmarks/NAME.json

With γ = 1 every proposal is the first of its round, so the acceptance rate of a greedy run is how
often a first proposal was accepted. The evaluation reads the prompt and the generated text and
counts every generated position. `evaluated_at_rounds` counts the positions at which the evaluation
itself says that a round starts (two on after an acceptance, else one; none where a group ends).
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import script

import quantspec_jax as qs
from quantspec_jax.bench import record
from quantspec_jax.cache.schedule import room
from quantspec_jax.evaluate import acceptance
from quantspec_jax.evaluate.teacher_forced import compare


def at_rounds(accepted: np.ndarray, first: int, group_size: int) -> float:
    """Share accepted of the positions at which rounds of γ = 1 start, from `first` on."""
    outcomes, position = [], first
    while position < len(accepted):
        proposed = room(position, group_size) > 0
        if proposed:
            outcomes.append(bool(accepted[position]))
        position += 2 if proposed and accepted[position] else 1
    return float(np.mean(outcomes))


def measure(model: qs.Model, prompt: list[int], new: int) -> dict[str, object]:
    """One row: generate after `prompt`, evaluate over what came out."""
    config = qs.GenerateConfig(max_new_tokens=new, gamma=1, ignore_eos=True)
    out = qs.generate(model, [prompt], config)
    stats, first = out.stats[0], len(prompt)
    ids = prompt + out.tokens[0][:-1]  # nothing follows the last token
    seen = compare(model, ids, group_size=config.group_size, progress=True)
    result = acceptance(model, ids, first=first, group_size=config.group_size)
    return {
        "prompt_tokens": first,
        "new_tokens": stats["new_tokens"],
        "first_proposals": stats["proposed"],
        "accepted": stats["accepted"],
        "acceptance_rate": stats["acceptance_rate"],
        "evaluated": result["greedy_acceptance"],
        "evaluated_positions": result["positions"],
        "evaluated_at_rounds": at_rounds(seen.top == seen.draft_top, first, config.group_size),
        "draft": result["draft"],
    }


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser, several=True)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=400)
    return parser


def main() -> int:
    """Run, record, and exit with 1 where the two differ by more than 3 points."""
    args = make_parser().parse_args()
    model = qs.load(args.model, dtype="float32")
    rows = []
    for path in args.text:
        row = measure(model, script.tokens(model, path, args.prompt_tokens), args.new_tokens)
        rows.append(script.show({"text": path.name, **row}))
    script.write(__file__, args, rows, model=record.model_name(args.model), dtype=model.dtype.name)
    return int(any(abs(row["acceptance_rate"] - row["evaluated"]) > 0.03 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
