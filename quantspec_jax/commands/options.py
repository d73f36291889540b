"""Options that several commands have, and what they say.

Each group of options is a pair: one function adds it to a parser, another reads it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quantspec_jax.checks import require
from quantspec_jax.commands import terminal
from quantspec_jax.models.config import ROPE_SCALINGS, RopeScaling
from quantspec_jax.weights.formats import DraftConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from quantspec_jax.loading import Model
    from quantspec_jax.models.config import ModelConfig

DTYPES = ("bfloat16", "float32")
# The options of `add_draft_options` by the field of DraftConfig that they set; --draft-bits and
# --draft-from, which decide between kinds of drafts, are not among them.
DRAFT_FIELDS = {
    "draft_group": "group_size",
    "draft_symmetric": "symmetric",
    "draft_layers": "layers",
    "draft_lm_head_bits": "lm_head_bits",
    "draft_lm_head_first": "lm_head_first",
}


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as a ValueError, in one line like every other error.

    Args:
      fill: adds the arguments when the parser is first used, where they are slow to import.
    """

    def __init__(self, *, fill: Callable[[Parser], None] | None = None, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self._fill = fill

    def complete(self) -> None:
        """Add what `fill` adds, once."""
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self)

    def parse_known_args(self, *args: Any, **settings: Any) -> Any:
        self.complete()
        return super().parse_known_args(*args, **settings)

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see {self.prog} --help)")


def command(
    commands: Any, name: str, run: Callable[..., Any], summary: str, *, json: bool = True
) -> Parser:
    """A command with the options that all of them have."""
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    if json:
        parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that were given, by name."""
    found = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def refuse(options: Mapping[str, Any], reason: str) -> None:
    """Raise where options were given that `reason` rules out."""
    if options:
        names = ", ".join("--" + name.replace("_", "-") for name in options)
        raise ValueError(f"{names} cannot go with {reason}")


def add_cache_format(parser: argparse.ArgumentParser) -> None:
    """In which format --cache is written."""
    parser.add_argument(
        "--cache-format",
        choices=("planes", "aqua"),
        help="what --cache is written in: planes, as they are; aqua, 2 to 4 bits a value by the "
        "predictors that `convert --kv aqua` stores, which loses a little (as it was, else planes)",
    )


def check_cache_format(args: argparse.Namespace, model: Any) -> None:
    """What is wrong with --cache-format, before anything is generated."""
    from quantspec_jax.engine.at_rest import check_format

    if args.cache_format is not None:
        check_format(args.cache_format, model)


def seed(text: str) -> int:
    """An option's value: a seed."""
    number = int(text)
    if not 0 <= number < 2**32:  # a key keeps 32 bits
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {2**32 - 1}")
    return number


def gamma(text: str) -> int | str:
    """An option's value: a number of tokens, or auto."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer, nor auto") from None


def bits(text: str) -> str:
    """An option's value: bits a weight, kept as they were typed."""
    try:
        float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    return text


def preset(name: str | None) -> ModelConfig | None:
    """The shapes of a well-known model; None for no name."""
    from quantspec_jax.models.presets import PRESETS

    require(name in (None, *PRESETS), "--preset", name, ", ".join(sorted(PRESETS)))
    return None if name is None else PRESETS[name]


# The model


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model."""
    parser.add_argument("--model", required=True, metavar="M", help="what `convert` reads or wrote")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype, to compute in."""
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on the CPU, bfloat16 elsewhere")


def load_model(args: argparse.Namespace, draft: DraftConfig | str | None) -> Model:
    """Load `args.model`, with a notice where draft options override a stored draft."""
    import quantspec_jax as qs
    from quantspec_jax import compilation_cache

    compilation_cache.enable()
    if draft_options(args) and draft is not None:
        import convert

        stored = convert.open_source(args.model).draft_config
        if stored is not None:
            terminal.notice(f"draft options override the stored draft ({stored.describe()})")
    return qs.load(args.model, dtype=args.dtype, draft=draft, rope=rope(args), mesh=mesh(args))


# Several devices


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """--mesh."""
    parser.add_argument(
        "--mesh",
        type=mesh_sizes,
        metavar="AXIS=N",
        help="devices that hold the model together, such as tp=2,cp=2: tp splits heads, channels "
        "and vocabulary, cp the context, dp the prompts (one device)",
    )
    group = parser.add_argument_group("several processes", "one a host, each with this command")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens; auto: what Slurm, Open MPI or Kubernetes say",
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="this one's number, from 0 on")
    group.add_argument(
        "--process-timeout", type=int, metavar="S", help="seconds until one counts as failed (45)"
    )


def mesh_sizes(text: str) -> dict[str, int]:
    """An option's value: axes and their sizes, in order."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equal, number = part.partition("=")
        if axis not in ("tp", "cp", "dp") or not equal or not number.isdecimal() or axis in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} is not tp=N,cp=N,dp=N or some of these")
        sizes[axis] = int(number)
    return sizes


def join(args: argparse.Namespace) -> None:
    """Meet the other processes that the options name."""
    options = given(args, "num_processes", "process_id", "process_timeout")
    if getattr(args, "coordinator", None) is None:
        refuse(options, "one process: name --coordinator")
        return
    require(args.mesh is not None, "--mesh", args.mesh, "the devices of all, with --coordinator")
    from quantspec_jax import processes

    seconds = processes.SECONDS if args.process_timeout is None else args.process_timeout
    processes.join(args.coordinator, args.num_processes, args.process_id, seconds)
    if not processes.is_first() and hasattr(args, "output"):
        args.output = None


def silent(args: argparse.Namespace) -> bool:
    """Whether another process prints what this one would."""
    if getattr(args, "coordinator", None) is None:
        return False
    from quantspec_jax import processes

    return not processes.is_first()


def leave(args: argparse.Namespace | None, status: int) -> None:
    """End at once after an error where there are other processes."""
    if getattr(args, "coordinator", None) is not None:
        from quantspec_jax import processes

        processes.leave(status)


def mesh(args: argparse.Namespace) -> Mesh | None:
    """What --mesh says; None where it was not given."""
    from quantspec_jax.sharding import make_mesh

    sizes = getattr(args, "mesh", None)
    return None if sizes is None else make_mesh(sizes)


# Rotary position embedding


def add_rope(parser: argparse.ArgumentParser) -> None:
    """--rope-scaling and --rope-scale."""
    group = parser.add_argument_group("RoPE", "default: as the checkpoint says")
    group.add_argument(
        "--rope-scaling",
        choices=ROPE_SCALINGS,
        help="how positions beyond the context of training are read; none: not at all",
    )
    group.add_argument(
        "--rope-scale", type=float, metavar="F", help="the context grows by this factor"
    )


def rope(args: argparse.Namespace) -> RopeScaling | None:
    """What the options say; None where no scaling was named.

    Raises:
      ValueError: one option without the other, or a scale that is none.
    """
    kind, scale = args.rope_scaling, args.rope_scale
    if kind in (None, "none"):
        named = (
            "--rope-scaling none" if kind else "the checkpoint's own scaling: name --rope-scaling"
        )
        refuse(given(args, "rope_scale"), named)
        return None if kind is None else RopeScaling(kind)
    require(scale is not None, "--rope-scale", scale, f"a number > 1, for --rope-scaling {kind}")
    return RopeScaling(kind, scale)


# What the draft reads


def add_reading(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--draft-policy, --draft-share and --draft-view; of several each may have more values."""
    from quantspec_jax.cache.codecs import CODECS
    from quantspec_jax.generate.policies import POLICIES

    many: dict[str, Any] = {"nargs": "+"} if several else {}
    parser.add_argument(
        "--draft-policy",
        choices=(*POLICIES, "auto"),
        help="which pages of the cache the draft reads; auto: what promises most there (auto; in a "
        "server all)",
        **many,
    )
    parser.add_argument(
        "--draft-share", type=float, metavar="F", help="how much of it, in (0, 1]", **many
    )
    parser.add_argument(
        "--draft-view",
        choices=CODECS["hierarchical"].views,
        help="in 4 bits, or in 8 as the target does (int4)",
        **many,
    )


def add_every(parser: argparse.ArgumentParser, **many: Any) -> None:
    """--draft-every."""
    words = "rounds that read the same pages, of a policy that chooses anew (1)"
    parser.add_argument("--draft-every", type=int, metavar="N", help=words, **many)


def add_lookup(parser: argparse.ArgumentParser, **many: Any) -> None:
    """--lookup."""
    words = (
        "tokens copied a round, in place of drafts, where the text's last ones stood before; "
        "0: none (7 with --gamma auto, else 0)"
    )
    parser.add_argument("--lookup", type=int, metavar="N", help=words, **many)


# The draft's weights


def add_draft(parser: argparse.ArgumentParser, *, convert: bool = False) -> None:
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
            type=bits,
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
        "--draft-lm-head-first",
        type=int,
        metavar="N",
        help="beside 4 bits: tokens of the smallest ids that are left as the target's (0)",
    )
    group.add_argument(
        "--draft-from",
        metavar="CHECKPOINT",
        help="take the codes of a 4-bit checkpoint of the same model: GGUF, GPTQ, AWQ",
    )


def draft_options(args: argparse.Namespace) -> dict[str, Any]:
    """The draft options that were given."""
    return given(args, "draft_bits", *DRAFT_FIELDS, "draft_from")


def draft_config(args: argparse.Namespace, method: str = "rtn") -> DraftConfig | str | None:
    """What the draft options say: a configuration, or a checkpoint to take codes from; None where
    none was given."""
    options = draft_options(args)
    if not options:
        return None
    if "draft_from" in options:
        source = options.pop("draft_from")
        refuse(options, "--draft-from, which has its own format")
        return source
    wanted = options.pop("draft_bits", "4")
    if wanted == "none":
        refuse(options, "--draft-bits none")
        return DraftConfig(bits=None)
    fields: dict[str, Any] = {DRAFT_FIELDS[name]: value for name, value in options.items()}
    if float(wanted) in (4, 8):
        fields["bits"] = int(float(wanted))
    else:
        fields["average_bits"] = float(wanted)
    return DraftConfig(method=method, **fields)
