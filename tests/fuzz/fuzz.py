"""Damaged checkpoints of every format are loaded; `make fuzz` runs it, and so do the tests.

    python tests/fuzz/fuzz.py --cases 100000 --seed 0 --processes 8 --output record.json

A case may load and compute finite logits, or be refused in one line that names the file, by an
error that the command line turns into exit status 2. All else fails: another exception, a crash,
something on standard error, over 5 seconds, over 1 GiB of memory. Exit status 1 where one failed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUTCOMES = ("loaded", "refused", "failed")
MOST_WALL_SECONDS = 60.0  # a case that waits uses no processor; on a busy machine all take long
STARTING_SECONDS = 900.0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="*", help="of " + ", ".join(_formats()))
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="side by side")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, metavar="S", help="stop there, and say how far"
    )
    parser.add_argument("--output", type=Path, help="a JSON record")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    places = (args.cases, args.seed, args.first, args.formats, args.seconds)
    found = side_by_side(args.processes, *places)
    show(found)
    if args.output:
        _write(args, found)
    return 1 if found["failed"] else 0


def _write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """A row for all formats, then one each."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(HERE.parents[1]))
    from quantspec_jax.bench import record

    most = ("slowest_seconds", "largest_bytes", "wall_seconds")
    counts = {
        "all": {name: found[name] for name in ("cases", *OUTCOMES, *most)},
        **found["formats"],
    }
    rows = [{"format": name, **dict.fromkeys(OUTCOMES, 0), **row} for name, row in counts.items()]
    command = record.command("python tests/fuzz/fuzz.py", args)
    record.write(args.output, command, rows, failures=found["failures"])


_Raw = argparse.RawDescriptionHelpFormatter


def _formats() -> list[str]:
    sys.path.insert(0, str(HERE))
    import seeds

    return [*seeds.SEEDS, seeds.CONVERTED]


def side_by_side(
    processes: int,
    cases: int,
    seed: int,
    first: int = 0,
    formats: list[str] | None = None,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """`run`, with the cases divided among some children."""
    ends = [first + cases * i // processes for i in range(processes + 1)]
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        parts = pool.map(
            lambda begin, end: run(end - begin, seed, begin, formats, seconds), ends[:-1], ends[1:]
        )
        return _together(list(parts))


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(part[key] for part in parts) for key in ("cases", *OUTCOMES)}
    most = ("slowest_seconds", "largest_bytes", "wall_seconds")
    formats: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, counts in (pair for part in parts for pair in part["formats"].items()):
        formats[name].update(counts)
    return {
        **sums,
        **{key: max(part[key] for part in parts) for key in most},
        "formats": {name: dict(counts) for name, counts in sorted(formats.items())},
        "failures": [failure for part in parts for failure in part["failures"]],
    }


def run(
    cases: int,
    seed: int,
    first: int = 0,
    formats: list[str] | None = None,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Counts by format and outcome, and all that failed with its number."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures, start, number, slowest, largest = [], time.monotonic(), first, 0.0, 0
    with tempfile.TemporaryDirectory(prefix="quantspec-fuzz-") as folder:
        while number < first + cases and time.monotonic() - start < seconds:
            for name, found in _child(Path(folder), seed, number, first + cases, formats):
                counts[name][found["outcome"]] += 1
                slowest = max(slowest, found.get("seconds", 0.0))
                largest = max(largest, found.get("bytes", 0))
                if found["outcome"] == "failed":
                    failures.append({"case": number, "format": name, **found})
                    print(json.dumps(failures[-1]), file=sys.stderr, flush=True)
                number += 1
                if (number - first) % 1000 == 0:
                    done = f"{number - first} of {cases} cases from {first} on"
                    print(f"{done}, {len(failures)} failed", file=sys.stderr, flush=True)
                if time.monotonic() - start > seconds:
                    break
    total = sum(counts.values(), collections.Counter())
    return {
        "cases": number - first,
        **{outcome: total[outcome] for outcome in OUTCOMES},
        "slowest_seconds": round(slowest, 2),
        "largest_bytes": largest,
        "wall_seconds": round(time.monotonic() - start),
        "formats": {name: dict(found) for name, found in sorted(counts.items())},
        "failures": failures,
    }


def _child(folder: Path, seed: int, first: int, last: int, formats: list[str] | None) -> Any:
    """(format, result) of case after case, until the child has ended or been ended."""
    command = [sys.executable, "-W", "ignore", str(HERE / "child.py"), "--folder", str(folder)]
    command += ["--seed", str(seed), "--first", str(first), "--last", str(last)]
    command += ["--formats", *formats] if formats else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment(folder)) as child:
        assert child.stdout is not None
        lines = _Lines(child.stdout.fileno())
        try:
            if "ready" not in (lines.next(STARTING_SECONDS) or {}):
                raise RuntimeError(f"the fuzzer's child did not start: {_said(folder)}")
            for _ in range(first, last):
                begun = lines.next(MOST_WALL_SECONDS)
                if begun is None:  # between two cases: nothing is known to be at fault
                    raise RuntimeError("the fuzzer's child ended between two cases")
                found = lines.next(MOST_WALL_SECONDS)
                if found is None:
                    why = _end_of(child) if lines.ended else "took too long"
                    yield begun["format"], {"outcome": "failed", "why": f"{why}: {_said(folder)}"}
                    return
                yield begun["format"], found
        finally:
            child.kill()


def _end_of(child: subprocess.Popen[bytes]) -> str:
    status = child.wait()
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"ended the process ({how})"


def _said(folder: Path) -> str:
    """The end of what the child wrote to standard error."""
    said = folder / "stderr"
    return said.read_text(errors="replace")[-1000:] if said.exists() else ""


class _Lines:
    """Objects of JSON from a pipe, one a line."""

    def __init__(self, descriptor: int):
        self._descriptor, self._rest, self.ended = descriptor, b"", False

    def next(self, seconds: float) -> dict[str, Any] | None:
        """None: nothing came in time, or the pipe has ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._descriptor], [], [], left)[0]:
                return None
            data = os.read(self._descriptor, 1 << 16)
            if not data:
                self.ended = True
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


def _environment(folder: Path) -> dict[str, str]:
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",  # a child that is aborted says where
    }


def show(record: dict[str, Any]) -> None:
    for name, found in record["formats"].items():
        print(f"{name:20}", "  ".join(f"{k} {v:6}" for k, v in sorted(found.items())))
    keys = ("cases", "loaded", "refused", "failed", "slowest_seconds", "largest_bytes")
    print("  ".join(f"{key} {record[key]}" for key in (*keys, "wall_seconds")))


if __name__ == "__main__":
    sys.exit(main())
