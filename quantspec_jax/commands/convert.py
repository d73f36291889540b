"""`quantspec convert`: a checkpoint, and the draft's weights, into a directory that opens fast."""

from __future__ import annotations

import argparse
from typing import Any

from quantspec_jax.commands.options import (
    add_draft,
    add_rope,
    command,
    draft_config,
    draft_options,
    given,
    refuse,
    rope,
)
from quantspec_jax.stored_kv import KV_BITS, KV_CODECS, StoredKV
from quantspec_jax.weights.formats import DraftConfig


def add(commands: Any) -> None:
    """The parser."""
    parser = command(commands, "convert", run, "convert a checkpoint to Orbax", json=False)
    parser.add_argument("source", metavar="SOURCE", help="hub id, local directory or GGUF file")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="appears whole or not at all")
    parser.add_argument("--dtype", metavar="D", help="default: the source's; GGUF: bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it exists")
    add_draft(parser, convert=True)
    group = parser.add_argument_group("cache", "a codec of the cache to store, that learns first")
    group.add_argument("--kv", choices=KV_CODECS, help="predictors across layers (AQUA-KV)")
    group.add_argument("--kv-bits", type=int, choices=KV_BITS, help="of a value's code (2)")
    group.add_argument(
        "--kv-text", metavar="FILE", help="UTF-8 text to learn from (default: a text of Python's)"
    )
    add_rope(parser)


def run(args: argparse.Namespace) -> None:
    """Convert and say where the result is."""
    from quantspec_jax.text.prompts import read_text

    draft = draft_to_store(args)
    kv = kv_to_store(args)
    kv_text = None if args.kv_text is None else read_text(args.kv_text, "--kv-text")
    text = None if args.draft_text is None else read_text(args.draft_text, "draft text")
    scaling = rope(args)
    import convert

    convert.convert(
        args.source,
        args.out_dir,
        dtype=args.dtype,
        overwrite=args.overwrite,
        draft=draft if isinstance(draft, DraftConfig) else None,
        draft_text=text,
        draft_from=draft if isinstance(draft, str) else None,
        kv=kv,
        kv_text=kv_text,
        progress=True,
        rope=scaling,
    )
    print(args.out_dir)


def kv_to_store(args: argparse.Namespace) -> StoredKV | None:
    """The codec of the cache to store."""
    if args.kv is None:
        refuse(given(args, "kv_bits", "kv_text"), "a conversion that stores none: name --kv")
        return None
    return StoredKV(args.kv, args.kv_bits or 2)


def draft_to_store(args: argparse.Namespace) -> DraftConfig | str | None:
    """The draft to store: its configuration, or a checkpoint to take codes from."""
    text = given(args, "draft_text")
    if args.draft_from is not None:
        refuse(given(args, "draft") | text, "--draft-from")
        return draft_config(args)
    if args.draft in (None, "none"):
        refuse(draft_options(args) | text, "--draft none")
        return None
    if args.draft != "gptq":
        refuse(text, f"--draft {args.draft}")
    return draft_config(args, args.draft) or DraftConfig(method=args.draft)
