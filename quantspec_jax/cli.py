"""The command line, `quantspec`; the commands are in quantspec_jax/commands/, a file each.

Standard output is for results: streamed text, a table, or with --json one object and nothing else.
Progress, notices and errors go to standard error. Exit status: 0, 2 for what the caller got wrong,
1 for the rest, 130 when interrupted (143 when terminated) before there was a result.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from quantspec_jax import interrupts
from quantspec_jax.commands import (
    bench,
    chat,
    convert,
    evaluate,
    generate,
    info,
    plan,
    serve,
    terminal,
)
from quantspec_jax.commands.options import Parser, join, leave, silent
from quantspec_jax.commands.version import Version

COMMANDS = (convert, info, generate, chat, serve, evaluate, plan, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is not for our users
    unraisable, sys.unraisablehook = sys.unraisablehook, _keep_interruption
    args: argparse.Namespace | None = None
    try:
        args = make_parser().parse_args(argv)
        with interrupts.raised(), terminal.plain_warnings():
            join(args)
            result = _run(args)
        if args.json:
            print(json.dumps(result))
        sys.stdout.flush()
        return 0
    except SystemExit as end:  # --help, --version
        return int(end.code or 0)
    except interrupts.Terminated:
        return terminal.fail("terminated", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return terminal.fail("interrupted", 130)
    except BrokenPipeError:  # the reader of standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        status = terminal.fail(terminal.describe(error), terminal.status_of(error))
        leave(args, status)
        return status
    finally:
        sys.unraisablehook = unraisable


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="quantspec",
        description="Self-speculative long-context decoding with a hierarchical 4-bit KV cache.",
    )
    parser.add_argument(
        "--version", action=Version, nargs=0, help="versions that matter in a bug report"
    )
    parser.set_defaults(json=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _keep_interruption(unraisable: Any) -> None:
    """Send a signal again where it came during garbage collection, which would lose it."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        lost = signal.SIGTERM if unraisable.exc_type is interrupts.Terminated else signal.SIGINT
        # A Thread's start waits: what is sent meanwhile would be raised here, and lost again.
        _thread.start_new_thread(_send_again, (lost,))
    else:
        sys.__unraisablehook__(unraisable)


def _send_again(number: signal.Signals) -> None:
    """A moment later, when what was collected is gone."""
    time.sleep(0.05)
    _thread.interrupt_main(number)


def _run(args: argparse.Namespace) -> Any:
    """The command's result. With --json whatever else prints goes to standard error; of several
    processes the first one prints."""
    with contextlib.ExitStack() as stack:
        if silent(args):
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        if args.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
