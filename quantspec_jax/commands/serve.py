"""`quantspec serve`: a model behind OpenAI's interface, and a page to talk to it."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

from quantspec_jax.commands import terminal
from quantspec_jax.commands.generate import DRAFTING, add_decoding
from quantspec_jax.commands.options import (
    add_draft,
    add_dtype,
    add_model,
    add_rope,
    command,
    draft_config,
    draft_options,
    given,
    load_model,
    refuse,
    rope,
)
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.weights.formats import DraftConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
LIMITS = {
    "slots": "sequences that decode at a time",
    "max_length": "tokens of a prompt and its answer",
    "queue": "requests that may wait; more are answered with 429",
    "cache_bytes": "host memory for prompts that come again",
    "body_bytes": "of a request",
}


def add(commands: Any) -> None:
    """The parser."""
    parser = command(commands, "serve", run, "serve a model to OpenAI's clients", json=False)
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (8000)")
    parser.add_argument("--name", metavar="S", help="the model's name (from --model)")
    parser.add_argument("--api-key", metavar="K", help="clients have to give it")
    for name, words in LIMITS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help=words)
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="that a request may take, waiting included (600)"
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=30,
        metavar="S",
        help="seconds that requests have to end after SIGTERM (30)",
    )
    add_dtype(parser)
    add_decoding(parser)
    add_draft(parser)
    add_rope(parser)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal ends it."""
    decoding = decoding_config(args)
    draft = draft_config(args)
    rope(args)
    try:
        from quantspec_jax.server import listen
        from quantspec_jax.server.app import make_app
        from quantspec_jax.server.service import ServerConfig, Service
    except ImportError as error:
        extra = 'pip install "quantspec-jax[serve]"'
        raise ValueError(f"quantspec serve needs {error.name}, of an extra: {extra}") from error

    name = args.name or Path(args.model).name
    limits = given(args, *LIMITS, "seconds", "api_key")
    config = ServerConfig(name=name, **limits)
    listening = listen.bound(args.host, args.port)
    model = load_model(args, draft if decoding.mode == "quantspec" else DraftConfig(bits=None))
    service = Service(model, decoding, config)
    hosts = LOOPBACK if args.host in LOOPBACK else None
    port = listening.getsockname()[1]
    terminal.notice(f"http://{args.host}:{port}  the page; OpenAI's base_url is /v1 there")
    server = listen.Server(make_app(service, hosts), args.grace, service.end)
    _leave_alone_what_stays()
    server.serve_until_signal(listening)


def _leave_alone_what_stays() -> None:
    """Python looks for garbage among all objects once a quarter is new, which beside a third of a
    million that stay is after thousands of requests: beside none it is soon. (What clients leave
    that hang up has to be found so.)"""
    gc.collect()
    gc.freeze()
    gc.collect()


def decoding_config(args: argparse.Namespace) -> GenerateConfig:
    """What of decoding is the same for all requests."""
    if args.mode == "autoregressive":
        drafting = given(args, *DRAFTING) | draft_options(args)
        refuse(drafting, "--mode autoregressive: nothing is drafted")
    # What promises most with the longest text would be lost on short ones.
    options = {"draft_policy": "all"} | given(args, *DRAFTING, "kv")
    return GenerateConfig(mode=args.mode, backend=args.backend, prefill="tiles", **options)
