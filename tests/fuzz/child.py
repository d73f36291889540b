"""Runs cases one after another, a line of JSON before and after each: the fuzzer's child.

A case is a whole checkpoint with one or two of its files damaged; seed and number say which. It is
loaded as a user would, its tokenizer tried, and the logits of the model, and of its draft where the
file brings one, computed. `fuzz.py` ends the process where a case takes too long.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import mutations
import seeds

MOST_SECONDS = 5.0
MOST_BYTES = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--seed", "--first", "--last"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--formats", nargs="*", default=None)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    said = _keep_standard_error(args.folder)
    runner = Runner(args.folder, said)
    names = [n for n in runner.sources if not args.formats or n in args.formats]
    for name in names:  # whole, they load
        _check_whole(runner, name)
    _limit_memory()
    answers.write(json.dumps({"ready": names}) + "\n")
    for number in range(args.first, args.last):
        name = names[number % len(names)]
        answers.write(json.dumps({"case": number, "format": name}) + "\n")
        answers.write(json.dumps(runner.case(name, args.seed, number)) + "\n")


def _keep_standard_error(folder: Path) -> Path:
    """Whatever writes to the process's own streams, native code too, is seen."""
    path = folder / "stderr"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    warnings.simplefilter("ignore")  # a notice is no failure
    return path


def _limit_memory() -> None:
    """Four times what is allowed: a case beyond that ends in MemoryError, not the machine."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = now + 4 * MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _check_whole(runner: Runner, name: str) -> None:
    found = runner.run(name, chat=True)
    if found["outcome"] != "loaded":
        raise RuntimeError(f"{name}, undamaged: {found}")


class Runner:
    """Whole checkpoints in a folder, and what becomes of one that is damaged."""

    def __init__(self, folder: Path, said: Path):
        self.folder, self.said = folder, said
        self.parts = {name: make() for name, make in seeds.SEEDS.items()}
        self.sources: dict[str, Path] = {}
        for name, files in self.parts.items():
            directory = folder / name.replace(" ", "-").replace(",", "")
            shutil.rmtree(directory, ignore_errors=True)
            self.sources[name] = seeds.write(files, directory)
        self.target = self.sources["hf llama"]
        self.sources[seeds.CONVERTED] = self._converted()
        self.kept: dict[Path, bytes] = {}  # of the case: what its damaged files held
        self.files = {name: _files(source) for name, source in self.sources.items()}
        # A copy for drafts, which stays whole while the others are damaged.
        self.target = seeds.write(
            seeds.hugging_face("llama", rope_scaling=seeds.LLAMA3), _fresh(folder / "target")
        )

    def _converted(self) -> Path:
        import convert
        from quantspec_jax.weights.formats import DraftConfig

        out = _fresh(self.folder / "converted")
        return convert.convert(self.target, out, draft=DraftConfig(group_size=16), progress=False)

    def case(self, name: str, seed: int, number: int) -> dict[str, Any]:
        rng = random.Random(f"{seed}/{number}")
        kept = self.kept = {}
        done = []
        for _ in range(rng.choice((1, 1, 1, 2))):
            path = self._choose(name, rng)
            if path in kept or path.is_symlink() or not path.is_file():
                continue
            kept[path] = path.read_bytes()
            done.append(f"{path.relative_to(self.folder)}: {self._damage(name, path, rng)}")
        start = time.process_time()
        _forget_peak()
        before = _peak()
        found = self.run(name, chat=number % 5 == 0)
        found |= {"seconds": time.process_time() - start, "bytes": _peak() - before}
        if found["seconds"] > MOST_SECONDS or found["bytes"] > MOST_BYTES:
            found["outcome"] = "failed"
            found["why"] = found.get("why") or "too long or too large"
        for path, content in kept.items():
            _remove(path)
            path.write_bytes(content)
        return found | {"damage": done}

    def _choose(self, name: str, rng: random.Random) -> Path:
        """Small texts more often than weights."""
        files = self.files[name]
        texts = [p for p in files if p.suffix == ".json" and p.parent == self.sources[name]]
        return rng.choice(texts if texts and rng.random() < 0.6 else files)

    def _damage(self, name: str, path: Path, rng: random.Random) -> str:
        what, content = rng.random(), path.read_bytes()
        parts = self.parts.get(name)
        if what < 0.06:
            return mutations.change_entry(path, rng)
        if path.suffix == ".json" and what < 0.85:
            path.write_bytes(mutations.change_json(content, rng))
            return "values"
        if path.suffix == ".safetensors" and what < 0.5:
            path.write_bytes(mutations.change_safetensors(content, rng))
            return "header"
        if isinstance(parts, seeds.Gguf) and what < 0.7:
            path.write_bytes(mutations.change_gguf(parts, rng))
            return "parts"
        if name == seeds.CONVERTED and "c" in path.parts and self._lost_checksums():
            path.write_bytes(content[: rng.randrange(len(content) or 1)])
            return "cut off"  # without checksums bits may flip unseen
        path.write_bytes(mutations.change_bytes(content, rng))
        return "bytes"

    def _lost_checksums(self) -> bool:
        return self.sources[seeds.CONVERTED] / "config.json" in self.kept

    def run(self, name: str, chat: bool) -> dict[str, Any]:
        """{"outcome": "loaded", "refused" or "failed", "why": in the last two cases}."""
        from quantspec_jax.commands import terminal

        os.truncate(self.said, 0)
        try:
            why = self._load(name, chat)
        except Exception as error:
            line = terminal.describe(error)
            clean = terminal.status_of(error) == 2 and str(self.folder) in line
            clean = clean or (isinstance(error, ValueError) and "chat" in line)
            clean = clean and not isinstance(error, UnicodeError)
            found = {"outcome": "refused" if clean else "failed", "why": line}
            if not clean:
                found["error"] = type(error).__name__
                found["place"] = _place(error)
        except BaseException as error:
            found = {"outcome": "failed", "why": f"{type(error).__name__}: {error}"}
        else:
            found = {"outcome": "failed", "why": why} if why else {"outcome": "loaded"}
        if heard := _without_notices(self.said.read_text(errors="replace")):
            found |= {"outcome": "failed", "on_standard_error": heard[:1000]}
        return found

    def _load(self, name: str, chat: bool) -> str | None:
        """Why what loaded is not good, if it is not."""
        import jax
        import numpy as np

        import quantspec_jax as qs
        from quantspec_jax.loading import full_logits
        from quantspec_jax.text.chat import chat_text
        from quantspec_jax.text.prompts import encode

        source = self.sources[name]
        is_draft = name in ("gptq", "awq")
        whole = qs.DraftConfig(bits=None) if name != seeds.CONVERTED else None
        model = qs.load(
            str(self.target if is_draft else source), "float32", source if is_draft else whole
        )
        if model.tokenizer is not None and not is_draft:
            encode(seeds.TEXT, model.tokenizer)
            encode("a" * 2000, model.tokenizer)
            if chat and getattr(model.tokenizer, "chat_template", None):
                chat_text("ab", model.tokenizer)
        tokens = np.asarray([[0, 1, 2]]) % model.config.vocab_size
        trees = [model.params]
        if is_draft or name == seeds.CONVERTED:
            trees.append(model.draft_params)
        with jax.disable_jit():  # nothing is compiled for one case
            finite = [
                bool(np.isfinite(np.asarray(full_logits(tree, tokens, model.config))).all())
                for tree in trees
            ]
        return None if all(finite) else "logits that are not finite"


def _without_notices(heard: str) -> str:
    return "".join(line for line in heard.splitlines(True) if not line.startswith("quantspec: "))


def _place(error: BaseException) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        place = f"{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _files(source: Path) -> list[Path]:
    return [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())


def _fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The process's largest resident size since it was forgotten, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
