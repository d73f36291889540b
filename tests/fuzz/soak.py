"""One process for a long time: what it holds stays what it was after the first minutes.

    python tests/fuzz/soak.py --shapes 300 --calls 2000
    python tests/fuzz/soak.py --tokens 1000000 --model DIR --text FILE ...

Shapes: a tiny model on the CPU decodes with one program after another (γ, batch, lengths,
couplings), then with some of them again and again. Memory and its maps, of which Linux allows a
process 65,530, are bounded by the programs that are kept; further calls leave nothing.

Tokens: a model decodes prompts of changing texts, lengths and batches. The device's memory is what
it was, and the first prompts, asked again at the end, give the same tokens.

Prints what it saw, and records it as it goes; exit status 1 where it grew.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import quantspec_jax as qs
from quantspec_jax import memory
from quantspec_jax.bench import record
from quantspec_jax.engine.programs import MOST_PROGRAMS, PROGRAMS
from quantspec_jax.files import check_output
from quantspec_jax.generate.couplings import COUPLINGS
from quantspec_jax.models.module import init_params

MOST_MAPS = 65_530  # vm.max_map_count
PAGE = resource.getpagesize()
TINY = qs.ModelConfig("llama", 97, 32, 64, 1, 2, 1, 16, 4096)


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def maps() -> int:
    with open("/proc/self/maps") as lines:
        return sum(1 for _ in lines)


def device_bytes() -> int:
    gc.collect()
    return (memory.device().memory_stats() or {}).get("bytes_in_use", 0)


# Shapes, then calls.


def shapes() -> Iterator[tuple[int, int, str, int]]:
    """(γ, batch, coupling, tokens of the cache), each one another program, in an order that does
    not lead from one to its neighbour."""
    lengths = (256, 384, 512, 768, 1024)
    found = list(itertools.product(range(1, 9), (1, 2, 3, 4), COUPLINGS, lengths))
    random.Random(0).shuffle(found)
    return iter(found)


def call(model: qs.Model, shape: tuple[int, int, str, int], seed: int) -> None:
    gamma, batch, coupling, length = shape
    config = qs.GenerateConfig(
        max_new_tokens=8,
        gamma=gamma,
        coupling=coupling,
        max_length=length,
        group_size=64,
        temperature=0.8,
    )
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 97, rng.integers(1, 100)).tolist() for _ in range(batch)]
    out = qs.generate(model, rows, config, jax.random.key(seed))
    assert all(1 <= len(tokens) <= 8 for tokens in out.tokens)


def soak_shapes(model: qs.Model, count: int, deadline: float) -> Iterator[dict[str, Any]]:
    """Each shape once: up to four programs each, so the kept ones are soon full. Yields what was
    seen so far."""
    seen: list[tuple[int, int]] = []
    for i, shape in enumerate(itertools.islice(shapes(), count)):
        if time.monotonic() > deadline:
            break
        call(model, shape, i)
        assert len(PROGRAMS) <= MOST_PROGRAMS
        seen.append((resident_bytes(), maps()))
        if (i + 1) % 20 == 0:
            print(f"{i + 1} shapes: {seen[-1][0]:,} bytes, {seen[-1][1]:,} maps", flush=True)
            yield _of_shapes(seen)
    yield _of_shapes(seen)


def _of_shapes(seen: list[tuple[int, int]]) -> dict[str, Any]:
    row = {"kind": "shapes", "shapes": len(seen), "programs_made": PROGRAMS.made}
    row |= _compared("resident_bytes", [a for a, _ in seen], 1.1)
    row |= _compared("maps", [b for _, b in seen], 1.1)
    row["flat"] = row["resident_bytes_flat"] and row["maps_flat"]
    row["flat"] = row["flat"] and row["maps_most"] < MOST_MAPS // 2
    return row


def _compared(name: str, values: list[int], most: float) -> dict[str, Any]:
    """The second half's largest value against the first half's."""
    first, second = max(values[: len(values) // 2]), max(values[len(values) // 2 :])
    return {
        f"{name}_most": max(first, second),
        f"{name}_growth": round(second / first, 4),
        f"{name}_flat": second <= most * first,
    }


def soak_calls(model: qs.Model, count: int, deadline: float) -> Iterator[dict[str, Any]]:
    """Seven of the shapes again and again; the first tenth is to warm up."""
    chosen = list(itertools.islice(shapes(), 7))
    values: list[int] = []
    for i in range(count):
        if time.monotonic() > deadline:
            break
        call(model, chosen[i % 7], i)
        if i % 10 == 9:
            values.append(resident_bytes())
        if i % 100 == 99:
            print(f"{i + 1} calls: {values[-1]:,} bytes", flush=True)
            yield _of_calls(values)
    yield _of_calls(values)


def _of_calls(values: list[int]) -> dict[str, Any]:
    warm = values[len(values) // 10 :]
    growth = max(warm) / warm[0]
    row = {"kind": "calls", "calls": 10 * len(values), "resident_bytes": warm[0]}
    return row | {"resident_bytes_growth": round(growth, 4), "flat": growth <= 1.01}


# Tokens.


class Prompts:
    """Pieces of texts, in batches of two forms. What the n-th batch is depends on n alone."""

    def __init__(self, tokenizer: Any, files: list[Path], rows: int, new_tokens: int):
        self._rows, self._new = rows, new_tokens
        texts = [file.read_text(encoding="utf-8")[:400_000] for file in files]
        self._ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]

    def batch(self, number: int) -> tuple[list[list[int]], qs.GenerateConfig]:
        rng = random.Random(number)
        greedy = number % 4 == 0
        rows = []
        for row in range(16 if greedy else self._rows):
            # One is long enough that all batches of a size take one program.
            ids, length = rng.choice(self._ids), rng.randint(200 if row else 1600, 2000)
            start = rng.randrange(max(1, len(ids) - length))
            rows.append(ids[start : start + length])
        temperature = 0.0 if greedy else 0.8
        more = {"ignore_eos": True, "max_length": 3072}
        config = qs.GenerateConfig(self._new, 4, temperature=temperature, **more)
        return rows, config


def soak_tokens(
    model: qs.Model, prompts: Prompts, count: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """`count` tokens and more; the first four batches once again at the end."""

    def run(number: int) -> list[list[int]]:
        rows, config = prompts.batch(number)
        return qs.generate(model, rows, config, jax.random.key(number)).tokens

    started, warm = time.monotonic(), 4
    first = [run(i) for i in range(warm)]  # makes all programs
    devices, hosts = [device_bytes()], [resident_bytes()]
    new, number = sum(len(tokens) for rows in first for tokens in rows), warm

    def so_far() -> dict[str, Any]:
        return {
            "kind": "tokens",
            "tokens": new,
            "batches": number,
            "seconds": round(time.monotonic() - started, 1),
            "device_bytes": devices[0],
            "device_bytes_growth": max(devices) - devices[0],
            "host_bytes_growth": round(max(hosts) / hosts[0], 4),
            "peak_bytes": (memory.device().memory_stats() or {}).get("peak_bytes_in_use"),
            "flat": max(devices) - devices[0] <= 1 << 20 and max(hosts) <= 1.05 * hosts[0],
        }

    while new < count and time.monotonic() - started < seconds:
        new += sum(map(len, run(number)))
        number += 1
        devices.append(device_bytes())
        hosts.append(resident_bytes())
        print(
            f"{time.monotonic() - started:.0f} s, {new:,} tokens: device {devices[-1]:,}, host "
            f"{hosts[-1]:,} bytes",
            flush=True,
        )
        yield so_far()
    row = so_far()
    repeated = [run(i) == rows for i, rows in enumerate(first)]
    flat = row["flat"] and all(repeated)
    yield row | {"first_batches_repeated": sum(repeated), "flat": flat}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=int, default=300, metavar="N")
    parser.add_argument("--calls", type=int, default=2000, metavar="N")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, metavar="S", help="stop there, and say how far"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="of --model, in place of shapes")
    parser.add_argument("--rows", type=int, default=64, metavar="B", help="of the larger batches")
    parser.add_argument("--new-tokens", type=int, default=512, metavar="N", help="of a prompt")
    parser.add_argument("--model", help="as in `quantspec generate`")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files")
    parser.add_argument("--output", help="a JSON record")
    return parser


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What was seen, again and again as there is more; the last one of a kind is all."""
    if args.tokens:
        model = qs.load(args.model)
        prompts = Prompts(model.tokenizer, args.text, args.rows, args.new_tokens)
        yield from soak_tokens(model, prompts, args.tokens, args.seconds)
        return
    model = qs.Model(TINY, init_params(TINY, jax.random.key(0)), None, qs.DraftConfig(None, 32))
    started = time.monotonic()
    if args.shapes:
        yield from soak_shapes(model, args.shapes, started + args.seconds)
    if args.calls:
        yield from soak_calls(model, args.calls, started + args.seconds)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    check_output(args.output)
    found: dict[str, dict[str, Any]] = {}
    for row in rows(args):
        found[row["kind"]] = row
        if args.output:
            command = record.command("python tests/fuzz/soak.py", args)
            record.write(Path(args.output), command, list(found.values()))
    for row in found.values():
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return 0 if all(row["flat"] for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
