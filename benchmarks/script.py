"""What the scripts of this folder have in common: options, prompts, and how a run is recorded."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import quantspec_jax as qs
from quantspec_jax.bench import record
from quantspec_jax.commands.options import DTYPES
from quantspec_jax.files import read_json

SKIP = 20_000  # characters, over what a book says before it begins
CHARACTERS = 10  # more than a token has on average: enough of a text for its tokens
_prefill = jax.jit(qs.prefill, static_argnames=("program", "capacity"))


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that says what the first line of a script's docstring says; every script has
    --output."""
    summary = (doc or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="benchmarks/NAME.json")
    return parser


def add_model(parser: argparse.ArgumentParser, help: str = "what `qs.load` takes") -> None:
    parser.add_argument("--model", required=True, help=help)


def add_text(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--text, a book in UTF-8; of several each may be given by a --text of its own."""
    if several:
        parser.add_argument("--text", type=Path, nargs="+", action="extend", required=True)
    else:
        parser.add_argument("--text", type=Path, required=True)


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default=default)


def tokens(model: qs.Model, path: Path, count: int, place: int = 0) -> list[int]:
    """The first tokens of a book, or of what begins so many characters later."""
    begin = SKIP + place
    text = path.read_text(encoding="utf-8")[begin : begin + CHARACTERS * count]
    return model.tokenizer(text)["input_ids"][:count]


def prompts(
    model: qs.Model, texts: Sequence[Path], lengths: Sequence[int], apart: int
) -> list[list[int]]:
    """A prompt a length, in turn from the texts, each from another place."""
    return [
        tokens(model, texts[i % len(texts)], length, apart * (i // len(texts)))
        for i, length in enumerate(lengths)
    ]


def prefilled(
    model: qs.Model, inputs: Sequence[Sequence[int]], config: qs.GenerateConfig
) -> tuple[qs.DecodeState, qs.Program]:
    """The state after these prompts, and the program that goes on from there."""
    ready = qs.prepare(model, inputs, config)
    state = _prefill(
        model.params, *ready.inputs, program=ready.program.prompt, capacity=ready.capacity
    )
    return state, ready.program


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row as it is measured; returns it."""
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def finished_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that an earlier run of the same command left: it goes on after them."""
    return read_json(path)["rows"] if path.exists() else []


def write(file: str, args: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> None:
    """Record a run of the script `file`."""
    command = record.command(f"python benchmarks/{Path(file).name}", args)
    record.write(args.output, command, rows, **more)
