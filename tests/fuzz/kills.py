"""Kill conversions, calibrations and saves of a cache at random, and look at what is left.

    python tests/fuzz/kills.py --kills 200 [--seed 0] [--job plain convert overwrite calibrate ...]

A command is killed with SIGKILL, SIGTERM or SIGINT at a moment of its run, some a second time when
they are run again, then the same one runs to its end. Afterwards the checkpoint is, byte for byte
but for two dates and a name that Orbax notes, that of a run which nobody killed; nothing is left
beside it; and what others have there was not touched. After SIGTERM and SIGINT nothing but finished
layers is left even before. A tenth as often two are started, the second at a moment of the first's
run: one wins, and the other says so; of half of these pairs the first is killed, and the same
command then goes through. Prints a line a job, and exits with 1 at the first thing that is
otherwise.

Each run is a fork of this process, which has imported everything and started nothing of JAX's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint
import transformers.models.llama
from transformers import AutoConfig, AutoTokenizer

import convert
import quantspec_jax.weights.calibrate
from quantspec_jax import cli
from quantspec_jax.bench import record

# Otherwise most of a run, and of the kills, is importing.
PRELOADED = (
    *(AutoConfig, AutoTokenizer, transformers.models.llama.LlamaConfig, orbax.checkpoint),
    *(convert, quantspec_jax.weights.calibrate),
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HANDLED = {128 + signal.SIGTERM: signal.SIGTERM, 128 + signal.SIGINT: signal.SIGINT}
FOREIGN = {
    "chapter.txt": b"precious",
    ".out.4567cdef.partial/chapter.txt": b"of nobody who is known to be dead",
    ".out.4567cdef.old/chapter.txt": b"nor this",
    ".other.claim": b"{}",
    "out-1/chapter.txt": b"precious, too",
}
TEXT = "The cache is stored once, in two planes of four bits each, and nothing is stored twice. "
GPTQ = ("--draft", "gptq", "--draft-group", "32")
JOBS = {
    "plain": (),
    "convert": ("--draft", "rtn"),
    "overwrite": ("--draft", "rtn", "--overwrite"),
    "calibrate": GPTQ,
    "imported": ("--draft-from",),
    "cache": (),
}
ALWAYS = ("overwrite", "cache")  # go through where their output is there


def forked(work: Callable[[], int], log: Path | None = None) -> int:
    """The process that does it, silently where there is a log."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        if log is not None:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
        status = work()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Its exit status, −n after signal n."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_model(directory: Path) -> int:
    """A tiny Llama, with the tools of the tests, which nothing else here shall see."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import write_tiny_llama

    write_tiny_llama(directory, max_position_embeddings=64)
    write_tiny_llama(directory.with_name("long"), max_position_embeddings=2048)
    make_gptq(directory, directory.with_name("gptq"))
    return 0


def make_gptq(model: Path, out: Path) -> None:
    """A GPTQ checkpoint of the same model, of 4 bits in groups of 16."""
    sys.path.insert(0, str(Path(__file__).parent))
    import seeds
    from safetensors.numpy import load_file

    method = {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq"}
    values = json.loads((model / "config.json").read_text()) | {"quantization_config": method}
    out.mkdir()
    (out / "config.json").write_text(json.dumps(values))
    tensors = seeds.packed_tensors("gptq", load_file(model / "model.safetensors"))
    (out / "model.safetensors").write_bytes(seeds.safetensors(tensors))


def contents(directory: Path) -> dict[str, bytes]:
    """The files below it; the dates that Orbax notes are left out, and where it wrote. Of a file,
    what it holds."""
    if directory.is_file():
        return {"": directory.read_bytes()}
    found = {}
    for path in directory.rglob("*"):
        if path.is_file():
            data = b"" if path.name == "commit_success.txt" else path.read_bytes()
            if path.name == "_CHECKPOINT_METADATA":
                values = json.loads(data)
                dates = ("init_timestamp_nsecs", "commit_timestamp_nsecs")
                data = repr([(k, v) for k, v in values.items() if k not in dates]).encode()
            found[str(path.relative_to(directory))] = data
    return found


class Job:
    """One command, in a directory of its own beside what belongs to others."""

    def __init__(self, name: str, model: Path, work: Path):
        self.name, self.place, self.log = name, work / name, work / f"{name}.log"
        self.out = self.place / "out"
        text = work / f"{name}.txt"
        text.write_text(TEXT * 300)
        more = {"calibrate": ("--draft-text", str(text)), "imported": (str(work / "gptq"),)}
        self.command = ["convert", str(model), str(self.out), *JOBS[name], *more.get(name, ())]
        if name == "cache":
            self.command = ["generate", "--model", str(work / "long"), "--prompt", TEXT * 12]
            self.command += ["--cache", str(self.out), "--max-new-tokens", "4"]
        self.before = work / f"{name}-before"
        if name == "overwrite":
            self._make_before(["convert", str(model), str(self.out), "--dtype", "float16"])
        if name != "plain":
            self._start_anew()
            self._run()  # compiles, for the later ones
        self._start_anew()
        started = time.monotonic()
        self._run()
        self.seconds, self.expected = time.monotonic() - started, contents(self.out)

    def _make_before(self, command: list[str]) -> None:
        """What lies at `out` where it is to be overwritten."""
        status = ended(forked(lambda: cli.main(command), self.log))
        assert status == 0, self._said()
        self.out.rename(self.before)

    def _start_anew(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        for name, data in FOREIGN.items():
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            (self.place / name).write_bytes(data)
        if self.before.exists():
            shutil.copytree(self.before, self.out)

    def _said(self) -> str:
        return f"{self.name}: {self.log.read_text()[-2000:]}"

    def _run(self) -> None:
        """To the end. Where it was killed after its last step, the checkpoint is there, and the
        command says so."""
        whole = self.name not in ALWAYS and self.out.exists()
        whole = whole and contents(self.out) == self.expected
        status = ended(forked(lambda: cli.main(self.command), self.log))
        assert status == (2 if whole else 0), self._said()

    def kill(self, blows: list[tuple[signal.Signals, float]]) -> list[bool]:
        """Start anew, kill as often, and do it again; whether the signals came in time."""
        self._start_anew()
        early = [self._struck(number, moment) for number, moment in blows]
        self._run()
        self._check_left()
        assert contents(self.out) == self.expected, f"{self.name}: other bytes"
        return early

    def _struck(self, number: signal.Signals, moment: float) -> bool:
        """A run that is killed; one that finds the checkpoint whole says so before it is."""
        whole = self.name not in ALWAYS and self.out.exists()
        whole = whole and contents(self.out) == self.expected
        finished = {".out.calibration"} if self.name == "calibrate" else set()
        clean = self._strays() <= finished
        child = forked(lambda: cli.main(self.command), self.log)
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
        status = ended(child)
        allowed = (2 if whole else 0, -number, 128 + number)
        assert status in allowed, f"{self._said()} exit status {status}"
        if clean and status in HANDLED:
            self._check_left(*finished)
        if status == 0:  # later runs are faster than the first: so the next signals come earlier
            self.seconds *= 0.9
        return status not in (0, 2)

    def race(self, moment: float, number: signal.Signals | None) -> bool:
        """Two at once; with a signal, for the first. Whether the second was told who works."""
        self._start_anew()
        log = self.log.with_suffix(".second.log")
        log.unlink(missing_ok=True)
        first = forked(lambda: cli.main(self.command), self.log)
        time.sleep(moment)
        second = forked(lambda: cli.main(self.command), log)
        late = ended(second)
        if number is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, number)
        early, said = ended(first), log.read_text()
        told = late == 2 and "is writing" in said and (early == 0 or number is not None)
        # One wins; where the first had ended by then, the second finds its checkpoint.
        after = late == (0 if self.name in ALWAYS else 2) and early == 0
        won = late == 0 and (early == 2 or self.name == "cache")
        assert told or after or won, (
            f"{self._said()} exit status {early}, the second's {late}: {said}"
        )
        if self.name == "cache" or (late != 0 and early != 0):
            self._run()
        self._check_left()
        assert contents(self.out) == self.expected, f"{self.name}: other bytes after two"
        return told

    def _check_left(self, *allowed: str) -> None:
        """Others' things, untouched, `out` and what is allowed."""
        for name, data in FOREIGN.items():
            assert (self.place / name).read_bytes() == data, f"{self.name}: {name} was touched"
        strays = self._strays() - set(allowed)
        assert not strays, f"{self.name}: left {sorted(strays)}"

    def _strays(self) -> set[str]:
        """What lies there beside `out` and is not others'."""
        known = {Path(name).parts[0] for name in FOREIGN} | {"out"}
        return {path.name for path in self.place.iterdir()} - known


def killed(job: Job, rng: random.Random, kills: int, seconds: float) -> dict[str, Any]:
    """Kills and pairs, at random moments; the kills end after some seconds."""
    early, started, done, twice = [0] * len(SIGNALS), time.monotonic(), 0, 0
    while done < kills and time.monotonic() - started <= seconds:
        numbers = [done % 3] if done % 4 else [done % 3, rng.randrange(3)]
        blows = [(SIGNALS[n], rng.uniform(0, 1.05 * job.seconds)) for n in numbers]
        for n, in_time in zip(numbers, job.kill(blows), strict=True):
            early[n] += in_time
        done += len(blows)
        twice += len(blows) == 2
        print(f"{job.name}: {done} of {kills} kills", file=sys.stderr, flush=True)
    kills = done
    races = max(2, kills // 10)
    told = sum(
        job.race(rng.uniform(0, job.seconds), SIGNALS[k // 2 % 3] if k % 2 else None)
        for k in range(races)
    )
    print(
        f"{job.name}: {kills} kills, {sum(early)} in time; {races} pairs, {told} at work at "
        f"once; {job.seconds:.1f} s a run",
        flush=True,
    )
    in_time = {f"{number.name}_in_time": n for number, n in zip(SIGNALS, early, strict=True)}
    pairs = {"pairs": races, "pairs_at_once": told, "seconds_a_run": round(job.seconds, 1)}
    return {"job": job.name, "kills": kills, "two_in_a_row": twice, **in_time, **pairs}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=30, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--job", nargs="+", choices=JOBS, default=list(JOBS)[1:])
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="stop there")
    parser.add_argument("--together", action="store_true", help="all jobs at once, a core each")
    parser.add_argument("--output", type=Path, help="a JSON record")
    return parser


def main() -> int:
    """The command line."""
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        work = Path(name)
        jax.config.update("jax_compilation_cache_dir", str(work / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        assert ended(forked(lambda: make_model(work / "model"), work / "model.log")) == 0
        if not args.together:
            return max(done(args, work, [i]) for i in range(len(args.job)))
        return done(args, work, range(len(args.job)))


def done(args: argparse.Namespace, work: Path, numbers: Sequence[int]) -> int:
    """These jobs side by side, each in a fork that leaves a row; the record, so far."""
    children = [forked(lambda i=i: one(args, work, i)) for i in numbers]
    status = max(ended(child) != 0 for child in children)
    rows = [json.loads(file.read_text()) for file in sorted(work.glob("row-*.json"))]
    if args.output:
        assert ended(forked(lambda: recorded(args, rows), work / "record.log")) == 0
    return int(status)


def one(args: argparse.Namespace, work: Path, i: int) -> int:
    """The i-th job."""
    name, kills = args.job[i], len(range(i, args.kills, len(args.job)))
    seconds = args.seconds if args.together else args.seconds / len(args.job)
    rng = random.Random(f"{args.seed} {name}")
    row = killed(Job(name, work / "model", work), rng, kills, seconds)
    (work / f"row-{i}.json").write_text(json.dumps(row))
    return 0


def recorded(args: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    """Write the record, in a fork: it asks JAX for the device, and JAX is nothing to fork after."""
    record.write(args.output, record.command("python tests/fuzz/kills.py", args), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
