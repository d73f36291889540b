"""`quantspec generate`: text after one prompt or several."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantspec_jax.checks import require
from quantspec_jax.commands import terminal
from quantspec_jax.commands.options import (
    add_cache_format,
    add_draft,
    add_dtype,
    add_every,
    add_lookup,
    add_mesh,
    add_model,
    add_reading,
    add_rope,
    check_cache_format,
    command,
    draft_config,
    draft_options,
    gamma,
    given,
    load_model,
    refuse,
    rope,
    seed,
)
from quantspec_jax.files import check_output
from quantspec_jax.generate.config import BACKENDS, KV, MODES, PREFILLS, GenerateConfig
from quantspec_jax.generate.couplings import COUPLINGS
from quantspec_jax.weights.formats import DraftConfig

# Options of the same name and meaning as a field of GenerateConfig, whose defaults count.
DRAFTING = (
    *("gamma", "coupling", "draft_policy", "draft_share", "draft_every", "draft_view"),
    "lookup",
)
FIELDS = (
    *(*DRAFTING, "kv", "pass_width", "logprobs", "prefill"),
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
)


def add(commands: Any) -> None:
    """The parser."""
    parser = command(commands, "generate", run, "continue a prompt")
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", metavar="P", help="repeat it for a batch")
    prompt.add_argument(
        "--prompt-file", metavar="F", help="UTF-8 text, used as it is; - reads standard input"
    )
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--system", metavar="S", help="system message (with --chat)")
    add_dtype(parser)
    add_options(parser)
    add_draft(parser)
    add_mesh(parser)
    add_rope(parser)
    parser.add_argument(
        "--prefill", choices=PREFILLS, help="read the prompt as a whole, or in tiles (whole)"
    )
    parser.add_argument(
        "--cache",
        metavar="FILE",
        help="a saved cache: used as far as the prompt begins like it, written where it does not",
    )
    add_cache_format(parser)
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="report (with --json) each token's log-probability and the N likeliest tokens there",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """How to decode, and where to end."""
    add_decoding(parser)
    parser.add_argument(
        "--pass-width", type=int, metavar="N", help="pad autoregressive passes to N rows (1)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument(
        "--stop", action="extend", nargs="+", metavar="S", help="end before any of these strings"
    )
    parser.add_argument(
        "--stop-id",
        action="extend",
        nargs="+",
        type=int,
        metavar="N",
        help="end at any of these tokens",
    )
    add_sampling(parser)
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-new-tokens")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """What is the same for all sequences that decode together."""
    parser.add_argument("--mode", choices=MODES, default="quantspec", help="default: quantspec")
    parser.add_argument(
        "--kv",
        choices=KV,
        help="what the target reads of the cache; autoregressive: full. aqua: "
        "by the predictors that `convert --kv aqua` stores, in the bytes of full",
    )
    parser.add_argument(
        "--gamma", type=gamma, metavar="N", help="tokens drafted a round, or auto (auto)"
    )
    parser.add_argument(
        "--coupling",
        choices=COUPLINGS,
        help="how sampled proposals are accepted (the text's law is the same)",
    )
    add_reading(parser)
    add_every(parser)
    add_lookup(parser)
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="kernels to use (auto)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How the next token is drawn."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (0)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="0 is off (0)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="1 is off (1)")
    sampling.add_argument("--min-p", type=float, metavar="P", help="0 is off (0)")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is off (1)")
    sampling.add_argument("--seed", type=seed, default=0, metavar="N", help="default: 0")


def generate_config(args: argparse.Namespace) -> GenerateConfig:
    """The configuration that the options ask for; options that do not fit the mode are refused."""
    if args.mode == "autoregressive":
        drafting = given(args, *DRAFTING) | draft_options(args)
        refuse(drafting, "--mode autoregressive: nothing is drafted")
    else:
        refuse(given(args, "pass_width"), "--mode quantspec: a pass has gamma + 1 rows")
    options = given(args, *FIELDS)
    if args.stop_id:
        options["stop_ids"] = tuple(args.stop_id)
    return GenerateConfig(
        mode=args.mode,
        max_new_tokens=args.max_new_tokens,
        stop=tuple(args.stop or ()),
        ignore_eos=args.ignore_eos,
        backend=args.backend,
        **options,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generate; stream the text of a single prompt unless the result is wanted as JSON."""
    from quantspec_jax.text.prompts import read_text

    config = generate_config(args)
    draft = draft_config(args)
    rope(args)  # wrong options are named before the model is loaded
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")
    if args.cache is not None:
        require(len(args.prompt or [0]) == 1, "--prompt", args.prompt, "one prompt, with --cache")
        require(args.prefill != "whole", "--prefill", args.prefill, "tiles, with --cache")
        config = dataclasses.replace(config, prefill="tiles")
        check_output(args.cache, "--cache")
    else:
        refuse(given(args, "cache_format"), "a cache that is not saved: name --cache")
    prompts: list[Any] = args.prompt or [read_text(args.prompt_file)]
    for prompt in prompts:
        require(prompt != "", "prompt", prompt, "a text of one character or more")

    import jax

    import quantspec_jax as qs
    from pallas_kernels import dispatch
    from quantspec_jax import kernels
    from quantspec_jax.api import backend_in_use

    model = load_model(args, draft if config.mode == "quantspec" else DraftConfig(bits=None))
    check_cache_format(args, model)
    if args.chat:
        from quantspec_jax.text.chat import chat_ids

        prompts = [chat_ids(prompt, model.tokenizer, args.system) for prompt in prompts]
    drafting = f", draft: {model.draft.describe()}" if config.mode == "quantspec" else ""
    terminal.notice(
        f"backend {backend_in_use(config.backend)} on {jax.devices()[0].device_kind}, "
        f"{model.dtype.name}{drafting}"
    )
    if dispatch.cuda_device() is not None:
        for line in kernels.lines(kernels.kernels_here(model.config, model.draft, model.dtype)):
            terminal.notice(line)
    if args.cache is not None:
        return with_cache(args, model, prompts[0], config)
    streaming = len(prompts) == 1 and not args.json
    out = qs.generate(
        model,
        prompts,
        config,
        jax.random.key(args.seed),
        on_text=(lambda _, piece: terminal.write(piece)) if streaming else None,
        progress=True,
    )
    outputs = [
        {"text": text, "tokens": tokens, **stats}
        for text, tokens, stats in zip(out.text, out.tokens, out.stats, strict=True)
    ]
    if config.logprobs is not None:
        for output, scores in zip(outputs, out.logprobs, strict=True):
            output["logprobs"] = [dataclasses.asdict(score) for score in scores]
    if not args.json:
        show_texts(out.text, streaming)
        for number, stats in enumerate(out.stats):
            terminal.notice((f"[{number}] " if len(prompts) > 1 else "") + summary(stats))
    return outputs[0] if len(outputs) == 1 else {"outputs": outputs}


def with_cache(
    args: argparse.Namespace, model: Any, prompt: Any, config: GenerateConfig
) -> dict[str, Any]:
    """Generate over the cache in --cache."""
    import jax

    import quantspec_jax as qs
    from quantspec_jax.engine.bucket import bucket
    from quantspec_jax.files import exists, remove_dead
    from quantspec_jax.text.prompts import read_prompts

    (ids,) = read_prompts(prompt, model.tokenizer, model.config.vocab_size)
    room = bucket(bucket(len(ids)) + config.max_new_tokens)
    config = dataclasses.replace(config, max_length=min(room, model.config.max_context))
    path = Path(args.cache)
    remove_dead(path)
    there = exists(path)
    session = qs.Session.load(path, model, config) if there else qs.Session(model, config)
    kept, before = len(session.prefixes), session.tokens
    on_text = None if args.json else terminal.write
    turn = session.generate(ids, jax.random.key(args.seed), on_text=on_text)
    n = len(before)  # after an interruption there may be no more tiles, but more tokens
    longer = len(session.tokens) > n and session.tokens[:n] == before
    format = args.cache_format or session.format
    if not there or longer or len(session.prefixes) > kept or format != session.format:
        session.save(path, format)
        terminal.notice(f"cache of {len(ids)} tokens written to {path}")
    output = {"text": turn.text, "tokens": turn.tokens, **turn.stats}
    if config.logprobs is not None:
        output["logprobs"] = [dataclasses.asdict(score) for score in turn.logprobs]
    if not args.json:
        terminal.write("\n")
        terminal.notice(f"{turn.stats['cached_tokens']} tokens of the prompt were kept")
        terminal.notice(summary(turn.stats))
    return output


def show_texts(texts: Sequence[str], streamed: bool) -> None:
    """The texts, numbered; of a streamed one the end of its line."""
    if streamed:
        terminal.write("\n")
        return
    for number, text in enumerate(texts):
        terminal.write(f"[{number}] {text}\n")


def summary(stats: dict[str, Any]) -> str:
    """One line of statistics for people."""
    cache = stats["cache_bytes"]
    parts = [f"{stats['new_tokens']} tokens ({stats['finish_reason']})"]
    if stats["decode_tokens_per_second"] is not None:
        parts.append(f"{stats['decode_tokens_per_second']:.1f} tokens/s")
    if stats["acceptance_rate"] is not None:
        parts.append(f"acceptance {stats['acceptance_rate']:.1%}")
    if stats["tokens_per_round"] is not None and stats["mode"] == "quantspec":
        parts.append(f"{stats['tokens_per_round']:.2f} tokens a round")
    if cache.get("bf16_equivalent"):
        ratio = cache["total"] / cache["bf16_equivalent"]
        parts.append(f"cache {cache['total']:,} bytes ({ratio:.2f} of bf16)")
    parts.append(f"prefill {stats['prefill_seconds']:.2f} s")
    parts.append(f"compilation {stats['compile_seconds']:.2f} s")
    return ", ".join(parts)
