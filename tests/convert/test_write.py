"""Writing a converted checkpoint: whole or not at all, within memory, and the same when read."""

from __future__ import annotations

import _thread
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import ORBAX_THREADS, assert_equal_trees, contents, make_directory

import convert
import quantspec_jax as qs
from convert import sources, write
from convert.files import converted as converted_io
from convert.files import deferred
from convert.hf_config import parse_hf_config
from convert.sources import ConvertedCheckpoint
from convert.weights import hf_name
from pallas_kernels.layout import LAYOUT_VERSION, QuantizedWeight
from quantspec_jax import cli
from quantspec_jax.models.parameters import flatten, parameter_shapes
from quantspec_jax.weights.calibrate import calibrate, calibration_tokens, resume
from quantspec_jax.weights.entries import quantize_params
from quantspec_jax.weights.formats import DraftConfig, WeightFormat

# The round trip.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_round_trip(dtype, llama_dir, tmp_path):
    out = convert.convert(llama_dir, tmp_path / "out", dtype=dtype, progress=False)
    source, opened = convert.open_source(llama_dir), convert.open_source(out)
    assert isinstance(opened, ConvertedCheckpoint)
    assert opened.source_dtype.name == dtype
    assert opened.config == source.config
    assert opened.load_draft() is None
    assert opened.draft_config is None
    for load_dtype in {dtype, "bfloat16"}:
        expected = source.load(dtype)
        expected = jax.tree.map(lambda a, d=load_dtype: a.astype(d), expected)
        assert_equal_trees(opened.load(load_dtype), expected)
    header = json.loads((out / "config.json").read_text())
    assert (header["format"], header["version"], header["dtype"]) == ("quantspec", 1, dtype)
    assert header["layout_version"] == LAYOUT_VERSION


def test_the_source_type_is_kept_and_gguf_becomes_bfloat16(llama_model, llama_dir, tools, tmp_path):
    gguf = tools.write_gguf(llama_model, tmp_path / "model.gguf")
    for source, dtype in ((llama_dir, "float32"), (gguf, "bfloat16")):
        out = convert.convert(source, tmp_path / dtype, progress=False)
        assert convert.open_source(out).source_dtype.name == dtype


def test_a_converted_checkpoint_converts_again(llama_dir, tmp_path):
    one = convert.convert(llama_dir, tmp_path / "one", progress=False)
    two = convert.convert(one, tmp_path / "two", dtype="bfloat16", progress=False)
    direct = convert.convert(llama_dir, tmp_path / "direct", dtype="bfloat16", progress=False)
    assert_equal_trees(
        convert.open_source(two).load("bfloat16"), convert.open_source(direct).load("bfloat16")
    )


def test_eos_ids_of_generation_config_are_kept(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    out = convert.convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert convert.open_source(out).config.eos_ids == (7, 9, 1)
    assert (out / "generation_config.json").exists()


def test_one_array_may_lie_in_several_files(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(converted_io, "_CHUNK_BYTES", 10_000)
    out = convert.convert(llama_dir, tmp_path / "out", progress=False)
    assert len(list((out / "weights" / "embedding" / "c").rglob("*"))) > 10
    assert_equal_trees(
        convert.open_source(out).load("float32"), convert.open_source(llama_dir).load("float32")
    )


# The draft.


@pytest.mark.parametrize(
    "draft",
    [
        DraftConfig(),
        DraftConfig(group_size=128, symmetric=True),
        DraftConfig(group_size=96, layers="mlp"),
        DraftConfig(bits=8, layers="layers.1.*", formats=(("layers.0.q", WeightFormat(4, 32)),)),
    ],
)
def test_a_draft_is_stored_as_it_is_made(draft, llama_dir, tmp_path):
    """Only its quantized kernels: the rest is shared with the full weights."""
    out = convert.convert(llama_dir, tmp_path / "out", draft=draft, progress=False)
    opened = convert.open_source(out)
    assert opened.draft_config == draft
    config, tree = opened.load_draft()
    assert config == draft
    expected = quantize_params(opened.load("float32"), draft)
    assert_equal_trees(tree, expected)
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    assert all(isinstance(leaf, QuantizedWeight) for leaf in flatten(tree).values())


def test_a_draft_of_another_packing_is_refused(llama_dir, tmp_path):
    out = convert.convert(llama_dir, tmp_path / "out", draft=DraftConfig(), progress=False)
    header = json.loads((out / "config.json").read_text()) | {"layout_version": 999}
    (out / "config.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"layout_version in .* is 999.*convert the source again"):
        convert.open_source(out)


# Arguments.


def test_wrong_arguments_are_refused_before_any_work(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "open_source", lambda *_: pytest.fail("worked"))
    out = tmp_path / "out"
    cases = [
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        ({"draft": DraftConfig(bits=None)}, ValueError, "draft bits is None"),
        ({"draft": DraftConfig(method="imported")}, ValueError, "draft_from"),
        ({"draft": DraftConfig(), "draft_text": "text"}, ValueError, "draft_text"),
        ({"draft_text": "text"}, ValueError, "draft_text"),
        ({"draft": DraftConfig(), "draft_from": "m.gguf"}, ValueError, "allowed is one of them"),
    ]
    for kwargs, error, words in cases:
        with pytest.raises(error, match=words):
            convert.convert(llama_dir, out, progress=False, **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_do_not_exist_are_refused_before_weights_are_read(llama_dir, tmp_path):
    draft = DraftConfig(layers="*.dwon")
    with pytest.raises(ValueError, match=r"'\*\.dwon' fits no layer"):
        convert.convert(llama_dir, tmp_path / "out", draft=draft, progress=False)
    assert list(tmp_path.iterdir()) == []


# Calibration.


@pytest.fixture
def calibrating(monkeypatch, tiny_llama_dir, tmp_path):
    """Convert with a calibration that keeps one layer and then does what it is told."""
    draft = DraftConfig(method="gptq", group_size=32)
    formats = (("layers.1.q", WeightFormat(8, 32, True)), ("layers.0.k", WeightFormat(16)))
    found = dataclasses.replace(draft, formats=formats)

    def run(act=lambda resume: None, **kwargs):
        def calibrate(config, params, tokens, given, *, progress, resume):
            assert given == draft
            assert tokens.shape[0] * tokens.shape[1] > 1000
            resume.mkdir(exist_ok=True)
            (resume / f"layer-{len(list(resume.iterdir()))}").write_text("x")
            act(resume)
            entries = quantize_params(params, found)
            order = jnp.arange(params["layers"]["1"]["q"]["kernel"].shape[0])[::-1]
            entries["layers"]["1"]["q"]["order"] = order
            return found, entries

        monkeypatch.setattr("quantspec_jax.weights.calibrate.calibrate_in_turn", calibrate)
        convert.convert(tiny_llama_dir, tmp_path / "out", draft=draft, **kwargs)

    run.found = found
    return run


def test_a_calibrated_draft_is_stored_with_its_formats(calibrating, tmp_path):
    calibrating(progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "the finished layers are gone"
    model = qs.load(str(tmp_path / "out"), dtype="float32")
    assert model.draft == calibrating.found
    one = model.draft_params["layers"]["1"]["q"]
    assert set(one) == {"kernel", "residual", "order"}
    assert one["order"].tolist() == list(range(63, -1, -1))
    assert one["kernel"].minimum is None
    own = model.draft_params["layers"]["0"]
    assert own["k"]["kernel"] is model.params["layers"]["0"]["k"]["kernel"]


def test_calibrated_weights_are_stored_as_they_are_found(
    make_tiny_llama, tmp_path, tmp_path_factory, monkeypatch
):
    """The real calibration, on a short text; loading repeats nothing of it. Of the weights it holds
    two blocks and the one that is read, of the draft's own one and the next."""
    tokens = functools.partial(calibration_tokens, chunks=2)
    monkeypatch.setattr("quantspec_jax.weights.calibrate.calibration_tokens", tokens)
    source = make_tiny_llama(
        tmp_path_factory.mktemp("hf"), num_hidden_layers=6, max_position_embeddings=64
    )
    draft = DraftConfig(method="gptq", group_size=32, layers="*.down", lm_head_bits=4)
    text = "the cat sat on a mat. " * 60
    monkeypatch.setattr(deferred, "BATCH_BYTES", 1)
    checkpoint = convert.open_source(source)
    shapes = {spec.shape for spec in parameter_shapes(checkpoint.config).values()}
    held = held_bytes(monkeypatch, sources.Checkpoint, "read", shapes)
    down = (3, 16, 64)  # packed
    own = held_bytes(monkeypatch, resume, "_load_block", {down})
    monkeypatch.setattr(sources.Checkpoint, "load", lambda *_, **__: pytest.fail("read them all"))
    out = convert.convert(
        source, tmp_path / "out", draft=draft, draft_text=text, dtype="float32", progress=False
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    monkeypatch.setattr("quantspec_jax.weights.calibrate.calibration_tokens", tokens)
    specs = parameter_shapes(checkpoint.config)
    block = sum(4 * spec.size for path, spec in specs.items() if path.startswith("layers.0."))
    assert 2 * block < max(held) <= 3 * block + 2 * 4 * 320 * 64 < 6 * block
    assert 0 < max(own) <= 2 * np.prod(down)
    chunks = tokens(checkpoint.tokenizer, text, length=64)  # the model's context
    expected = calibrate(checkpoint.config, checkpoint.load("float32"), chunks, draft)
    monkeypatch.setattr(
        "quantspec_jax.weights.calibrate.calibrate_in_turn", lambda *_: pytest.fail("again")
    )
    config, entries = convert.open_source(out).load_draft()
    assert config == expected[0]
    assert_equal_trees(entries, expected[1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "broken")])
def test_an_interrupted_calibration_goes_on(error, calibrating, tmp_path, capfd):
    """The finished layers, and they alone, stay; the message says where, and what to do."""

    def interrupt(resume):
        raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        calibrating(interrupt)
    assert [p.name for p in tmp_path.iterdir()] == [".out.calibration"]
    message = capfd.readouterr().err.splitlines()[-1]
    assert str(tmp_path / ".out.calibration") in message
    assert "the same command goes on" in message
    found = []
    calibrating(lambda resume: found.extend(p.name for p in resume.iterdir()), progress=False)
    assert sorted(found) == ["layer-0", "layer-1"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_calibration_that_cannot_be_leaves_nothing(calibrating, tmp_path):
    def nan(resume):
        raise ValueError("activations of layers.0 are not finite")

    with pytest.raises(ValueError, match="not finite"):
        calibrating(nan, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_another_calibrations_layers_are_left_alone(calibrating, tmp_path):
    def other(resume):
        raise ValueError(f"{resume} holds another calibration")

    (tmp_path / ".out.calibration").mkdir()
    with pytest.raises(ValueError, match="another calibration"):
        calibrating(other, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == [".out.calibration"]


def test_a_text_that_calibrates_nothing_is_refused_before_weights_are_read(
    calibrating, llama_dir, tiny_llama_dir, tmp_path, monkeypatch
):
    checkpoint = type(convert.open_source(llama_dir))
    for name in ("load", "read", "read_below"):
        monkeypatch.setattr(checkpoint, name, lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(ValueError, match=r"calibration text is .* tokens"):
        calibrating(draft_text="too short", progress=False)
    mixed = DraftConfig(method="gptq", average_bits=4.1)
    with pytest.raises(ValueError, match=r"average_bits is 4.1; allowed: 4\.\d+ or more"):
        convert.convert(tiny_llama_dir, tmp_path / "out", draft=mixed, progress=False)
    with pytest.raises(ValueError, match=r"which has no tokenizer: draft method gptq"):
        convert.convert(
            llama_dir, tmp_path / "out", draft=DraftConfig(method="gptq"), progress=False
        )
    assert list(tmp_path.iterdir()) == []


def test_headers_of_earlier_versions_are_read(llama_dir, tmp_path):
    """Before formats, methods other than rounding and arrays beside the kernels were stored."""
    out = convert.convert(llama_dir, tmp_path / "out", draft=DraftConfig(), progress=False)
    header = json.loads((out / "config.json").read_text())
    del header["draft_arrays"], header["draft"]["formats"], header["draft"]["average_bits"]
    (out / "config.json").write_text(json.dumps(header))
    config, entries = convert.open_source(out).load_draft()
    assert config == DraftConfig()
    assert len(flatten(entries)) == 2 * 7


# The output directory.


def test_an_existing_directory_is_left_alone(llama_dir, tmp_path):
    out = convert.convert(llama_dir, tmp_path / "out", progress=False)
    before = contents(out)
    with pytest.raises(ValueError, match=r"out_dir is .*, which exists"):
        convert.convert(llama_dir, out, dtype="bfloat16", progress=False)
    assert contents(out) == before
    convert.convert(llama_dir, out, dtype="bfloat16", overwrite=True, progress=False)
    assert convert.open_source(out).source_dtype.name == "bfloat16"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_nothing_but_checkpoints_and_empty_directories(llama_dir, tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("x")
    file = tmp_path / "file"
    file.write_text("x")
    hugging_face = tmp_path / "hf"
    shutil.copytree(llama_dir, hugging_face)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    for target in (precious, file, hugging_face, link):
        with pytest.raises(ValueError, match="out_dir is"):
            convert.convert(llama_dir, target, overwrite=True, progress=False)
    assert contents(precious) == {"chapter.txt": b"x"}
    assert contents(hugging_face) == contents(llama_dir)
    empty = tmp_path / "empty"
    empty.mkdir()
    convert.convert(llama_dir, empty, overwrite=True, progress=False)
    assert isinstance(convert.open_source(empty), ConvertedCheckpoint)


def test_parents_are_made_and_removed_again_after_an_error(llama_dir, tmp_path, monkeypatch):
    deep = tmp_path / "a" / "b" / "out"
    monkeypatch.setattr(
        converted_io, "save_tree", lambda *_: (_ for _ in ()).throw(RuntimeError("no"))
    )
    with pytest.raises(RuntimeError, match="no"):
        convert.convert(llama_dir, deep, progress=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert convert.convert(llama_dir, deep, progress=False) == deep


def test_the_directory_has_ordinary_permissions(llama_dir, tmp_path):
    out = convert.convert(llama_dir, tmp_path / "out", progress=False)
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_where_nothing_can_be_written(llama_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"out_dir is .*, where nothing can be written"):
        convert.convert(llama_dir, tmp_path / "file" / "out", progress=False)
    with pytest.raises(ValueError, match=r"out_dir is .*, where nothing can be written"):
        convert.convert(llama_dir, "/proc/quantspec-test", progress=False)


def test_a_source_that_fails_leaves_an_old_checkpoint_as_it_was(llama_dir, tmp_path):
    out = convert.convert(llama_dir, tmp_path / "out", progress=False)
    before = contents(out)
    shutil.copytree(llama_dir, tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated"):
        convert.convert(tmp_path / "hf", out, overwrite=True, progress=False)
    assert contents(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_a_failing_last_rename_brings_the_old_checkpoint_back(llama_dir, tmp_path, monkeypatch):
    out = convert.convert(llama_dir, tmp_path / "out", progress=False)
    before = contents(out)
    rename = Path.rename

    def failing(self, target):
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken"):
        convert.convert(llama_dir, out, overwrite=True, progress=False)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def meanwhile(monkeypatch):
    """Something to do while the weights are being written, once."""

    def at_the_same_time(act):
        save_tree = converted_io.save_tree

        def saving(*args):
            monkeypatch.setattr(converted_io, "save_tree", save_tree)
            act()
            save_tree(*args)

        monkeypatch.setattr(converted_io, "save_tree", saving)

    return at_the_same_time


def make_file(out: Path) -> None:
    out.write_text("x")


def make_link(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    out.symlink_to(out.parent / "elsewhere")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [make_directory, make_file, make_link, Path.mkdir])
def test_what_comes_to_lie_at_out_dir_meanwhile_stays(
    make, overwrite, meanwhile, llama_dir, tmp_path
):
    """It is named, and so is where the work is kept. An empty directory may be overwritten."""
    out = tmp_path / "out"
    (tmp_path / "out-1").mkdir()
    before = []
    meanwhile(lambda: before.append(make(out) or out.lstat()))
    if overwrite and make is Path.mkdir:
        assert convert.convert(llama_dir, out, overwrite=True, progress=False) == out
        return
    with pytest.raises(ValueError, match=r"out_dir is '.*/out', .* checkpoint is '.*/out-2'"):
        convert.convert(llama_dir, out, overwrite=overwrite, progress=False)
    assert out.lstat().st_ino == before[0].st_ino
    assert (make is make_directory) == (out.is_dir() and (out / "chapter.txt").exists())
    assert list((tmp_path / "out-1").iterdir()) == []
    kept = convert.open_source(tmp_path / "out-2")
    assert_equal_trees(kept.load("float32"), convert.open_source(llama_dir).load("float32"))
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_of_two_at_once_one_wins_and_the_other_says_so(meanwhile, llama_dir, tmp_path):
    """The late one, before it has begun; the early one's work is not touched."""
    out, refused = tmp_path / "out", []

    def second():
        words = rf"out_dir is '{out}', which process {os.getpid()} on .* is writing"
        with pytest.raises(ValueError, match=words):
            convert.convert(llama_dir, out, dtype="bfloat16", overwrite=True, progress=False)
        refused.append(True)

    meanwhile(second)
    convert.convert(llama_dir, out, progress=False)
    assert refused
    assert convert.open_source(out).source_dtype.name == "float32"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_one_checkpoint_may_overwrite_another_that_came_meanwhile(meanwhile, llama_dir, tmp_path):
    out = tmp_path / "out"

    def second():
        other = tmp_path / "other"
        convert.convert(llama_dir, other, dtype="bfloat16", progress=False).rename(out)

    meanwhile(second)
    convert.convert(llama_dir, out, overwrite=True, progress=False)
    assert convert.open_source(out).source_dtype.name == "float32"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# A full disk.


def test_too_little_space_is_an_error_before_any_work(llama_dir, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(converted_io, "save_tree", lambda *_: pytest.fail("worked"))
    with pytest.raises(OSError, match=r"no space left .* GB are needed") as caught:
        convert.convert(llama_dir, tmp_path / "out", progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB; the test model takes 6."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        yield None
        return
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@ORBAX_THREADS
def test_a_disk_that_fills_up_while_writing(small_disk, llama_dir, tmp_path, monkeypatch, capfd):
    """Where the space was there at the start: one error, nothing left, no other output."""
    monkeypatch.setattr(write, "_check_space", lambda *_: None)
    if small_disk is None:  # mounting is not allowed: the writer's own error, as Orbax passes it on
        small_disk = tmp_path

        def full(*_):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

        monkeypatch.setattr(converted_io, "save_tree", full)
    before = sorted(p.name for p in small_disk.iterdir())
    with pytest.raises(OSError, match="no space left on the disk") as caught:
        convert.convert(llama_dir, small_disk / "out", progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in small_disk.iterdir()) == before
    assert capfd.readouterr().err == ""


def resize(disk: Path, kilobytes: int) -> None:
    command = ["mount", "-o", f"remount,size={kilobytes}k", str(disk)]
    subprocess.run(command, check=True)


@pytest.fixture
def on_disk(small_disk, make_tiny_llama, tmp_path, monkeypatch, capfd):
    """Convert onto a file system of so many kilobytes; returns the status and what was said."""
    if small_disk is None:
        pytest.skip("mounting is not allowed")
    monkeypatch.setattr(write, "_check_space", lambda *_: None)
    monkeypatch.setattr(converted_io, "_WAIT_SECONDS", 0.1)
    source = make_tiny_llama(tmp_path / "hf", max_position_embeddings=64)

    def run(kilobytes: int) -> tuple[int, list[str]]:
        resize(small_disk, kilobytes)
        status = cli.main(["convert", str(source), str(small_disk / "out"), "--draft", "rtn"])
        said = capfd.readouterr().err.replace("\r", "\n").splitlines()
        return status, [line for line in said if line.strip() and "reading:" not in line]

    return run


@ORBAX_THREADS
def test_a_disk_that_fills_up_at_any_moment_is_one_line(on_disk, small_disk):
    """Tokenizer, draft, weights, header; each array of it."""
    used = 0
    for kilobytes in range(4, 2048, 40):
        status, said = on_disk(kilobytes)
        if status == 0:
            used = kilobytes
            break
        words = f"no space left on the disk of '{small_disk / 'out'}'; nothing was left behind"
        assert (status, said) == (1, [f"quantspec: error: {words}"])
        assert list(small_disk.iterdir()) == []
    assert used > 20 * 40, "twenty sizes at least are too small"
    assert [p.name for p in small_disk.iterdir()] == ["out"]
    assert convert.open_source(small_disk / "out").load_draft() is not None


def test_a_disk_that_fills_up_in_a_calibration_leaves_its_layers(calibrating, tmp_path, capfd):
    def full(resume):
        raise OSError(errno.ENOSPC, "No space left on device", str(resume / "block-1.npz"))

    layers = tmp_path / ".out.calibration"
    words = f"the calibrated layers are kept in {layers}: the same command goes on after them"
    with pytest.raises(OSError, match=re.escape(words)) as caught:
        calibrating(full)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == [layers.name]
    assert "kept" not in capfd.readouterr().err, "the error says it"
    calibrating(progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Interruption.


@pytest.fixture
def strikes_at(monkeypatch, interruptible):
    """Lets a signal come at a moment of the next conversion."""

    def at(moment: str, strike: Callable[[], None]) -> None:
        save, mkdir, rmtree = converted_io.save_tree, Path.mkdir, shutil.rmtree

        def slow(directory, *args):
            left = sorted(p.suffix for p in directory.parents[1].iterdir())
            assert left == [".claim", ".partial"]
            threading.Timer(0.1, strike).start()
            save(directory, *args)
            time.sleep(60)

        def made(path, *args, **more):
            mkdir(path, *args, **more)
            if path.name == "out":
                strike()

        def removing(directory, **more):
            if Path(directory).exists():
                strike()
            rmtree(directory, **more)

        name, target, instead = {
            "while arrays are written": ("save_tree", converted_io, slow),
            "when its name is taken": ("mkdir", Path, made),
            "while the old one is removed": ("rmtree", shutil, removing),
        }[moment]
        monkeypatch.setattr(target, name, instead)

    return at


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("while arrays are written", []),
        ("when its name is taken", ["out"]),
        ("while the old one is removed", ["out"]),
    ],
)
def test_an_interrupt_leaves_nothing_or_all(
    moment, left, number, status, llama_dir, tmp_path, strikes_at
):
    options = []
    if moment == "while the old one is removed":
        (tmp_path / "out").mkdir()
        options = ["--overwrite"]
    strikes_at(moment, functools.partial(os.kill, os.getpid(), number))
    assert cli.main(["convert", str(llama_dir), str(tmp_path / "out"), *options]) == status
    assert [p.name for p in tmp_path.iterdir()] == left
    for out in tmp_path.iterdir():
        assert isinstance(convert.open_source(out), ConvertedCheckpoint)


def test_files_that_were_on_their_way_when_a_save_failed_are_removed(
    tmp_path, monkeypatch, interruptible
):
    """TensorStore makes their directories again, for as long as its threads run."""
    directory = tmp_path / "weights"

    def late():
        for _ in range(3):
            time.sleep(0.15)
            (directory / "d").mkdir(parents=True, exist_ok=True)

    writer = threading.Thread(target=late)

    def fails(write):
        writer.start()
        _thread.interrupt_main()
        time.sleep(0.1)
        raise OSError("an array")

    monkeypatch.setattr(converted_io, "_quietly", fails)
    with pytest.raises(KeyboardInterrupt):
        converted_io.save_tree(directory, {"a": np.zeros(1)})
    assert not writer.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_what_orbax_leaves_behind_says_nothing_later(monkeypatch):
    """Nor does that hide what others leave."""
    said: list = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(converted_io.OrbaxError, match="an array"):
        converted_io._quietly(lambda: int("an array"))
    files = ("/lib/orbax/checkpoint/a.py", "/lib/other/a.py")
    left = [
        types.SimpleNamespace(
            object=types.SimpleNamespace(cr_code=types.SimpleNamespace(co_filename=x))
        )
        for x in files
    ]
    for unraisable in [*left, types.SimpleNamespace(object=None)]:
        sys.unraisablehook(unraisable)
    assert [getattr(x.object, "cr_code", None) for x in said] == [left[1].object.cr_code, None]


# Progress and memory.


def test_progress_goes_to_standard_error(llama_dir, tmp_path, capfd):
    convert.convert(llama_dir, tmp_path / "loud")
    loud = capfd.readouterr()
    assert "reading: 100%" in loud.err
    assert loud.out == ""
    convert.convert(llama_dir, tmp_path / "silent", progress=False)
    assert capfd.readouterr() == ("", "")


def held_bytes(monkeypatch, owner, name: str, shapes: set[tuple[int, ...]]) -> list[int]:
    """After each call of a function, the bytes of the arrays of these shapes that have come to be
    since; two that share their memory count once."""
    function, found, before = getattr(owner, name), [], jax.live_arrays()
    known = {x.unsafe_buffer_pointer() for x in before if x.shape in shapes}

    def counted(*args, **options):
        made = function(*args, **options)
        alive = (x for x in jax.live_arrays() if x.shape in shapes)
        sizes = {x.unsafe_buffer_pointer(): x.nbytes for x in alive}
        found.append(sum(size for at, size in sizes.items() if at not in known))
        return made

    monkeypatch.setattr(owner, name, counted)
    return found


# VmHWM rather than getrusage: the latter begins at the parent's peak.
MEASURE = """
import sys
from convert import convert
out = convert(sys.argv[1], sys.argv[2], progress=False)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def write_model_of_zeros(directory: Path, config: dict) -> Path:
    """A Hugging Face directory in bfloat16, written a tensor at a time."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    specs = parameter_shapes(parse_hf_config(config))
    entries, end = {}, 0
    for path, spec in specs.items():
        shape = spec.shape[::-1] if path.endswith(".kernel") else spec.shape
        entries[hf_name(path)] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": (end, end := end + 2 * spec.size),
        }
    header = json.dumps(entries).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for spec in specs.values():
            stream.write(bytes(2 * spec.size))
    return directory


def peak_bytes(source: Path, out: Path) -> int:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(out)],
        capture_output=True,
        text=True,
        check=True,
        # glibc gives freed memory back at once: what it keeps differs from run to run.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )
    return int(result.stdout)


@pytest.mark.parametrize(
    ("again", "draft"),
    [(False, DraftConfig(bits=8, layers="*.down", lm_head_bits=4)), (True, None)],
)
def test_arrays_are_read_in_turn(again, draft, llama_dir, tmp_path, monkeypatch):
    """When one is read, at most the one before it is still there; a draft reads each once more."""
    source = convert.convert(llama_dir, tmp_path / "one", progress=False) if again else llama_dir
    monkeypatch.setattr(deferred, "BATCH_BYTES", 1)
    read, alive, most = sources.Checkpoint.read, set(), []

    def counted(self, path, dtype):
        array = read(self, path, dtype)
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        most.append(len(alive))
        return array

    monkeypatch.setattr(sources.Checkpoint, "read", counted)
    monkeypatch.setattr(sources.Checkpoint, "load", lambda *_, **__: pytest.fail("read them all"))
    out = convert.convert(source, tmp_path / "out", draft=draft, progress=False)
    arrays = len(parameter_shapes(convert.open_source(out).config))
    assert len(most) == arrays + (0 if draft is None else 2 + 1)
    assert max(most) <= 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(tmp_path):
    """Beyond what a tiny model takes: the largest array, and its bytes on the way to the disk."""
    config = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 1024,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
    }
    tiny = write_model_of_zeros(tmp_path / "tiny", config)
    base = peak_bytes(tiny, tmp_path / "tiny-out")
    config |= {"vocab_size": 50_000, "intermediate_size": 14336, "num_hidden_layers": 2}
    large = write_model_of_zeros(tmp_path / "large", config)
    peak = peak_bytes(large, tmp_path / "large-out")
    size = 2 * convert.open_source(tmp_path / "large-out").parameter_count
    largest = 2 * 50_000 * 1024
    assert size > 3.5 * largest
    print(base, peak, size)
    assert peak - base <= 2.5 * largest
