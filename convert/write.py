"""`convert`: a source → a converted checkpoint that appears whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from convert.drafts import make
from convert.drafts.make import DraftSource
from convert.files import converted
from convert.files.checksums import checksums
from convert.kv import KVSource
from convert.kv import prepare as prepare_kv
from convert.sources import Checkpoint, HuggingFaceCheckpoint, Weights, open_source
from quantspec_jax.checks import require
from quantspec_jax.claim import claim
from quantspec_jax.dtypes import STORED, float_type
from quantspec_jax.files import read_json, sync, write_json
from quantspec_jax.interrupts import held
from quantspec_jax.models.config import RopeScaling
from quantspec_jax.notices import notice
from quantspec_jax.stored_kv import StoredKV
from quantspec_jax.weights.formats import DraftConfig


def convert(
    source: str | Path,
    out_dir: str | Path,
    *,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    draft: DraftConfig | None = None,
    draft_text: str | None = None,
    draft_from: str | Path | None = None,
    kv: StoredKV | None = None,
    kv_text: str | None = None,
    rope: RopeScaling | None = None,
    progress: bool = True,
) -> Path:
    """Writes `source` (anything `open_source` takes) as a checkpoint that `qs.load` opens fast.

    Weights are read, and a draft is rounded, an array at a time: the host's memory holds a few
    arrays, however large the model is. What learns from a text, and what takes another checkpoint's
    codes, holds a block or two of the model, and reads the weights once or twice more.

    Args:
      source: what to convert.
      out_dir: the directory to make. It is written under another name beside it and renamed at the
        end, so that an error, a full disk or Ctrl-C leaves nothing; what a process that was killed
        left, the next one removes. `.<name of out_dir>.claim` beside it keeps a second process
        from writing the same. Should something else have come to lie there meanwhile, it stays,
        and the finished checkpoint gets the first free of the names `out_dir-1`, `out_dir-2`, ...,
        which the ValueError says.
      dtype: float32, bfloat16 or float16; None keeps the source's (GGUF: bfloat16).
      overwrite: replace `out_dir` if it is a converted checkpoint or empty.
      draft: store a draft's quantized weights too. Method `gptq` calibrates them, which takes a
        while: finished layers are kept in `.<name of out_dir>.calibration` beside `out_dir`, so
        that the same call goes on after an interruption; the end removes it.
      draft_text: text to calibrate on; None: one that comes with Python.
      draft_from: a 4-bit checkpoint of the same model whose codes become the draft's: GGUF file,
        or directory or hub id of GPTQ or AWQ safetensors.
      kv: store a codec of the cache that learns from a text, on the weights as they are stored.
        What is finished is kept in `.<name of out_dir>.kv-calibration`, as for a draft.
      kv_text: text that it learns from; None: one that comes with Python.
      rope: a RoPE scaling to store in place of the source's; a draft is calibrated with it.
      progress: a progress bar on standard error.

    Returns:
      The path of `out_dir`.
    """
    out = Path(out_dir).expanduser()
    require(bool(out.name), "out_dir", str(out), "a directory with a name")
    kept = None if dtype is None else float_type(dtype, allowed=STORED)
    make.check_arguments(draft, draft_text, draft_from)
    finished = out.parent / f".{out.name}.calibration"
    kv_finished = out.parent / f".{out.name}.kv-calibration"
    with _disk_errors(out, finished), _partial_directory(out) as partial:
        _check_target(out, overwrite)
        checkpoint = open_source(source, rope)
        own = make.prepare(checkpoint, draft, draft_text, draft_from, finished)
        cache = prepare_kv(checkpoint, kv, kv_text, kv_finished)
        checkpoint.check()
        stored_dtype = checkpoint.source_dtype if kept is None else kept
        _check_space(partial, checkpoint, stored_dtype, own, cache)
        with (
            _keep_finished_layers(finished, progress),
            _keep_finished_layers(kv_finished, progress),
        ):
            _write_tokenizer(checkpoint, partial)
            _write_weights(checkpoint, partial, stored_dtype, own, cache, progress)
            _move_into_place(partial, out, overwrite)
    return out


def _check_target(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"out_dir is {str(out)!r}, which exists and is no directory")
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"out_dir is {str(out)!r}, which exists; allowed: a new directory, or "
                         "overwrite a converted checkpoint with --overwrite")  # fmt: skip
    if not _is_replaceable(out):
        raise ValueError(
            f"out_dir is {str(out)!r}, which is neither empty nor a converted checkpoint: it is "
            "not overwritten"
        )


def _is_replaceable(directory: Path) -> bool:
    """Whether it is empty or a converted checkpoint."""
    config = directory / "config.json"
    ours = config.exists() and read_json(config).get("format") == converted.FORMAT
    return ours or not any(directory.iterdir())


@contextlib.contextmanager
def _keep_finished_layers(finished: Path, progress: bool) -> Iterator[None]:
    """The layers that a calibration finished are gone when all is done; before that, say so."""
    try:
        yield
    except BaseException as error:
        told = isinstance(error, ValueError) or _is_full_disk(error)
        if progress and finished.exists() and not told:
            notice(_kept_layers(finished))
        raise
    _remove(finished)


def _kept_layers(finished: Path) -> str:
    return f"the calibrated layers are kept in {finished}: the same command goes on after them"


@contextlib.contextmanager
def _partial_directory(out: Path) -> Iterator[Path]:
    """A hidden directory beside `out`, gone at the end unless it was renamed. `out` is claimed
    meanwhile, and rid of what a claim that ended with its process left."""
    made = [p for p in (out.parent, *out.parent.parents) if not p.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        with _refused(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            file = out.with_name(f".{out.name}.claim")
            claimed = stack.enter_context(claim(file, "out_dir", out))
            for dead in claimed.dead:
                _recover(out, dead)
            stack.callback(_clear, out, claimed.token)
            partial, _ = _temporary(out, claimed.token)
            partial.mkdir(0o700)
        yield partial


@contextlib.contextmanager
def _refused(out: Path) -> Iterator[None]:
    """What the system refuses but space is the caller's choice of a place."""
    try:
        yield
    except OSError as error:
        if _is_full_disk(error):
            raise
        raise ValueError(
            f"out_dir is {str(out)!r}, where nothing can be written: {error.strerror}"
        ) from error


def _temporary(out: Path, token: str) -> tuple[Path, Path]:
    """The names, while a claim lasts, of what becomes `out` and of what `out` was before."""
    hidden = f".{out.name}.{token}"
    return out.with_name(f"{hidden}.partial"), out.with_name(f"{hidden}.old")


def _recover(out: Path, token: str) -> None:
    """Undo what a process that was killed had begun; the token is that of its claim."""
    partial, _ = _temporary(out, token)
    if (partial / "config.json").exists():  # it was whole: an empty `out` was made to receive it
        with contextlib.suppress(OSError):
            out.rmdir()
    _clear(out, token)


def _clear(out: Path, token: str) -> None:
    """Nothing stays of a claim but what lies at `out`: the new checkpoint, else the old one."""
    partial, old = _temporary(out, token)
    with held():  # what is cut off here, nobody would find again
        _remove(partial)
        with contextlib.suppress(OSError):  # the new one lies there, or there is no old one
            old.rename(out)
        with contextlib.suppress(OSError, ValueError):
            if _is_replaceable(old):
                old.rename(partial)  # half of an old one could not be told from something precious
                _remove(partial)


def _remove(directory: Path) -> None:
    """Writers that an error left running may add files meanwhile: try for a while."""
    for _ in range(50):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)


def _remove_empty(directories: list[Path]) -> None:
    """The parents that were made for `out`, innermost first, where nothing came to lie in them."""
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


@contextlib.contextmanager
def _disk_errors(out: Path, finished: Path) -> Iterator[None]:
    """A full disk, however the writer reports it, becomes OSError(ENOSPC) that says what is left
    once all is cleared away."""
    try:
        yield
    except Exception as error:
        if isinstance(error, _NoSpaceError) or not _is_full_disk(error):
            raise
        left = _kept_layers(finished) if finished.exists() else "nothing was left behind"
        raise _no_space(out, left) from error


def _is_full_disk(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    words = ("No space left on device", "Disk quota exceeded", "RESOURCE_EXHAUSTED: Error writing")
    return full or any(word in str(error) for word in words)


class _NoSpaceError(OSError):
    """Says all there is to say."""


def _no_space(out: Path, detail: str) -> OSError:
    return _NoSpaceError(errno.ENOSPC, f"no space left on the disk of {str(out)!r}; {detail}")


def _check_space(
    partial: Path,
    checkpoint: Checkpoint,
    dtype: np.dtype,
    draft: DraftSource | None,
    cache: KVSource | None,
) -> None:
    needed = checkpoint.parameter_count * dtype.itemsize
    if draft is not None:
        needed += draft.num_bytes
    if cache is not None:
        needed += cache.num_bytes(checkpoint)
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise _no_space(
            partial.parent, f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )


def _write_tokenizer(checkpoint: Checkpoint, partial: Path) -> None:
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        generation = checkpoint.directory / "generation_config.json"
        if generation.exists():
            shutil.copyfile(generation, partial / generation.name)
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save_pretrained(partial)


def _write_weights(
    checkpoint: Checkpoint,
    partial: Path,
    dtype: np.dtype,
    draft: DraftSource | None,
    cache: KVSource | None,
    progress: bool,
) -> None:
    weights = Weights(checkpoint, dtype, progress)
    header = converted.Header(checkpoint.config, dtype)
    if draft is not None:
        config, entries = draft.make(weights, progress)
        converted.save_draft(partial, entries)
        header = converted.Header(checkpoint.config, dtype, config, converted.plain_arrays(entries))
    if cache is not None:
        converted.save_kv(partial, cache.make(weights, progress))
        header = dataclasses.replace(header, kv=cache.kv)
    with weights.in_turn() as tree:
        converted.save_tree(partial / "weights", tree)
    header = dataclasses.replace(header, checksums=checksums(partial))
    write_json(partial / "config.json", header.to_dict(), indent=2)


class _OccupiedError(Exception):
    """Something that is not to be replaced lies at the name."""


def _move_into_place(partial: Path, out: Path, overwrite: bool) -> None:
    """A rename. What came to lie at `out` since the beginning is never touched, unless it is what
    `overwrite` is for; then the finished checkpoint is kept under another name beside it."""
    partial.chmod(0o777 & ~_umask())
    _sync(partial)
    try:
        with held():  # an empty directory at `out` would be in the way of the same command
            if overwrite and out.exists():
                _replace(partial, out)
            else:
                _rename(partial, out)
    except _OccupiedError as error:
        aside = _keep_aside(partial, out)
        raise ValueError(
            f"out_dir is {str(out)!r}, where something else came to lie while this was converted: "
            f"it is left as it is, and the converted checkpoint is {str(aside)!r}"
        ) from error


def _rename(partial: Path, out: Path) -> None:
    """To a name that nobody has: making the directory is what only one can do, and one directory
    may be renamed to another that is empty."""
    try:
        out.mkdir()
    except FileExistsError as error:
        raise _OccupiedError from error
    try:
        partial.rename(out)
    except BaseException as error:
        with contextlib.suppress(OSError):
            out.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _OccupiedError from error
        raise


def _replace(partial: Path, out: Path) -> None:
    """The old checkpoint steps aside first, and comes back should the rename fail."""
    if out.is_symlink() or not out.is_dir():
        raise _OccupiedError
    old = partial.with_suffix(".old")
    try:
        out.rename(old)
        if not _is_replaceable(old):
            raise _OccupiedError
        _rename(partial, out)
    except BaseException:
        with contextlib.suppress(OSError):  # another one lies there by now
            old.rename(out)
        raise


def _keep_aside(partial: Path, out: Path) -> Path:
    for number in itertools.count(1):
        aside = out.with_name(f"{out.name}-{number}")
        with contextlib.suppress(_OccupiedError):
            _rename(partial, aside)
            return aside
    raise AssertionError("unreachable")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(directory: Path) -> None:
    """The files beside the arrays are on the disk before the name says so; Orbax syncs its own."""
    for path in [*directory.iterdir(), directory]:
        sync(path)
