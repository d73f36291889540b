"""What tests of converted directories share."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from quantspec_jax.models.parameters import flatten

# When one array fails, the operations of others end later, each with a complaint of its own.
ORBAX_THREADS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def assert_equal_trees(one, other) -> None:
    one, other = flatten(one), flatten(other)
    assert set(one) == set(other)
    for path in one:
        for a, b in zip(jax.tree.leaves(one[path]), jax.tree.leaves(other[path]), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


def make_directory(out: Path) -> None:
    out.mkdir()
    (out / "chapter.txt").write_text("x")
