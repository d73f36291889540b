"""A claim has one owner at a time, and none that is dead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from quantspec_jax import claim as claims
from quantspec_jax.claim import claim

KILLED = """
import os, sys
from pathlib import Path
from quantspec_jax.claim import claim
with claim(Path(sys.argv[1]), "out_dir", "out") as claimed:
    print(claimed.token, flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), 9)
    sys.stdin.read()
"""


def owner(path, how: str) -> subprocess.Popen:
    command = [sys.executable, "-c", KILLED, str(path), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def taken(path) -> bool:
    try:
        with claim(path, "out_dir", "out"):
            return True
    except ValueError:
        return False


def test_a_second_one_is_told_who_has_it_and_a_later_one_gets_it(tmp_path):
    path = tmp_path / "claim"
    with owner(path, "wait") as process:
        token = process.stdout.readline().strip()
        before = path.read_bytes()
        words = rf"out_dir is 'o', which process {process.pid} on .* is writing; .*{path}"
        with pytest.raises(ValueError, match=words), claim(path, "out_dir", "o"):
            pass
        assert path.read_bytes() == before
        process.stdin.close()
    assert list(tmp_path.iterdir()) == []
    with claim(path, "out_dir", "o") as claimed:
        assert claimed.dead == ()
        assert claimed.token != token
        assert not taken(path), "nor twice in one process"
    assert list(tmp_path.iterdir()) == []


def test_those_of_dead_ones_are_taken_over_and_their_tokens_known(tmp_path):
    """The second may have been killed before it removed what the first one left."""
    path, tokens = tmp_path / "claim", []
    for _ in range(2):
        with owner(path, "kill") as process:
            tokens.append(process.stdout.readline().strip())
    assert path.exists()
    with claim(path, "out_dir", "out") as claimed:
        assert claimed.dead == tuple(tokens)
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_it_is_gone_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "claim", "out_dir", "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["no claim", "[]", '{"pid": 1, "host": "elsewhere", "boot": "another"}']
)
def test_what_may_be_somebody_s_is_left_alone(content, tmp_path):
    """A file of another machine's process, whose lock cannot be seen from here, or no claim."""
    path = tmp_path / "claim"
    path.write_text(content)
    assert not taken(path)
    assert path.read_text() == content


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "claim").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="Too many levels"), claim(tmp_path / "claim", "a", "b"):
        pass
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize("token", ["../../precious", 5, None, "9BE1D07C"])
def test_a_token_is_a_token(token, tmp_path):
    """It becomes part of names of what is removed."""
    path = tmp_path / "claim"
    ours = {"pid": 1, **claims._machine(), "token": token, "dead": [token]}
    path.write_text(json.dumps(ours))
    with claim(path, "out_dir", "out") as claimed:
        assert claimed.dead == ()


def test_where_there_are_no_locks_the_process_itself_is_asked_for(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "claim"
    with owner(path, "kill") as process:
        process.wait()
    assert taken(path)
    with claim(path, "out_dir", "out"):
        assert not taken(path)
    assert taken(path)
