"""Files are written whole or not at all."""

from __future__ import annotations

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
