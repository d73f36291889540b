"""Saved caches: going on from one, writers that are killed, bits that flip.

    python benchmarks/saved_caches.py --model M --text T.txt --output benchmarks/NAME.json

goes-on   a turn after a context, saved, loaded, and a second turn: its tokens and its tiles against
          those of a session that never stopped, in both modes; seconds to save, to load and to read
          the context, and what is new: where the rest lies still, and where it was loaded; and the
          file's bytes
formats   the file in each format that the model has: bytes, seconds to save and to load, with
          compilation and without; and of the text that follows, read over what was loaded:
          perplexity; the likeliest tokens, the divergence and the text against those of the
          session that never stopped; and what a draft, read over the same cache, has in common with
          its target
kills     kill -9 in the middle of a save, again and again: what lies there is what was there before
flips     a bit of the file, anywhere, again and again: each is noticed
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script

import quantspec_jax as qs
from quantspec_jax.bench import record
from quantspec_jax.cache import flush, rollback
from quantspec_jax.cache.codecs.codec import values_per_token
from quantspec_jax.cache.schedule import room
from quantspec_jax.engine import saved
from quantspec_jax.generate.cache_pass import cache_pass

Note = Callable[[dict[str, Any]], None]  # writes a row that is not finished

MODES: dict[str, dict[str, Any]] = {
    "quantspec": {"gamma": 4, "coupling": "invariant", "temperature": 0.8},
    "autoregressive": {"mode": "autoregressive", "kv": "full"},
}
SAVING = """
import sys
import quantspec_jax as qs
sys.path.insert(0, sys.argv[1])
import saved_caches
model, base, path, context = qs.load(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
config = saved_caches.config_of(saved_caches.MODES["quantspec"], context)
session = qs.Session.load(base, model, config)
session.save(path)
print("ready", flush=True)
while True:
    session.save(path)
"""


def config_of(mode: dict[str, Any], context: int, new: int = 32) -> qs.GenerateConfig:
    return qs.GenerateConfig(
        max_length=context + 8 * new, max_new_tokens=new, ignore_eos=True, **mode
    )


def bits(session: qs.Session) -> dict[bytes, list[bytes]]:
    """What is kept."""
    return {
        name: [np.asarray(x).tobytes() for x in tile.values()]
        for name, tile in session.prefixes._kept.items()
    }


def passed(what: str, since: float) -> float:
    """Say how long it took; the time now."""
    now = time.perf_counter()
    print(f"{what}: {now - since:.2f} s", file=sys.stderr, flush=True)
    return now


def goes_on(model: qs.Model, args: argparse.Namespace, mode: dict[str, Any]) -> dict[str, Any]:
    """With a file between two turns, and without."""
    ids = script.tokens(model, args.text, args.context)
    config = config_of(mode, args.context, args.new_tokens)
    now = time.perf_counter()
    warm = qs.Session(model, config).generate(ids[:300])  # compiles
    now = passed("programs and a short prompt", now)
    session = qs.Session(model, config)
    first = session.generate(ids, jax.random.key(0))
    passed("the first turn", now)
    question = [*ids, *first.tokens, *model.tokenizer("\nAnd then?\n")["input_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        began = time.perf_counter()
        session.save(path)
        written = passed("saved", began)
        again = qs.Session.load(path, model, config)
        loaded = passed("loaded", written)
        size = path.stat().st_size
    kept, found = bits(session), bits(again)
    same_file = all(kept[name] == tile for name, tile in found.items())
    started = time.perf_counter()
    second = again.generate(question, jax.random.key(1))
    resumed = time.perf_counter() - started
    never = session.generate(question, jax.random.key(1))
    fresh = qs.Session(model, config)
    other = fresh.generate(question, jax.random.key(1))
    planes = {name: bits(each) for name, each in (("a", again), ("b", session), ("c", fresh))}
    return {
        "what": "goes on",
        "mode": mode.get("mode", "quantspec"),
        "context": args.context,
        "same_tokens_as_never_stopped": second.tokens == never.tokens,
        "same_tokens_as_a_fresh_run": second.tokens == other.tokens,
        "same_bits": same_file and planes["a"] == planes["b"] == planes["c"],
        "compile_seconds": warm.stats["compile_seconds"],
        "tiles": len(found),
        "cached_tokens": second.stats["cached_tokens"],
        "prompt_tokens": second.stats["prompt_tokens"],
        "save_seconds": written - began,
        "load_seconds": loaded - written,
        "bytes": size,
        "first_turn_prefill_seconds": first.stats["prefill_seconds"],
        "second_turn_prefill_seconds": second.stats["prefill_seconds"],
        "never_stopped_prefill_seconds": never.stats["prefill_seconds"],
        "second_turn_seconds": resumed,
        "fresh_prefill_seconds": other.stats["prefill_seconds"],
    }


def formats(model: qs.Model, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a format. Greedy, so that texts can be compared."""
    n, length = args.context, args.context + args.following + args.new_tokens + 256
    config = qs.GenerateConfig(
        gamma=4, max_new_tokens=args.new_tokens, max_length=length, ignore_eos=True
    )
    every = script.tokens(model, args.text, n + args.following + 1)
    ids, following = every[:n], every[n:]
    session, now = qs.Session(model, config), time.perf_counter()
    never = session.generate(ids)
    wanted = log_probabilities(session, ids, following)[0]
    passed("the session that never stopped", now)
    for name in ("planes", "aqua") if model.kv else ("planes",):
        seconds: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.safetensors"
            for when in ("first_", ""):  # programs are made, and are there
                session._coder = None  # nothing is coded yet
                began = time.perf_counter()
                session.save(path, format=name)
                written = passed("saved", began)
                again = qs.Session.load(path, model, config)
                loaded = passed("loaded", written)
                seconds[f"{when}save_seconds"] = written - began
                seconds[f"{when}load_seconds"] = loaded - written
            size = path.stat().st_size
        tiles = len(again.prefixes)
        values = tiles * config.group_size * values_per_token(model.config)
        turn = again.generate(ids)
        found, drafted = log_probabilities(again, ids, following)
        right = found[np.arange(len(found)), following[1:]]
        yield {
            "what": "formats",
            "format": model.kv.stored.name if model.kv and name == "aqua" else name,
            "context": n,
            "tiles": tiles,
            "bytes": size,
            "bits_a_value": 8 * size / values,
            **seconds,
            "prefill_seconds": never.stats["prefill_seconds"],
            "cached_tokens": turn.stats["cached_tokens"],
            "following": len(found),
            "perplexity": float(np.exp(-right.mean(dtype=np.float64))),
            "same_top_token": float((found.argmax(-1) == wanted.argmax(-1)).mean()),
            "divergence": float((np.exp(wanted) * (wanted - found)).sum(-1).mean()),
            "draft_overlap": float(np.exp(np.minimum(found, drafted)).sum(-1).mean()),
            "draft_same_top_token": float((found.argmax(-1) == drafted.argmax(-1)).mean()),
            "new_tokens": len(never.tokens),
            "same_tokens": same_tokens(turn.tokens, never.tokens),
        }


def same_tokens(ours: list[int], theirs: list[int]) -> int:
    """How many are the same, from the beginning."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(ours))


@partial(jax.jit, static_argnames="program", donate_argnames="cache")
def both_passes(params, drafts, cache, tokens, count, *, program):
    """Log-probabilities [2, S, V] of target and draft after given tokens [1, S], over the same
    cache, in which `count` of them stay."""
    call = (program, cache, tokens, cache.length)
    drafted, _ = cache_pass(drafts, *call, program.draft_read)
    logits, new = cache_pass(params, *call, program.read)
    found = jax.nn.log_softmax(jnp.concatenate([logits, drafted]))
    return found, flush(rollback(new, cache.length + count), program.backend)


def log_probabilities(session: qs.Session, ids: list[int], following: list[int]) -> np.ndarray:
    """[2, N, V] after each of `following`'s tokens but the last, fed to target and draft over the
    session's cache of `ids`."""
    engine, model = session._engine, session.model
    (slot,) = engine.add([ids], dataclasses.replace(session.config, max_new_tokens=1))
    while engine.running:
        engine.step()
    engine.remove(slot)
    assert engine._state is not None
    cache, found = jax.tree.map(jnp.copy, engine._state.cache), []
    program, at = engine.program, 0
    rows = program.cache.pass_width
    while at < len(following) - 1:
        free = room(int(cache.length[0]), program.cache.group_size) + 1
        count = min(rows, free, len(following) - 1 - at)
        fed = np.zeros((1, rows), np.int32)
        fed[0, :count] = following[at : at + count]
        call = (model.params, model.draft_params, cache, jnp.asarray(fed), jnp.int32(count))
        both, cache = both_passes(*call, program=program)
        found.append(np.asarray(both)[:, :count])
        at += count
    return np.concatenate(found, 1)


def saved_file(model: qs.Model, args: argparse.Namespace, path: Path) -> qs.Session:
    config = config_of(MODES["quantspec"], args.context, args.new_tokens)
    session = qs.Session(model, config)
    session.generate(script.tokens(model, args.text, args.context))
    session.save(path)
    return session


def kills(model: qs.Model, args: argparse.Namespace, note: Note) -> dict[str, Any]:
    """Until so many writers were killed in the middle: a moment after a file was begun."""
    rng, whole, midway, tries = random.Random(0), 0, 0, 0

    def so_far() -> dict[str, Any]:
        return {
            "what": "kill -9 of writers",
            "context": args.context,
            "kills": tries,
            "in_the_middle_of_a_save": midway,
            "files_that_loaded_as_they_were": whole,
            "seconds": time.perf_counter() - started,
        }

    with tempfile.TemporaryDirectory() as folder:
        base, path = Path(folder) / "base.safetensors", Path(folder) / "a.safetensors"
        wanted = bits(saved_file(model, args, base))
        config = config_of(MODES["quantspec"], args.context, args.new_tokens)
        command = [sys.executable, "-c", SAVING, str(Path(__file__).parent), str(args.model)]
        command += [str(base), str(path), str(args.context)]
        started = time.perf_counter()
        while midway < args.kills and tries < 3 * args.kills:
            tries += 1
            child = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            while not any("partial" in name for name in os.listdir(folder)):
                pass  # a file is whole after some milliseconds
            time.sleep(rng.uniform(0, args.within))
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
            partial = list(Path(folder).glob(".*partial*"))
            midway += bool(partial)
            found = bits(qs.Session.load(path, model, config))
            whole += found == {name: wanted[name] for name in found} and len(found) > 0
            for each in partial:
                each.unlink()
            path.unlink()
            note(script.show(so_far()))
    return so_far()


def flips(model: qs.Model, args: argparse.Namespace) -> dict[str, Any]:
    """One bit at a time; half of them in the header."""
    rng, noticed = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        session = saved_file(model, args, path)
        cache = session._engine.program.cache
        size = path.stat().st_size
        with path.open("r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            for i in range(args.flips):
                place = rng.randrange(header) if i % 2 else rng.randrange(header, size)
                file.seek(place)
                before = file.read(1)
                for content in (bytes([before[0] ^ 1 << rng.randrange(8)]), before):
                    file.seek(place)
                    file.write(content)
                    file.flush()
                    if content != before:
                        try:
                            saved.load(path, model, cache)
                        except ValueError:
                            noticed += 1
        saved.load(path, model, cache)  # all are back
    return {"what": "flipped bits", "flips": args.flips, "noticed": noticed, "bytes": size}


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser)
    parser.add_argument("--what", nargs="+", default=["goes-on", "kills", "flips"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--following", type=int, default=512, help="tokens of the text (formats)")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--within", type=float, default=0.001, help="seconds")
    parser.add_argument("--flips", type=int, default=100)
    return parser


def main() -> None:
    """Run and record, what is done so far after each step."""
    args = make_parser().parse_args()
    model = qs.load(args.model)
    about = {"model": record.model_name(args.model), "dtype": model.dtype.name}
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        cores = len(os.sched_getaffinity(0))
        script.write(__file__, args, [*rows, row], **about, cores=cores)

    steps: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "goes-on": lambda: (goes_on(model, args, MODES[mode]) for mode in args.modes),
        "formats": lambda: formats(model, args),
        "kills": lambda: [kills(model, args, note)],
        "flips": lambda: [flips(model, args)],
    }
    for name in args.what:
        for row in steps[name]():
            note(script.show(row))
            rows.append(row)


if __name__ == "__main__":
    main()
