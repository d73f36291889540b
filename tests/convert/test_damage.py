"""Converted directories that a killed process left, or that something damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from trees import ORBAX_THREADS, assert_equal_trees, contents, make_directory

import convert
from convert.files import converted as converted_io
from convert.sources import ConvertedCheckpoint
from quantspec_jax import claim as claims
from quantspec_jax.weights.formats import DraftConfig

# What a process that was killed leaves.


DEAD = "0123abcd"


@pytest.fixture
def killed(tmp_path):
    """The claim of a process that does not live any more; names of its `partial` and `old`."""
    claim = {"pid": 1, **claims._machine(), "token": DEAD}
    (tmp_path / ".out.claim").write_text(json.dumps(claim))
    return tmp_path / f".out.{DEAD}.partial", tmp_path / f".out.{DEAD}.old"


def make_strays(directory: Path) -> dict[str, bytes]:
    """What looks like leftovers, and is of nobody who is known to be dead."""
    for name in (".out.4567cdef.partial", ".out.4567cdef.old", f".other.{DEAD}.partial"):
        (directory / name).mkdir()
        (directory / name / "chapter.txt").write_text("x")
    return contents(directory)


@pytest.mark.parametrize("whole", [False, True])
def test_half_of_a_checkpoint_is_removed_and_nothing_else(whole, killed, llama_dir, tmp_path):
    """`whole`: killed between making an empty `out` and moving there."""
    partial, _ = killed
    partial.mkdir()
    (partial / "tokenizer.json").write_text("{}")
    if whole:
        (partial / "config.json").write_text("{}")
        (tmp_path / "out").mkdir()
    strays = make_strays(tmp_path)
    out = convert.convert(llama_dir, tmp_path / "out", progress=False)
    assert not partial.exists()
    strays = {n: data for n, data in strays.items() if DEAD not in n or n.startswith(".other")}
    there = contents(tmp_path).items()
    assert {n: data for n, data in there if not n.startswith("out/")} == {
        n: data for n, data in strays.items() if n != ".out.claim"
    }
    assert isinstance(convert.open_source(out), ConvertedCheckpoint)


@pytest.mark.parametrize("place", ["free", "empty", "taken"])
def test_a_checkpoint_that_had_stepped_aside_comes_back(place, killed, llama_dir, tmp_path):
    """Where its successor did not arrive; else it goes, as was asked for."""
    partial, old = killed
    out = tmp_path / "out"
    convert.convert(llama_dir, tmp_path / "made", dtype="bfloat16", progress=False).rename(old)
    if place == "empty":
        out.mkdir()
    if place == "taken":
        convert.convert(llama_dir, tmp_path / "made", progress=False).rename(out)
    else:
        partial.mkdir()
    before = contents(out if place == "taken" else old)
    with pytest.raises(ValueError, match="which exists"):
        convert.convert(llama_dir, out, progress=False)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_moved_aside_and_is_no_checkpoint_is_never_removed(killed, llama_dir, tmp_path):
    _, old = killed
    make_directory(old)
    make_directory(tmp_path / "out")
    with pytest.raises(ValueError, match="which exists"):
        convert.convert(llama_dir, tmp_path / "out", progress=False)
    assert contents(old) == contents(tmp_path / "out") == {"chapter.txt": b"x"}


# A damaged checkpoint.


@pytest.fixture
def converted(llama_dir, tmp_path):
    return convert.convert(llama_dir, tmp_path / "out", draft=DraftConfig(), progress=False)


def test_damage_is_found_before_anything_is_read(converted):
    opened = convert.open_source(converted)
    kernel = converted / "weights" / "layers.1.up.kernel"
    (chunk,) = (p for p in (kernel / "c").rglob("*") if p.is_file())
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"weights is damaged: layers.1.up.kernel is cut off"):
        opened.load("float32")
    with pytest.raises(ValueError, match=r"cut off"):
        opened.check()
    chunk.write_bytes(whole)
    opened.load("float32")
    shutil.rmtree(converted / "draft" / "layers.0.q.kernel.scale")
    with pytest.raises(ValueError, match=r"draft is damaged: layers.0.q.kernel.scale is missing"):
        opened.load_draft()
    shutil.rmtree(kernel)
    with pytest.raises(ValueError, match=r"layers.1.up.kernel is missing"):
        opened.load("float32")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@ORBAX_THREADS
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("array", ["weights/layers.1.up.kernel", "draft/layers.0.q.kernel.packed"])
def test_one_bit_or_one_byte_more_is_noticed_and_the_array_named(array, place, converted):
    opened = convert.open_source(converted)
    load = opened.load_draft if array.startswith("draft") else lambda: opened.load("bfloat16")
    for path in [p for p in (converted / array).rglob("*") if p.is_file()]:
        data = path.read_bytes()
        at = int(place * (len(data) - 1))
        for damaged in (flipped(data, at), data[:at] + b"0" + data[at:]):
            path.write_bytes(damaged)
            directory, name = array.split("/")
            with pytest.raises(ValueError, match=rf"{directory} is damaged: {name} .* again$"):
                load()
        path.write_bytes(data)
    load()


def test_a_chunk_in_another_s_place_is_noticed(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(converted_io, "_CHUNK_BYTES", 100_000)
    out = convert.convert(llama_dir, tmp_path / "out", progress=False)
    one, two = sorted(p for p in (out / "weights/embedding/c").rglob("*") if p.is_file())[:2]
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with pytest.raises(ValueError, match="embedding is not what was written"):
        convert.open_source(out).load("float32")


def test_a_checkpoint_without_checksums_opens_with_a_notice(converted, capsys):
    expected = convert.open_source(converted).load("float32")
    assert capsys.readouterr().err == ""
    path = converted / "config.json"
    header = json.loads(path.read_text())
    assert len(header.pop("checksums")) == len(list(converted.rglob("zarr.json")))
    path.write_text(json.dumps(header))
    opened = convert.open_source(converted)
    assert_equal_trees(opened.load("float32"), expected)
    opened.load_draft()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{converted} has no checksums" in said
    del header["draft_arrays"]
    path.write_text(json.dumps(header | {"checksums": {"weights/embedding": "00000000"}}))
    with pytest.raises(ValueError, match="weights is damaged: embedding is not what was written"):
        convert.open_source(converted).load("float32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checksums": 3}, "is damaged"),
        ({"version": 2}, "version in .* is 2"),
        ({"dtype": "int8"}, "dtype in .* is 'int8'"),
        ({"model": {}}, "is damaged"),
        ({"model": None}, "is damaged"),
        ({"draft": {"bits": 3}}, "draft bits is 3"),
        ({"draft_arrays": {"layers.0.q.order": 3}}, "is damaged"),
        ({"draft": {"colour": 1}}, "is damaged"),
    ],
)
def test_a_damaged_config_is_named(changes, words, converted):
    path = converted / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        convert.open_source(converted)


def test_a_checkpoint_of_other_shapes_is_refused(converted):
    path = converted / "config.json"
    header = json.loads(path.read_text())
    header["model"]["intermediate_size"] += 1
    path.write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"layers.0.\w+.kernel has shape \[512, 256\]"):
        convert.open_source(converted).load("float32")
