"""AQUA-KV's predictors, learned once and stored with a checkpoint."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import quantspec_jax as qs
from quantspec_jax import cli, evaluate
from quantspec_jax.evaluate import learned
from quantspec_jax.methods import Aqua
from quantspec_jax.stored_kv import StoredKV
from quantspec_jax.weights.calibrate import text as calibration_text
from quantspec_jax.weights.formats import DraftConfig

WORDS = "The cache is stored once, in two planes. Straße, größer, 漢字. " * 60


@pytest.fixture
def short_text(monkeypatch):
    """2 × 64 tokens are enough here."""
    monkeypatch.setattr(calibration_text.calibration_tokens, "__kwdefaults__", {
        "chunks": 2, "length": 64
    })  # fmt: skip
    monkeypatch.setattr(calibration_text, "LENGTH", 64)


@pytest.fixture(scope="module")
def model(tiny_llama_dir):
    return qs.load(tiny_llama_dir, dtype="float32", draft=DraftConfig(bits=None))


def data_bytes(path: Path) -> int:
    """Of a safetensors file without its header, whose length depends on the digits of checksums."""
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    return path.stat().st_size - 8 - header


def test_what_is_stored_is_what_eval_would_learn(
    short_text, tiny_llama_dir, tmp_path, model, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(WORDS)
    arguments = ["convert", str(tiny_llama_dir), "out", "--dtype", "float32", "--kv", "aqua"]
    assert cli.main([*arguments, "--kv-bits", "3", "--kv-text", "words.txt"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "words.txt"]
    kv, found = convert.open_source("out").load_kv()
    assert (kv, len(found)) == (StoredKV("aqua", 3), model.config.num_layers)
    assert [x.shape[0] for x in found[0]] == [1, 1]  # means, that nothing predicts
    tokens = calibration_text.calibration_tokens(model.tokenizer, WORDS)
    expected = learned.fitted(model, {"aqua-3": Aqua(3)}, lambda: tokens, 64)["aqua-3"]
    for one, other in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)

    run = ["eval", "codecs", "--model", "out", "--text", "words.txt", "--context", "512"]
    run += ["--codec", "aqua-3", "--json", "--dtype", "float32"]
    capsys.readouterr()
    assert cli.main(run) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["stored"] == ["aqua-3"]
    chosen = evaluate.codecs(model, WORDS, ["aqua-3"], context=512, stored={"aqua-3": expected})
    assert printed["rows"] == chosen["rows"]

    run = ["generate", "--model", "out", "--prompt", "The cache", "--mode", "autoregressive"]
    assert cli.main([*run, "--kv", "aqua", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv"] == "aqua"

    run = ["generate", "--model", "out", "--prompt", WORDS[:1200], "--mode", "autoregressive"]
    run += ["--max-new-tokens", "1", "--json", "--cache"]
    sizes = []
    for more in (["a"], ["b", "--cache-format", "aqua"], ["b"], ["b", "--cache-format", "planes"]):
        assert cli.main([*run, *more]) == 0
        cached = json.loads(capsys.readouterr().out)["cached_tokens"]
        assert (cached > 0) == (len(sizes) > 1)
        sizes.append(data_bytes(tmp_path / more[0]))
    assert sizes[1] == sizes[2] < sizes[0] / 4  # float32; a file stays in its format
    assert sizes[0] == sizes[3]

    damaged = next(p for p in (tmp_path / "out" / "kv").rglob("0") if p.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(ValueError, match="is damaged"):
        convert.open_source("out").load_kv()


def test_an_interrupted_calibration_goes_on(model, tmp_path, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 48))
    whole = learned.calibrated(model.config, model.params, Aqua(2), tokens)
    blocks = []
    inner = learned._plain_block

    def counted(*args, **options):
        blocks.append(1)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return inner(*args, **options)

    monkeypatch.setattr(learned, "_plain_block", counted)
    kept = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        learned.calibrated(model.config, model.params, Aqua(2), tokens, resume=kept)
    found = learned.calibrated(model.config, model.params, Aqua(2), tokens, resume=kept)
    assert len(blocks) == 1 + model.config.num_layers  # the first layer was not done again
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    with pytest.raises(ValueError, match=r"layers\.npz is 'another calibration'; allowed: one of"):
        learned.calibrated(model.config, model.params, Aqua(3), tokens, resume=kept)
    (kept / "layers.npz").write_bytes(b"PK\3\4 cut off")
    learned.calibrated(model.config, model.params, Aqua(3), tokens, resume=kept)


def test_numbers_that_are_none_are_named(model):
    broken = jax.tree.map(lambda x: x, model.params)
    broken["layers"]["1"]["v"]["kernel"] = jnp.full_like(broken["layers"]["1"]["v"]["kernel"], 3e38)
    bad = qs.Model(model.config, broken, draft=DraftConfig(bits=None))
    with pytest.raises(ValueError, match="layer 1 is 'NaN or infinite'"):
        learned.calibrated(bad.config, bad.params, Aqua(2), np.ones((1, 40), np.int64))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-bits", "2"], "--kv-bits cannot go with a conversion that stores none: name --kv"),
        (["--kv", "aqua", "--kv-bits", "5"], "invalid choice: 5"),
        (["--kv", "kivi"], "invalid choice: 'kivi'"),
        (["--kv", "aqua", "--kv-text", "short.txt"], "calibration text is"),
        (["--kv", "aqua", "--kv-text", "missing.txt"], "missing.txt"),
    ],
)
def test_wrong_options_leave_nothing(options, words, tiny_llama_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Too short.")
    assert cli.main(["convert", str(tiny_llama_dir), "out", *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_a_stored_codec_is_one_that_there_is():
    for wrong in ({"codec": "zip"}, {"bits": 5}, {"bits": 2, "more": 1}):
        with pytest.raises(ValueError, match="kv"):
            StoredKV.from_dict(wrong)
    assert StoredKV.from_dict(StoredKV("aqua", 4).to_dict()) == StoredKV("aqua", 4)
    assert StoredKV().name in evaluate.codecs.__globals__["METHODS"]
