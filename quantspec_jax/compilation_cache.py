"""The persistent compilation cache: a program that was compiled once is read from disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

MIN_COMPILE_SECONDS = 0.5


def directory() -> Path | None:
    """$QUANTSPEC_CACHE_DIR (empty: no cache), else quantspec-jax/xla in the user's cache folder."""
    given = os.environ.get("QUANTSPEC_CACHE_DIR")
    if given is not None:
        return Path(given) if given else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "quantspec-jax" / "xla"
    except RuntimeError:  # a user without a home
        return None


def enable() -> Path | None:
    """Turn the cache on; returns its directory, or None where it stays off.

    A cache directory that the user set through JAX stays. A directory that cannot be written turns
    the cache off and is no error.
    """
    import jax

    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if given:
        return Path(given)
    path = directory()
    if path is None or not _writable(path):
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return path


def _writable(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False
