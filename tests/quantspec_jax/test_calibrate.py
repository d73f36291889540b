"""Calibrated weights: less error than rounding, the same layout, the target's output."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCABULARY, decode, new_tokens, program, prompts, start, tiny_model

from pallas_kernels.int4_matmul.xla import dequantize
from quantspec_jax.weights.calibrate import (
    calibrate,
    calibration_tokens,
    gptq,
    head,
    programs,
    resume,
    streams,
)
from quantspec_jax.weights.entries import merge, quantize_params
from quantspec_jax.weights.formats import DraftConfig, WeightFormat
from quantspec_jax.weights.rounding import quantize_linear
from quantspec_jax.weights.sizes import bits_per_weight

UNIFORM = DraftConfig(group_size=32, method="gptq")
MIXED = DraftConfig(group_size=32, method="gptq", average_bits=6.5)
FORMATS = (
    WeightFormat(4, 32),
    WeightFormat(4, 40),  # the last group is shorter
    WeightFormat(4, 32, symmetric=True),
    WeightFormat(8, 32),
    WeightFormat(8, 48, symmetric=True),
)

quantize = jax.jit(gptq.quantize, static_argnames="stored")


def correlated(tokens: int = 512, kin: int = 96, seed: int = 0) -> jax.Array:
    """Inputs [tokens, Kin] that share directions, some of them much larger than others."""
    keys = jax.random.split(jax.random.key(seed), 3)
    spread = jnp.exp(jax.random.normal(keys[1], (1, kin)))
    mix = jax.random.normal(keys[0], (kin // 2, kin)) * spread
    return jax.random.normal(keys[2], (tokens, kin // 2)) @ mix


def restored(entry, kin: int) -> jax.Array:
    return sum(dequantize(part)[:kin] for part in entry.values())


def tokens(chunks: int = 3, length: int = 160) -> np.ndarray:
    """Random tokens; the length is no multiple of a tile."""
    return np.random.default_rng(5).integers(0, VOCABULARY, (chunks, length)).astype(np.int32)


@functools.cache
def calibrated(draft: DraftConfig):
    """(draft, entries) of the tiny model."""
    config, params, _ = tiny_model()
    return calibrate(config, params, tokens(), draft)


@pytest.mark.parametrize("stored", FORMATS)
def test_less_output_error_than_round_to_nearest(stored):
    x, fresh = correlated()[:256], correlated()[256:]
    kernel = jax.random.normal(jax.random.key(1), (96, 40))
    gram = x.T @ x
    entry = quantize(kernel, gram, gptq.factorize(gram), stored)
    plain = quantize_linear(kernel, stored)

    def error(entry) -> float:
        return float(jnp.sum((fresh @ (restored(entry, 96) - kernel)) ** 2))

    assert error(entry) < (0.6 if stored.bits == 4 else 0.9) * error(plain)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), entry) == jax.tree.map(
        lambda a: (a.shape, a.dtype), plain
    )


def test_channels_are_taken_from_the_largest_on_whatever_their_order():
    x = correlated()
    kernel = jax.random.normal(jax.random.key(1), (96, 8))
    order = gptq.factorize(x.T @ x).order
    assert np.all(np.diff(np.diag(x.T @ x)[order]) <= 0)
    # One group: moving the channels moves the result, nothing else changes.
    moved = np.random.default_rng(0).permutation(96)
    stored = WeightFormat(4, 96)

    def rounded(x, kernel):
        gram = x.T @ x
        return restored(quantize(kernel, gram, gptq.factorize(gram), stored), 96)

    np.testing.assert_allclose(
        rounded(x[:, moved], kernel[moved]), rounded(x, kernel)[moved], atol=1e-5
    )


def test_what_the_inputs_lack_is_made_good():
    x = correlated()
    wrong = x + 0.3 * x @ jax.random.normal(jax.random.key(3), (96, 96)) / 10
    kernel = jax.random.normal(jax.random.key(1), (96, 8))
    sums = gptq.Moments(wrong.T @ wrong, wrong.T @ (x - wrong))
    better = gptq.wanted(kernel, gptq.correction(sums), shared=True)
    assert jnp.sum((wrong @ better - x @ kernel) ** 2) < 0.5 * jnp.sum(
        (wrong @ kernel - x @ kernel) ** 2
    )
    direct = gptq.Moments(sums.gram, wrong.T @ ((x - wrong) @ kernel))
    np.testing.assert_allclose(
        better, gptq.wanted(kernel, gptq.correction(direct), shared=False), atol=1e-3
    )


@pytest.mark.parametrize(
    "draft",
    [
        UNIFORM,
        DraftConfig(group_size=24, method="gptq", layers="*.down,layers.0.q"),
    ],
)
def test_entries_are_laid_out_as_those_of_round_to_nearest(draft):
    _, params, _ = tiny_model()
    found, entries = calibrated(draft)

    def shapes(tree):
        return jax.tree.map(lambda a: (a.shape, a.dtype), tree)

    assert found == draft
    assert shapes(entries) == shapes(quantize_params(params, draft))


def test_mixed_precision_keeps_to_the_budget_and_uses_it():
    config, *_ = tiny_model()
    found, entries = calibrated(MIXED)
    assert 6 < bits_per_weight(config, found) <= 6.5
    eight = {name for name, stored in found.formats if stored.bits == 8}
    assert eight
    for name in eight:
        _, i, layer = name.split(".")
        assert "residual" in entries["layers"][i][layer]


def tied_model():
    """(config, params) of the tiny model without an lm_head of its own."""
    config, params, _ = tiny_model()
    without = {name: node for name, node in params.items() if name != "lm_head"}
    return dataclasses.replace(config, tie_embeddings=True), without


@pytest.fixture
def last_hidden(monkeypatch):
    """The streams that lm_head was calibrated on, once it is."""
    seen, moments = [], streams.input_moments

    def noted(config, norm, hidden):
        seen[:] = [streams._norm(norm, hidden, config)]
        return moments(config, norm, hidden)

    monkeypatch.setattr(streams, "input_moments", noted)
    return seen


@pytest.mark.parametrize("tied", [True, False])
def test_lm_head_says_what_the_target_s_does(tied, last_hidden, monkeypatch):
    """Better than one that is rounded to nearest, on the draft's hidden states."""
    config, params = tied_model() if tied else tiny_model()[:2]
    draft = dataclasses.replace(UNIFORM, bits=None, group_size=16, lm_head_bits=4)
    assert config.tie_embeddings == tied
    monkeypatch.setattr(head, "PART", config.hidden_size * 40)  # of 97 columns
    _, entries = calibrate(config, params, tokens(), draft)
    kernel = params["embedding"].T if tied else params["lm_head"]["kernel"]
    plain = quantize_params(params, draft)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (entries, plain))
    assert shapes[0] == shapes[1]
    (hidden,) = last_hidden

    def error(entries) -> float:
        made = hidden.draft @ restored(entries["lm_head"], len(kernel))
        return float(jnp.sum((made - hidden.target @ kernel) ** 2))

    assert error(entries) < 0.7 * error(plain)


def test_an_interrupted_lm_head_goes_on(tmp_path, monkeypatch):
    """It is made in parts of the vocabulary, the last of which overlap, and is that of one part."""
    config, params, _ = tiny_model()
    draft = dataclasses.replace(UNIFORM, bits=None, group_size=16, lm_head_bits=4)
    _, whole = calibrate(config, params, tokens(), draft)
    monkeypatch.setattr(head, "PART", config.hidden_size * 40)
    _, expected = calibrate(config, params, tokens(), draft)
    packed = (x["lm_head"]["kernel"].packed for x in (whole, expected))
    np.testing.assert_array_equal(*packed)
    make, made = head._part, []

    def interrupted(*args, **options):
        made.append(args[1])
        if len(made) == 2:
            raise KeyboardInterrupt
        return make(*args, **options)

    monkeypatch.setattr(head, "_part", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) if len(made) < 2 else contextlib.nullcontext():
            _, entries = calibrate(config, params, tokens(), draft, resume=tmp_path)
    assert [int(begin) for begin in made] == [0, 33, 33, 66]  # the first part was kept
    jax.tree.map(np.testing.assert_array_equal, entries, expected)
    monkeypatch.setattr(head, "_part", lambda *_, **__: pytest.fail("all were kept"))
    _, again = calibrate(config, params, tokens(), draft, resume=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_an_interrupted_calibration_goes_on(tmp_path, monkeypatch):
    config, params, _ = tiny_model()
    draft, expected = MIXED, calibrated(MIXED)
    solve, solved = gptq.factorize, []

    def interrupted(gram):
        solved.append(gram.shape)
        if len(solved) == 6:  # in the second block of two, of four solutions each
            raise KeyboardInterrupt
        return solve(gram)

    monkeypatch.setattr(gptq, "factorize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(config, params, tokens(), draft, resume=tmp_path)
    (tmp_path / "block-1.partial").write_bytes(b"half")
    found, entries = calibrate(config, params, tokens(), draft, resume=tmp_path)
    assert len(solved) == 6 + 4  # the first block was not solved again
    assert found == expected[0]
    jax.tree.map(np.testing.assert_array_equal, entries, expected[1])
    again = calibrate(config, params, tokens(), draft, resume=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again[1], expected[1])
    other = dataclasses.replace(draft, symmetric=True)
    with pytest.raises(ValueError, match="holds another calibration"):
        calibrate(config, params, tokens(), other, resume=tmp_path)
    changed = params | {"embedding": params["embedding"] * 2}
    with pytest.raises(ValueError, match="holds another calibration"):
        calibrate(config, changed, tokens(), draft, resume=tmp_path)


@functools.cache
def block_of_entries():
    kernel = jax.random.normal(jax.random.key(1), (64, 40))
    return {"q": quantize_linear(kernel, WeightFormat(4, 32))}


def kept(directory, draft=UNIFORM):
    """The context of this calibration's directory."""
    config, params, _ = tiny_model()
    return resume.finished_blocks(directory, config, params, jnp.zeros((1, 4), jnp.int32), draft)


def test_a_damaged_block_is_as_good_as_none_and_named(tmp_path, capsys):
    """Wherever a bit flips, a byte comes or the file ends."""
    path = tmp_path / "block-3.npz"
    with kept(tmp_path) as finished:
        finished.save("block-3", block_of_entries())
        whole, expected = path.read_bytes(), finished.load("block-3")
        jax.tree.map(np.testing.assert_array_equal, expected["q"], block_of_entries()["q"])
        assert capsys.readouterr().err == ""
        damaged = []
        for at in range(0, len(whole), 41):
            flipped = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
            inserted = whole[:at] + b"\0" + whole[at:]
            damaged += [flipped, inserted, whole[:at]]
        noticed = 0
        for data in damaged:
            path.write_bytes(data)
            found, said = finished.load("block-3"), capsys.readouterr().err
            if found is None:
                assert re.fullmatch(rf"quantspec: {path} is damaged .* block 3 .*again\n", said)
                noticed += 1
            else:  # a date, say
                jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert noticed > 0.9 * len(damaged) > 100


def test_a_damaged_signature_begins_anew(tmp_path, capsys):
    with kept(tmp_path) as finished:
        finished.save("block-0", block_of_entries())
        finished.formats(lambda: {"layers.0.q": WeightFormat(8, 32)})
    with kept(tmp_path) as finished:
        assert finished.load("block-0") is not None
        assert finished.formats(lambda: pytest.fail("kept")) == {"layers.0.q": WeightFormat(8, 32)}
    for name, act in (("formats.json", "chosen again"), ("signature.json", "calibrated again")):
        path = tmp_path / name
        path.write_text(path.read_text().replace("8", "9", 1))
        capsys.readouterr()
        with kept(tmp_path) as finished:
            assert (finished.load("block-0") is None) == (name == "signature.json")
            other = {"layers.0.q": WeightFormat(4, 32)}
            assert finished.formats(lambda found=other: found) == other
        said = capsys.readouterr().err
        assert str(path) in said
        assert act in said
        assert said.count("\n") == 1


def test_a_directory_has_one_calibration_at_a_time(tmp_path):
    (tmp_path / ".block-0.12-34.partial.npz").write_text("half")
    with kept(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == ["claim", "signature.json"]
        words = rf"calibration directory is '{tmp_path}', which process \d+ on .* is writing"
        with pytest.raises(ValueError, match=words), kept(tmp_path):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["signature.json"]
    with pytest.raises(ValueError, match="holds another calibration"), kept(tmp_path, MIXED):
        pass


def test_blocks_after_the_first_compile_nothing(monkeypatch, caplog):
    """And the first few programs: on a GPU a calibration's time is that of compiling them."""
    config, params, _ = tiny_model()
    compiled = []

    keep = resume.Finished.save

    def save(self, name, entries):
        words = [record.getMessage() for record in caplog.records]
        compiled.append(sum("Finished XLA compilation" in line for line in words))
        keep(self, name, entries)

    monkeypatch.setattr(resume.Finished, "save", save)
    with jax.log_compiles():
        calibrate(config, params, tokens(2, 144), DraftConfig(group_size=16, method="gptq"))
    first, second = compiled
    assert 10 < first <= 30  # four roundings, the two streams' stages, moments and solutions
    assert second == first


@pytest.mark.parametrize("name", sorted(programs.GPU_OPTIONS))
def test_xla_knows_the_options_of_a_calibration_s_programs(name):
    assert programs.knows(name, programs.GPU_OPTIONS[name])
    assert not programs.knows(f"{name}_of_old", programs.GPU_OPTIONS[name])


def test_the_output_is_the_target_s_own():
    _, params, _ = tiny_model()
    own = merge(params, calibrated(MIXED)[1])
    rows, lengths = prompts([21, 40]), [21, 40]
    speculative, plain = program(3), program(0, width=4)
    drafted = decode(speculative, start(speculative, rows, lengths, 60), draft=own)
    alone = decode(plain, start(plain, rows, lengths, 60), draft={})
    assert new_tokens(drafted) == new_tokens(alone)


def test_activations_that_are_not_finite_name_the_layer():
    config, params, _ = tiny_model()
    block = params["layers"]["1"]
    broken = merge(params, {"layers": {"1": {"mlp_norm": block["mlp_norm"].at[3].set(jnp.nan)}}})
    with pytest.raises(ValueError, match=r"layers\.1\.gate, layers\.1\.up: .*not finite"):
        calibrate(config, broken, tokens(), UNIFORM)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros(5, np.int32), r"\[chunks, length\]"),
        (np.zeros((1, 5)), "integers"),
        (np.full((1, 5), VOCABULARY), f"0 to {VOCABULARY - 1}"),
        (np.zeros((1, 4097), np.int32), "calibration length is 4097"),
    ],
)
def test_refuses_tokens(given, words):
    config, params, _ = tiny_model()
    with pytest.raises(ValueError, match=words):
        calibrate(config, params, given, DraftConfig(method="gptq"))


def test_refuses_a_budget_below_the_plain_format():
    config, params, _ = tiny_model()
    draft = DraftConfig(group_size=32, method="gptq", average_bits=4.1)
    with pytest.raises(ValueError, match=r"average_bits is 4.1; allowed: 4\.\d+ or more"):
        calibrate(config, params, tokens(), draft)


def test_calibration_tokens(byte_level_tokenizer):
    text = "The cache is stored once, in two planes of four bits each. " * 40
    found = calibration_tokens(byte_level_tokenizer, text, chunks=3, length=50)
    assert (found.shape, found.dtype) == ((3, 50), np.int32)
    whole = byte_level_tokenizer(text)["input_ids"]
    assert found[0].tolist() == whole[:50]
    assert found[-1].tolist() == whole[-50:]
    default = calibration_tokens(byte_level_tokenizer, chunks=4, length=256)
    assert len(np.unique(default)) > 50
    with pytest.raises(ValueError, match=r"tokens'; allowed: 99999 or more"):
        calibration_tokens(byte_level_tokenizer, text, chunks=1, length=99999)
    with pytest.raises(ValueError, match="tokenizer is None"):
        calibration_tokens(None, text)
