"""Files are written whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from quantspec_jax.files import read_json, whole, write_json, write_text


def test_an_object_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "a.json"
    for values in ({"γ": [4, None, 0.1]}, {"shorter": True}):
        write_json(path, values, indent=1)
        assert read_json(path) == values
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "what was there"])
def test_after_an_error_everything_is_as_it_was(tmp_path, error, before):
    path = tmp_path / "a.npz"
    if before is not None:
        path.write_text(before)

    def write():
        with whole(path) as partial:
            assert (partial.parent, partial.suffix) == (path.parent, path.suffix)
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert [(p, p.read_text()) for p in tmp_path.iterdir()] == ([(path, before)] if before else [])


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with whole(path) as slow:
        slow.write_text("slow, ")
        write_text(path, "quick")
        assert path.read_text() == "quick"
        slow.write_text(slow.read_text() + "and whole")
    assert path.read_text() == "slow, and whole"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_never_written_gets_no_name(tmp_path):
    with pytest.raises(FileNotFoundError), whole(tmp_path / "a.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


DYING = """
import os, signal, sys
from pathlib import Path
from quantspec_jax.files import whole
with whole(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    """Neither a living one's, nor of another file, nor of a machine where numbers mean others."""
    path = tmp_path / "a.txt"
    assert subprocess.run([sys.executable, "-c", DYING, path]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    machine, pid, _ = left.name.removeprefix(".a.").split("-")
    others = {
        tmp_path / left.name.replace(machine, f"{int(machine, 16) ^ 1:08x}"),
        tmp_path / left.name.replace(".a.", ".a.b."),
        tmp_path / left.name.replace(".txt", ".npz"),
        tmp_path / left.name.replace(pid, str(os.getpid())),
    }
    assert len(others) == 4
    for other in others:
        other.touch()
    write_text(path, "whole")
    assert set(tmp_path.iterdir()) == {path, *others}
