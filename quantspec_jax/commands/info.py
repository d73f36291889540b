"""`quantspec info`: what a model is and takes, from its headers alone."""

from __future__ import annotations

import argparse
from typing import Any

from quantspec_jax.commands.options import command


def add(commands: Any) -> None:
    """The parser."""
    summary = "architecture and sizes of a model, without loading its weights"
    parser = command(commands, "info", run, summary)
    parser.add_argument(
        "source", metavar="SOURCE", help="hub id, local directory, GGUF file or converted directory"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read headers, compute sizes."""
    import convert
    from quantspec_jax.info import info, table

    result = info(args.source, convert.open_source(args.source))
    if not args.json:
        print(table(result))
    return result
