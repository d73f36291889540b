"""`quantspec bench`: speed on the device at hand, a benchmark each in quantspec_jax/bench/."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import Any

from quantspec_jax.commands import terminal
from quantspec_jax.commands.options import Parser, command

BENCHES = ("kernels", "decode", "prefill", "text")


def add(commands: Any) -> None:
    """The parser. Its arguments are those of the benchmarks, whose modules are slow to import."""
    summary = "measure speed"
    commands.add_parser("bench", help=summary, description=summary, fill=add_benches)


def add_benches(parser: Parser) -> None:
    """A command a benchmark."""
    from quantspec_jax import bench

    found = {module.name for module in pkgutil.iter_modules(bench.__path__)}
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name in BENCHES:
        if name in found:
            module = importlib.import_module(f"quantspec_jax.bench.{name}")
            summary = (module.__doc__ or name).strip().splitlines()[0]
            module.add_arguments(command(benches, name, run, summary))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run one of the benchmarks."""
    from quantspec_jax import compilation_cache

    compilation_cache.enable()
    result = importlib.import_module(f"quantspec_jax.bench.{args.bench}").run(args)
    if not args.json:
        terminal.show_rows(result)
    return result
