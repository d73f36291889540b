"""`quantspec eval`: perplexity, a draft's acceptance, or methods for the cache, over a text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantspec_jax.checks import require
from quantspec_jax.commands import terminal
from quantspec_jax.commands.options import (
    add_draft,
    add_dtype,
    add_model,
    add_reading,
    add_rope,
    command,
    draft_config,
    draft_options,
    given,
    load_model,
    preset,
    refuse,
    rope,
)
from quantspec_jax.files import check_output
from quantspec_jax.weights.formats import DraftConfig

if TYPE_CHECKING:
    from quantspec_jax.loading import Model
    from quantspec_jax.models.config import RopeScaling


READING = ("draft_policy", "draft_share", "draft_view")


def add(commands: Any) -> None:
    """The parser."""
    parser = command(commands, "eval", run, "measure quality over a text, teacher-forced")
    parser.add_argument("measure", choices=("perplexity", "acceptance", "codecs", "quality"))
    add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--context", required=True, type=int, metavar="N", help="tokens to read")
    parser.add_argument("--skip-characters", type=int, default=0, metavar="N", help="default: 0")
    add_dtype(parser)
    add_draft(parser)
    add_reading(parser)
    add_rope(parser)
    parser.add_argument("--output", metavar="FILE", help="record the run as JSON")
    group = parser.add_argument_group(
        "codecs", "methods that compress a cache, as what is decoded from and as a draft's"
    )
    group.add_argument(
        "--codec", nargs="+", metavar="NAME", help="which methods (all; of quality: full int8 int4)"
    )
    group.add_argument(
        "--kv-text", metavar="FILE", help="what methods learn from (a text of Python's)"
    )
    group.add_argument(
        "--kv-chunks", type=int, metavar="N", help="how much of it: chunks of 1,024 tokens (16)"
    )
    group.add_argument(
        "--places",
        type=int,
        metavar="N",
        help="read so many pieces of --context tokens, one after the other (1)",
    )
    group = parser.add_argument_group(
        "quality", "tasks about contexts of --context tokens, compressed before a question is seen"
    )
    group.add_argument(
        "--task", nargs="+", metavar="NAME", help="which (all); longbench:NAME, scbench:NAME"
    )
    group.add_argument("--data", metavar="DIR", help="that has the data of those two, JSON lines")
    group.add_argument("--samples", type=int, metavar="N", help="contexts of a task (10)")
    turns = ("questions", "multi-turn")
    group.add_argument("--turns", choices=turns, help="each alone (default), or in sequence")
    group.add_argument("--seed", type=int, metavar="N", help="of the samples (0)")
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
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="of codecs or a sweep, quality against bits: .png, .svg, .pdf",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the text, evaluate."""
    from quantspec_jax.text.prompts import encode, read_text

    draft = draft_config(args)
    scaling = rope(args)
    check_reading(args)
    check_codecs(args)
    check_sweep(args)
    check_output(args.output)
    require(args.context >= 8, "--context", args.context, "8 tokens or more")
    require(args.skip_characters >= 0, "--skip-characters", args.skip_characters, "0 or more")
    text = read_text(args.text, "text file")[args.skip_characters :]
    learned = None if args.kv_text is None else read_text(args.kv_text, "--kv-text")
    if args.measure != "acceptance":
        if draft_options(args):
            terminal.notice(f"{args.measure} draws on no draft: draft options change nothing")
        draft = DraftConfig(bits=None)

    from quantspec_jax import evaluate

    model = load_model(args, draft)
    limit = model.config.max_context
    require(args.context <= limit, "--context", args.context, f"at most {limit}, the model's")
    if args.measure == "quality":
        return quality(args, model, text, learned)
    tokens = encode(text, model.tokenizer, "text")
    have = f"{len(tokens)} tokens after --skip-characters"
    least = args.context * (args.places or 1)
    allowed = f"{least} (--context, --places) or more"
    require(len(tokens) >= least, args.text, have, allowed)
    tokens = tokens[:least]
    if args.sweep:
        return sweep(args, model, tokens, scaling)
    if args.measure == "codecs":
        return codecs(args, model, tokens, learned)
    if args.measure == "perplexity":
        result = evaluate.perplexity(model, tokens, context=args.context, progress=True)
    else:
        result = evaluate.acceptance(model, tokens, progress=True, **given(args, *READING))
    write_record(args, [result], **settings(args, model))
    if not args.json:
        terminal.show(result)
    return result


def codecs(
    args: argparse.Namespace, model: Model, tokens: Sequence[int], text: str | None
) -> dict[str, Any]:
    """A row a method."""
    from quantspec_jax import evaluate
    from quantspec_jax.evaluate import compared
    from quantspec_jax.methods import METHODS

    chosen = args.codec or tuple(METHODS)
    stored = stored_kv(args, chosen)
    described = settings(args, model) | ({"stored": list(stored)} if stored else {})
    found = evaluate.codecs(
        model,
        tokens,
        chosen,
        context=args.context,
        text=text,
        stored=stored,
        on_row=keeping(args, described),
        progress=True,
        **given(args, "places", "kv_chunks"),
    )
    result = {**described, **found}
    if args.plot is not None:
        compared.plot(result, Path(args.plot))
    if not args.json:
        print(compared.table(result))
    return result


def quality(
    args: argparse.Namespace, model: Model, haystack: str, text: str | None
) -> dict[str, Any]:
    """A row a task and method."""
    from quantspec_jax import evaluate

    options = given(args, "samples", "seed")
    if args.task is not None:
        options["tasks"] = args.task
    if args.codec is not None:
        options["methods"] = args.codec
    if args.turns is not None:
        options["mode"] = args.turns
    if args.data is not None:
        options["data"] = Path(args.data)
    described = settings(args, model)
    found = evaluate.quality(
        model,
        context=args.context,
        haystack=haystack,
        text=text,
        on_row=keeping(args, described),
        progress=True,
        **options,
    )
    result = {**described, **found}
    if not args.json:
        terminal.show_rows(result)
    return result


def keeping(args: argparse.Namespace, described: dict[str, Any]) -> Any:
    """Write a result's rows as they come: an interruption leaves those that there are."""

    def keep(found: dict[str, Any]) -> None:
        more = {name: value for name, value in found.items() if name != "rows"}
        write_record(args, found["rows"], **described, **more)

    return keep


def stored_kv(args: argparse.Namespace, chosen: Sequence[str]) -> dict[str, Any]:
    """What the codec that is stored with the checkpoint has learned, by its name, where it is one
    of the chosen and no other text is named."""
    if args.kv_text is not None:
        return {}
    import convert

    found = convert.open_source(args.model).load_kv()
    if found is None or found[0].name not in chosen:
        return {}
    terminal.notice(f"{found[0].name} is the one stored with the checkpoint (--kv-text: learn it)")
    return {found[0].name: found[1]}


def settings(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """What was evaluated, for a record."""
    from quantspec_jax.bench import record

    return {
        "model": record.model_name(args.model),
        "text": Path(args.text).name,
        "context": args.context,
        "skip_characters": args.skip_characters,
        "dtype": model.dtype.name,
    }


def write_record(args: argparse.Namespace, rows: list[dict[str, Any]], **described: Any) -> None:
    """The file of --output, if one is asked for."""
    from quantspec_jax.bench import record

    if args.output is not None:
        command = record.command(f"quantspec eval {args.measure}", args)
        record.write(Path(args.output), command, rows, **described)


def check_reading(args: argparse.Namespace) -> None:
    """Raise for what a draft could not read, before anything is loaded."""
    from quantspec_jax.generate.policies import policy

    reads = given(args, *READING)
    refuse(reads if args.measure != "acceptance" else {}, f"{args.measure}: it has no draft")
    refuse(reads if args.sweep else {}, "--sweep, which chooses what drafts read")
    refuse({"draft_policy": "auto"} if args.draft_policy == "auto" else {}, "eval: name one")
    policy(args.draft_policy or "all", args.draft_share)


def check_codecs(args: argparse.Namespace) -> None:
    """Raise for what `codecs` could not do, before anything is loaded."""
    if args.measure != "quality":
        asked = given(args, "task", "data", "samples", "turns", "seed")
        refuse(asked, f"{args.measure}: they need quality")
    if args.measure != "codecs":
        refuse(given(args, "places", "kv_chunks"), f"{args.measure}: they need codecs")
    for name, number in given(args, "places", "kv_chunks").items():
        require(number >= 1, "--" + name.replace("_", "-"), number, "1 or more")
    if args.measure not in ("codecs", "quality"):
        refuse(given(args, "codec", "kv_text"), f"{args.measure}: they need codecs")
        return
    sweep = {"sweep": True} if args.sweep else {}
    refuse(sweep, f"{args.measure}: it compares methods, not drafts")
    from quantspec_jax.methods import METHODS

    unknown = [name for name in args.codec or () if name not in METHODS]
    require(not unknown, "--codec", ", ".join(unknown), ", ".join(METHODS))
    if args.measure == "codecs":
        check_plot(args)
        return
    from quantspec_jax.evaluate import data_tasks
    from quantspec_jax.evaluate.tasks import TASKS

    named = [name for name in args.task or () if data_tasks.is_named(name)]
    if not named:
        refuse(given(args, "data"), "tasks that need none: name longbench:NAME or scbench:NAME")
    data_tasks.check(named, args.codec or (), None if args.data is None else Path(args.data))
    unknown = [name for name in args.task or () if name not in (*TASKS, *named)]
    require(not unknown, "--task", ", ".join(unknown), ", ".join(TASKS))


def check_sweep(args: argparse.Namespace) -> None:
    """Raise for what a sweep could not do, before anything is loaded."""
    if not args.sweep:
        plot = () if args.measure == "codecs" else ("plot",)
        options = given(args, "draft_of", "preset", *plot)
        refuse(options, "an evaluation of one draft: they need --sweep")
        return
    if args.measure == "perplexity":
        refuse({"sweep": True}, "perplexity: it evaluates the cache, not drafts")
    preset(args.preset)
    check_plot(args)


def check_plot(args: argparse.Namespace) -> None:
    """Raise for a plot that could not be made."""
    if args.plot is not None:
        from quantspec_jax import plotting

        plotting.check_plot(args.plot)


def sweep(
    args: argparse.Namespace, model: Model, tokens: Sequence[int], scaling: RopeScaling | None
) -> dict[str, Any]:
    """Evaluate the drafts; write the files that were asked for."""
    from quantspec_jax import evaluate
    from quantspec_jax.evaluate.sweep import default_drafts, plot, table

    stored = [stored_draft(model, path, scaling) for path in args.draft_of or ()]
    drafts = [*default_drafts(model), *stored]
    found = evaluate.sweep(model, tokens, drafts, shapes=preset(args.preset), progress=True)
    rows = found.pop("rows")
    described = settings(args, model)
    described |= {"predicted_for": args.preset or described["model"], **found}
    result = {**described, "rows": rows}
    write_record(args, rows, **described)
    if args.plot is not None:
        plot(result, Path(args.plot))
    if not args.json:
        print(table(result))
    return result


def stored_draft(model: Model, directory: str, scaling: RopeScaling | None = None) -> Model:
    """The same model with the draft that is stored in another directory, whose context is stretched
    as the model's was."""
    import convert
    from quantspec_jax.loading import Model

    checkpoint = convert.open_source(directory, scaling)
    stored = checkpoint.load_draft()
    require(stored is not None, "--draft-of", directory, "a directory converted with a draft")
    assert stored is not None
    same = checkpoint.config == model.config
    require(same, "--draft-of", directory, "a checkpoint of the evaluated model")
    return Model(model.config, model.params, model.tokenizer, *stored)
