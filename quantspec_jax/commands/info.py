"""`quantspec info`: what a model is and takes, from its headers alone."""

from __future__ import annotations

import argparse
from typing import Any

from quantspec_jax.checks import require
from quantspec_jax.commands.options import command


def add(commands: Any) -> None:
    """The parser."""
    summary = "architecture and sizes of a model, without loading its weights"
    parser = command(commands, "info", run, summary)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="hub id, local directory, GGUF file or converted directory",
    )
    parser.add_argument(
        "--device",
        action="store_true",
        help="the default device, and which kernels run there (for SOURCE's shapes), else why not",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read headers, compute sizes."""
    import convert
    from quantspec_jax import kernels
    from quantspec_jax.info import info, table

    require(args.source is not None or args.device, "SOURCE", "missing", "a model, or --device")
    opened = None if args.source is None else convert.open_source(args.source)
    result = {} if opened is None else info(args.source, opened)
    if args.device:
        shapes = () if opened is None else (opened.config, opened.draft_config)
        result["device"] = kernels.kernels_here(*shapes)
    if not args.json:
        texts = [] if opened is None else [table(result)]
        texts += kernels.lines(result["device"]) if args.device else []
        print("\n".join(texts))
    return result
