"""`quantspec chat`: turns on a terminal, the cache kept between them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from quantspec_jax import interrupts
from quantspec_jax.checks import require
from quantspec_jax.commands import terminal
from quantspec_jax.commands.generate import add_options, generate_config, summary
from quantspec_jax.commands.options import (
    add_cache_format,
    add_draft,
    add_dtype,
    add_model,
    add_rope,
    check_cache_format,
    command,
    draft_config,
    given,
    load_model,
    refuse,
    rope,
)
from quantspec_jax.files import check_output, exists
from quantspec_jax.weights.formats import DraftConfig


def add(commands: Any) -> None:
    """The parser."""
    parser = command(commands, "chat", run, "talk to a model on a terminal", json=False)
    add_model(parser)
    parser.add_argument("--system", metavar="S", help="system message")
    parser.add_argument(
        "--cache", metavar="FILE", help="the conversation goes on from it, and is saved to it"
    )
    add_cache_format(parser)
    add_dtype(parser)
    add_options(parser)
    add_draft(parser)
    add_rope(parser)


def run(args: argparse.Namespace) -> None:
    """Read a message a line until the input ends."""
    config = dataclasses.replace(generate_config(args), prefill="tiles")
    draft = draft_config(args)
    rope(args)
    if args.cache is not None:
        check_output(args.cache, "--cache")
    else:
        refuse(given(args, "cache_format"), "a conversation that is not saved: name --cache")
    there = args.cache is not None and exists(Path(args.cache))
    allowed = args.system is None or not there
    require(allowed, "--system", args.system, "none where --cache has a conversation already")

    import jax

    import quantspec_jax as qs

    model = load_model(args, draft if config.mode == "quantspec" else DraftConfig(bits=None))
    check_cache_format(args, model)
    if there:
        session = qs.Session.load(args.cache, model, config)
        terminal.notice(f"{len(session.messages)} messages from {args.cache}")
    else:
        session = qs.Session(model, config, system=args.system)
    for number, line in enumerate(_lines()):
        turn = session.chat(line, jax.random.key(args.seed + number), on_text=terminal.write)
        interrupts.handled()  # Ctrl-C ends an answer, not the conversation
        terminal.write("\n")
        kept = turn.stats["cached_tokens"]
        terminal.notice(f"{summary(turn.stats)}; {kept} of {turn.stats['prompt_tokens']} kept")
        if args.cache is not None:
            session.save(args.cache, args.cache_format or session.format)


def _lines() -> Any:
    """What somebody types, without empty lines."""
    while True:
        if sys.stdin.isatty():
            terminal.write("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
