"""The command line, `quantspec`.

Standard output is for results: streamed text, a table, or with --json one object and nothing else.
Progress, notices and errors go to standard error. Exit status: 0, 2 for what the caller got wrong,
1 for the rest, 130 when interrupted before there was a result. Heavy packages are imported where
they are needed, so that --help and wrong arguments answer at once.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import platform
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantspec_jax.cache.codecs import VIEWS
from quantspec_jax.checks import require
from quantspec_jax.generate.config import BACKENDS, MODES, GenerateConfig
from quantspec_jax.weights.formats import DraftConfig

if TYPE_CHECKING:
    from quantspec_jax.loading import Model

CALLER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
LONGEST_MESSAGE = 600
DTYPES = ("bfloat16", "float32")
BENCHES = ("kernels", "decode", "prefill")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
VERSIONS = (
    "quantspec-jax",
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is not for our users
    unraisable, sys.unraisablehook = sys.unraisablehook, _keep_interruption
    try:
        args = make_parser(argv).parse_args(argv)
        result = _run(args)
        if args.json:
            print(json.dumps(result))
        sys.stdout.flush()
        return 0
    except SystemExit as end:  # --help, --version
        return int(end.code or 0)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        return _fail(describe(error), 2 if isinstance(error, CALLER_ERRORS) else 1)
    finally:
        sys.unraisablehook = unraisable


def _keep_interruption(unraisable: Any) -> None:
    """Send Ctrl-C again where it came during garbage collection, which would lose it."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def _run(args: argparse.Namespace) -> Any:
    """The command's result. With --json whatever else prints goes to standard error."""
    elsewhere = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with elsewhere:
        return args.run(args)


def _fail(message: str, status: int) -> int:
    _notice(f"error: {message}")
    return status


def _notice(message: str) -> None:
    print(f"quantspec: {message}", file=sys.stderr, flush=True)


def describe(error: Exception) -> str:
    """One line for any error."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, ValueError | NotImplementedError | OSError) and str(error):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    line = " ".join(text.split())
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[:LONGEST_MESSAGE]}... (--debug shows all)"
    return line


# Arguments


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as a ValueError, in one line like every other error."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see {self.prog} --help)")


def make_parser(argv: Sequence[str] = ()) -> Parser:
    """The parser; `argv` tells whether the benchmarks have to be imported for their arguments."""
    parser = Parser(
        prog="quantspec",
        description="Self-speculative long-context decoding with a hierarchical 4-bit KV cache.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="versions that matter in a bug report"
    )
    parser.set_defaults(json=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_info(commands)
    _add_generate(commands)
    _add_eval(commands)
    _add_plan(commands)
    _add_bench(commands, load=next((a for a in argv if not a.startswith("-")), "") == "bench")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, *, json: bool = True) -> Parser:
    """A command with the options that all of them have."""
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    if json:
        parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**32:  # a key keeps 32 bits
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {2**32 - 1}")
    return seed


DRAFT_FIELDS = {
    "draft_group": "group_size",
    "draft_symmetric": "symmetric",
    "draft_layers": "layers",
    "draft_lm_head_bits": "lm_head_bits",
}


def _gamma(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer, nor auto") from None


def _add_draft_options(parser: Parser, *, convert: bool = False) -> None:
    """The options that say what the draft's weights are: at load, or to be stored."""
    group = parser.add_argument_group(
        "draft",
        "what to store (default: nothing)"
        if convert
        else "default: the draft stored with the checkpoint, else 4 bits rounded at load",
    )
    if convert:
        group.add_argument(
            "--draft",
            choices=("none", "rtn", "gptq"),
            help="weights rounded to nearest (rtn), or calibrated on a text (gptq)",
        )
        group.add_argument(
            "--draft-bits",
            type=_bits,
            metavar="B",
            help="4, 8, or for gptq an average such as 4.75: each layer gets what it needs (4)",
        )
        group.add_argument(
            "--draft-text", metavar="FILE", help="UTF-8 text for gptq (default: a text of Python's)"
        )
    else:
        group.add_argument(
            "--draft-bits", choices=("4", "8", "none"), help="none: the full weights (4)"
        )
    group.add_argument("--draft-group", type=int, metavar="N", help="input channels a scale (64)")
    group.add_argument(
        "--draft-symmetric", action="store_true", default=None, help="scales without minima"
    )
    group.add_argument(
        "--draft-layers",
        metavar="L",
        help="all, mlp, or names such as layers.*.down,layers.0.* (all)",
    )
    group.add_argument(
        "--draft-lm-head-bits",
        type=int,
        metavar="B",
        help="4: a copy of lm_head in 4 bits; 16: the target's own (16)",
    )
    group.add_argument(
        "--draft-from",
        metavar="CHECKPOINT",
        help="take the codes of a 4-bit checkpoint of the same model: GGUF, GPTQ, AWQ",
    )


def _bits(text: str) -> str:
    try:
        float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    return text


def draft_options(args: argparse.Namespace) -> dict[str, Any]:
    """The draft options that were given."""
    names = ("draft_bits", *DRAFT_FIELDS, "draft_from")
    given = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def draft_config(args: argparse.Namespace, method: str = "rtn") -> DraftConfig | str | None:
    """What the draft options say: a configuration, or a checkpoint to take codes from; None where
    none was given."""
    given = draft_options(args)
    if not given:
        return None
    if "draft_from" in given:
        source = given.pop("draft_from")
        _refuse_options(given, "--draft-from, which has its own format")
        return source
    bits = given.pop("draft_bits", "4")
    if bits == "none":
        _refuse_options(given, "--draft-bits none")
        return DraftConfig(bits=None)
    options: dict[str, Any] = {DRAFT_FIELDS[name]: value for name, value in given.items()}
    if float(bits) in (4, 8):
        options["bits"] = int(float(bits))
    else:
        options["average_bits"] = float(bits)
    return DraftConfig(method=method, **options)


def _refuse_options(given: dict[str, Any], reason: str) -> None:
    """Raise where options were given that `reason` rules out."""
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{names} cannot go with {reason}")


# quantspec convert


def _add_convert(commands: Any) -> None:
    parser = _command(commands, "convert", run_convert, "convert a checkpoint to Orbax", json=False)
    parser.add_argument("source", metavar="SOURCE", help="hub id, local directory or GGUF file")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="appears whole or not at all")
    parser.add_argument("--dtype", metavar="D", help="default: the source's; GGUF: bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it exists")
    _add_draft_options(parser, convert=True)


def run_convert(args: argparse.Namespace) -> None:
    """Convert and say where the result is."""
    from quantspec_jax.text.prompts import read_text

    draft = _draft_to_store(args)
    text = None if args.draft_text is None else read_text(args.draft_text, "draft text")
    import convert

    convert.convert(
        args.source,
        args.out_dir,
        dtype=args.dtype,
        overwrite=args.overwrite,
        draft=draft if isinstance(draft, DraftConfig) else None,
        draft_text=text,
        draft_from=draft if isinstance(draft, str) else None,
        progress=True,
    )
    print(args.out_dir)


def _draft_to_store(args: argparse.Namespace) -> DraftConfig | str | None:
    given = {} if args.draft_text is None else {"draft_text": args.draft_text}
    if args.draft_from is not None:
        named = {} if args.draft is None else {"draft": args.draft}
        _refuse_options(named | given, "--draft-from")
        return draft_config(args)
    if args.draft in (None, "none"):
        _refuse_options(draft_options(args) | given, "--draft none")
        return None
    if args.draft != "gptq":
        _refuse_options(given, f"--draft {args.draft}")
    return draft_config(args, args.draft) or DraftConfig(method=args.draft)


# quantspec info


def _add_info(commands: Any) -> None:
    parser = _command(
        commands, "info", run_info, "architecture and sizes of a model, without loading its weights"
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="hub id, local directory, GGUF file or converted directory"
    )


def run_info(args: argparse.Namespace) -> dict[str, Any]:
    """Read headers, compute sizes."""
    from quantspec_jax.info import info, table

    result = info(args.source)
    if not args.json:
        print(table(result))
    return result


# quantspec generate


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", run_generate, "continue a prompt")
    parser.add_argument("--model", required=True, metavar="M", help="what `convert` reads or wrote")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", metavar="P", help="repeat it for a batch")
    prompt.add_argument(
        "--prompt-file", metavar="F", help="UTF-8 text, used as it is; - reads standard input"
    )
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--system", metavar="S", help="system message (with --chat)")
    parser.add_argument("--mode", choices=MODES, default="quantspec", help="default: quantspec")
    parser.add_argument(
        "--kv", choices=VIEWS, help="what the target reads of the cache; autoregressive: full"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on the CPU, bfloat16 elsewhere")
    parser.add_argument(
        "--gamma", type=_gamma, metavar="N", help="tokens drafted a round, or auto (4)"
    )
    _add_draft_options(parser)
    parser.add_argument(
        "--pass-width", type=int, metavar="N", help="pad autoregressive passes to N rows (1)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument(
        "--stop", action="extend", nargs="+", metavar="S", help="end before any of these strings"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (0)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="0 is off (0)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="1 is off (1)")
    sampling.add_argument("--min-p", type=float, metavar="P", help="0 is off (0)")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is off (1)")
    sampling.add_argument("--seed", type=_seed, default=0, metavar="N", help="default: 0")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-new-tokens")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="kernels to use (auto)")


def generate_config(args: argparse.Namespace) -> GenerateConfig:
    """The configuration that the options of `generate` ask for; options that do not fit the mode
    are refused."""
    if args.mode == "autoregressive":
        given = {"gamma": args.gamma} if args.gamma is not None else {}
        _refuse_options(given | draft_options(args), "--mode autoregressive: nothing is drafted")
    elif args.pass_width is not None:
        _refuse_options({"pass_width": 0}, "--mode quantspec: a pass has gamma + 1 rows")
    names = ("gamma", "kv", "pass_width", *SAMPLING)
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    return GenerateConfig(
        mode=args.mode,
        max_new_tokens=args.max_new_tokens,
        stop=tuple(args.stop or ()),
        ignore_eos=args.ignore_eos,
        backend=args.backend,
        **options,
    )


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    """Generate; stream the text of a single prompt unless the result is wanted as JSON."""
    from quantspec_jax.text.prompts import read_text

    config = generate_config(args)
    draft = draft_config(args)
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")
    prompts: list[Any] = args.prompt or [read_text(args.prompt_file)]
    for prompt in prompts:
        require(prompt != "", "prompt", prompt, "a text of one character or more")

    import jax

    import quantspec_jax as qs
    from quantspec_jax.api import backend_in_use

    model = _load(args, draft if config.mode == "quantspec" else DraftConfig(bits=None))
    if args.chat:
        from quantspec_jax.text.chat import chat_ids

        prompts = [chat_ids(prompt, model.tokenizer, args.system) for prompt in prompts]
    drafting = f", draft: {model.draft.describe()}" if config.mode == "quantspec" else ""
    _notice(
        f"backend {backend_in_use(config.backend)} on {jax.devices()[0].device_kind}, "
        f"{model.dtype.name}{drafting}"
    )
    streaming = len(prompts) == 1 and not args.json
    out = qs.generate(
        model,
        prompts,
        config,
        jax.random.key(args.seed),
        on_text=(lambda _, piece: _write(piece)) if streaming else None,
        progress=True,
    )
    outputs = [
        {"text": text, "tokens": tokens, **stats}
        for text, tokens, stats in zip(out.text, out.tokens, out.stats, strict=True)
    ]
    if not args.json:
        _show_texts(out.text, streaming)
        for number, stats in enumerate(out.stats):
            _notice((f"[{number}] " if len(prompts) > 1 else "") + summary(stats))
    return outputs[0] if len(outputs) == 1 else {"outputs": outputs}


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _show_texts(texts: Sequence[str], streamed: bool) -> None:
    if streamed:
        _write("\n")
        return
    for number, text in enumerate(texts):
        _write(f"[{number}] {text}\n")


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


def _load(args: argparse.Namespace, draft: DraftConfig | str | None) -> Model:
    """Load `args.model`, with a notice where draft options override a stored draft."""
    import quantspec_jax as qs
    from quantspec_jax import compilation_cache

    compilation_cache.enable()
    if draft_options(args) and draft is not None:
        import convert

        stored = convert.open_source(args.model).draft_config
        if stored is not None:
            _notice(f"draft options override the stored draft ({stored.describe()})")
    return qs.load(args.model, dtype=args.dtype, draft=draft)


# quantspec eval


def _add_eval(commands: Any) -> None:
    parser = _command(commands, "eval", run_eval, "measure quality over a text, teacher-forced")
    parser.add_argument("measure", choices=("perplexity", "acceptance"))
    parser.add_argument("--model", required=True, metavar="M", help="what `convert` reads or wrote")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--context", required=True, type=int, metavar="N", help="tokens to read")
    parser.add_argument("--skip-characters", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on the CPU, bfloat16 elsewhere")
    _add_draft_options(parser)
    group = parser.add_argument_group(
        "sweep", "acceptance of several drafts, and the limit of the speed-up that each promises"
    )
    group.add_argument(
        "--sweep", action="store_true", help="common formats, rounded to nearest, and the draft"
    )
    group.add_argument(
        "--draft-of",
        action="append",
        metavar="DIR",
        help="also the draft stored with this converted checkpoint of the model; may be repeated",
    )
    group.add_argument("--preset", metavar="NAME", help="predict for these shapes (the model's)")
    group.add_argument("--output", metavar="FILE", help="record the run as JSON")
    group.add_argument("--plot", metavar="FILE", help="acceptance against bits: .png, .svg, .pdf")


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    """Read the text, evaluate."""
    from quantspec_jax.text.prompts import encode, read_text

    draft = draft_config(args)
    check_sweep_options(args)
    require(args.context >= 8, "--context", args.context, "8 tokens or more")
    require(args.skip_characters >= 0, "--skip-characters", args.skip_characters, "0 or more")
    text = read_text(args.text, "text file")[args.skip_characters :]
    if args.measure == "perplexity":
        if draft_options(args):
            _notice("perplexity drafts nothing: draft options change nothing")
        draft = DraftConfig(bits=None)

    from quantspec_jax import evaluate

    model = _load(args, draft)
    limit = model.config.max_context
    require(args.context <= limit, "--context", args.context, f"at most {limit}, the model's")
    tokens = encode(text, model.tokenizer, "text")
    have = f"{len(tokens)} tokens after --skip-characters"
    require(len(tokens) >= args.context, args.text, have, f"{args.context} (--context) or more")
    tokens = tokens[: args.context]
    if args.measure == "perplexity":
        result = evaluate.perplexity(model, tokens, context=args.context, progress=True)
    elif args.sweep:
        return run_sweep(args, model, tokens)
    else:
        result = evaluate.acceptance(model, tokens, progress=True)
    if not args.json:
        _show(result)
    return result


def check_sweep_options(args: argparse.Namespace) -> None:
    """Raise for what a sweep could not do, before anything is loaded."""
    names = ("draft_of", "preset", "output", "plot")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if not args.sweep:
        _refuse_options(given, "an evaluation of one draft: they need --sweep")
        return
    if args.measure == "perplexity":
        _refuse_options({"sweep": True}, "perplexity: it evaluates the cache, not drafts")
    _preset(args.preset)
    if args.output is not None:
        folder = os.path.dirname(args.output) or "."
        require(os.path.isdir(folder), "--output", args.output, "a file in an existing directory")
    if args.plot is not None:
        from quantspec_jax.plotting import check_plot

        check_plot(args.plot)


def _preset(name: str | None) -> Any:
    """The configuration of a preset, None for no name."""
    from quantspec_jax.models.presets import PRESETS

    require(name in (None, *PRESETS), "--preset", name, ", ".join(sorted(PRESETS)))
    return None if name is None else PRESETS[name]


def run_sweep(args: argparse.Namespace, model: Model, tokens: Sequence[int]) -> dict[str, Any]:
    """Evaluate the drafts; write the files that were asked for."""
    from pathlib import Path

    from quantspec_jax.bench import record
    from quantspec_jax.evaluate import sweep as run
    from quantspec_jax.evaluate.sweep import default_drafts, plot, table

    drafts = [*default_drafts(model), *(stored_draft(model, path) for path in args.draft_of or ())]
    found = run(model, tokens, drafts, shapes=_preset(args.preset), progress=True)
    name = Path(args.model).stem
    rows = found.pop("rows")
    settings = {
        "model": name,
        "text": Path(args.text).name,
        "context": args.context,
        "skip_characters": args.skip_characters,
        "dtype": model.dtype.name,
        "predicted_for": args.preset or name,
    }
    result = {**settings, **found, "rows": rows}
    if args.output is not None:
        command = f"quantspec eval acceptance --sweep --model {name} --text {settings['text']} "
        command += f"--context {args.context} --skip-characters {args.skip_characters}"
        command += f" --preset {args.preset}" if args.preset else ""
        command += "".join(f" --draft-of {Path(path).name}" for path in args.draft_of or ())
        record.write(Path(args.output), command, rows, **settings, **found)
    if args.plot is not None:
        plot(result, Path(args.plot))
    if not args.json:
        print(table(result))
    return result


def stored_draft(model: Model, directory: str) -> Model:
    """The same model with the draft that is stored in another directory."""
    import convert
    from quantspec_jax.loading import Model

    checkpoint = convert.open_source(directory)
    stored = checkpoint.load_draft()
    require(stored is not None, "--draft-of", directory, "a directory converted with a draft")
    assert stored is not None
    same = checkpoint.config == model.config
    require(same, "--draft-of", directory, "a checkpoint of the evaluated model")
    return Model(model.config, model.params, model.tokenizer, *stored)


def _show(result: dict[str, Any], prefix: str = "") -> None:
    """A result for people: a line an entry."""
    for name, value in result.items():
        if isinstance(value, dict):
            _show(value, f"{prefix}{name} ")
        else:
            number = f"{value:.6g}" if isinstance(value, float) else value
            print(f"{prefix}{name}".ljust(24), number)


# quantspec plan


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        run_plan,
        "recommend the draft's format and gamma, without loading weights",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("source", nargs="?", metavar="SOURCE", help="what `convert` reads or wrote")
    model.add_argument("--preset", metavar="NAME", help="shapes of a well-known model")
    parser.add_argument("--context", required=True, type=int, metavar="N", help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences (1)")
    acceptance = parser.add_argument_group("acceptance (default: measured on SmolLM2-135M)")
    given = acceptance.add_mutually_exclusive_group()
    given.add_argument(
        "--acceptance",
        type=float,
        metavar="A",
        help="of the stored draft, else of 4 bits, asymmetric, group 64",
    )
    given.add_argument(
        "--measured", metavar="FILE", help="what `eval acceptance --sweep --output` wrote"
    )
    acceptance.add_argument(
        "--sampled", action="store_true", help="acceptance at temperature 1, not greedy"
    )
    device = parser.add_argument_group("device")
    device.add_argument(
        "--device", metavar="NAME", help="figures of its data sheet: h200, a100, ..."
    )
    device.add_argument("--bandwidth", type=float, metavar="GB/s", help="of memory that is read")
    device.add_argument("--memory", type=float, metavar="GiB", help="default: the device's")
    device.add_argument(
        "--speed", metavar="FILE", help="bandwidth and efficiencies, as `bench decode --json` wrote"
    )
    for name in ("plain", "draft", "verify"):
        device.add_argument(
            f"--{name}-efficiency", type=float, metavar="E", help="share of the limit reached (1)"
        )


def run_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Put together what is known of model, device and acceptance, and plan."""
    from quantspec_jax import plan as planner

    name, model, stored = _planned_model(args)
    device, device_name, efficiency = _planned_device(args)
    candidates, acceptance_source = planner.candidates(
        args.acceptance, args.measured, stored, args.sampled
    )
    setting = planner.Setting(model, args.context, device, args.batch, efficiency)
    result = {
        "model": name,
        "context": args.context,
        "batch": args.batch,
        "device": {
            "name": device_name,
            "bandwidth_gb_per_second": device.bandwidth,
            "memory_gib": device.memory,
        },
        "efficiency": vars(efficiency),
        "acceptance_source": acceptance_source,
        **planner.plan(setting, candidates),
        "notes": planner.notes(setting),
    }
    if not args.json:
        print(planner.table(result))
    return result


def _planned_model(args: argparse.Namespace) -> tuple[str, Any, DraftConfig | None]:
    """Name, configuration and stored draft of what to plan for."""
    if args.preset is not None:
        return args.preset, _preset(args.preset), None
    import convert

    checkpoint = convert.open_source(args.source)
    return str(args.source), checkpoint.config, checkpoint.draft_config


def _planned_device(args: argparse.Namespace) -> tuple[Any, str, Any]:
    """The device, its name, and the efficiencies."""
    import dataclasses

    from quantspec_jax import plan as planner

    known = planner.DEVICES
    require(args.device in (None, *known), "--device", args.device, ", ".join(known))
    bandwidth, efficiency = args.bandwidth, planner.Efficiency()
    if args.speed is not None:
        measured, efficiency = planner.measured_speed(args.speed, args.context)
        bandwidth = measured if bandwidth is None else bandwidth
    shares = {n: getattr(args, f"{n}_efficiency") for n in ("plain", "draft", "verify")}
    shares = {name: share for name, share in shares.items() if share is not None}
    efficiency = dataclasses.replace(efficiency, **shares)
    if args.device is None:
        require(
            bandwidth is not None, "--device", None, f"{', '.join(known)}, or --bandwidth in GB/s"
        )
        return planner.Device(args.memory, bandwidth), "the device", efficiency
    changes = {"bandwidth": bandwidth, "memory": args.memory}
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(known[args.device], **changes), args.device, efficiency


# quantspec bench


def _add_bench(commands: Any, load: bool) -> None:
    summary = "measure speed"
    parser = commands.add_parser("bench", help=summary, description=summary)
    if not load:
        return
    from quantspec_jax import bench

    found = {module.name for module in pkgutil.iter_modules(bench.__path__)}
    names = [name for name in BENCHES if name in found]
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name in names:
        module = importlib.import_module(f"quantspec_jax.bench.{name}")
        summary = (module.__doc__ or name).strip().splitlines()[0]
        module.add_arguments(_command(benches, name, run_bench, summary))


def run_bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run one of the benchmarks."""
    from quantspec_jax import compilation_cache

    compilation_cache.enable()
    module = importlib.import_module(f"quantspec_jax.bench.{args.bench}")
    result = module.run(args)
    if not args.json:
        _show_rows(result)
    return result


def _show_rows(result: dict[str, Any]) -> None:
    """A benchmark's result for people: its rows, a line each."""
    for row in result.get("rows", [result]):
        cells = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
        )
        print("  ".join(cells))


# quantspec --version


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for name, version in versions().items():
            print(f"{name:<17} {version}")
        parser.exit()


def versions() -> dict[str, str]:
    """What matters in a bug report, by name."""
    from importlib import metadata

    import jax

    try:
        device = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    except RuntimeError as error:  # a backend that does not start
        device = describe(error)
    return {
        **{name: metadata.version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
    }


if __name__ == "__main__":
    sys.exit(main())
