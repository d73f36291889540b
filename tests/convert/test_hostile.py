"""Files from strangers: each is refused in one line that names file and key, at once.

The fuzzer (tests/fuzz) damages at random; here is what a person thought of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeds

import convert
import quantspec_jax as qs
from convert.files.safetensors import read_safetensors
from quantspec_jax import cli
from quantspec_jax.checks import require
from quantspec_jax.commands import terminal
from quantspec_jax.files import open_file, read_json
from quantspec_jax.models.config import ModelConfig, RopeConfig
from quantspec_jax.text import expressions, templates
from quantspec_jax.text.chat import chat_text
from quantspec_jax.text.prompts import encode
from quantspec_jax.text.tokenizer import BYTE_PAIRS, gguf_tokenizer, saved_tokenizer

NOT_NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 0.0, True, "1", [1], 10**400, -(10**400)]


def refusal(path: Path, *words: str, seconds: float = 4.0) -> str:
    """The one line with which what is at `path` is refused. All words are in it."""
    start = time.process_time()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        load(path)
    assert time.process_time() - start < seconds
    line = terminal.describe(caught.value)
    assert terminal.status_of(caught.value) == 2
    assert str(path) in line
    for word in words:
        assert word in line
    return line


def load(path: Path) -> None:
    opened = convert.open_source(path)
    opened.check()
    _ = opened.tokenizer
    opened.load("float32")


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """What waits for ever is interrupted."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def hf(tmp_path) -> Callable[..., Path]:
    def make(changes: dict[str, Any] | None = None, **files: Any) -> Path:
        made = seeds.hugging_face("llama")
        made["config.json"] = json.dumps(json.loads(made["config.json"]) | (changes or {})).encode()
        return seeds.write(made | files, tmp_path / "hf")

    return make


@pytest.fixture
def gguf(tmp_path) -> Callable[..., Path]:
    """`changes`: metadata by key, as (type, value); None leaves it out."""

    def make(changes: dict[str, Any] | None = None, **options: Any) -> Path:
        parts = seeds.gguf_file("F32", **options)
        changes = dict(changes or {})
        kept = [entry for entry in parts.metadata if entry[0] not in changes]
        parts.metadata = kept + [(k, *v) for k, v in changes.items() if v is not None]
        return seeds.write(parts, tmp_path / "gguf")

    return make


@pytest.fixture(scope="module")
def converted_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    source = seeds.write(seeds.hugging_face("llama"), folder / "hf")
    draft = qs.DraftConfig(group_size=16)
    return convert.convert(source, folder / "out", draft=draft, progress=False)


@pytest.fixture
def converted(converted_once) -> Iterator[Callable[..., Path]]:
    """The checkpoint with changes of an object of its config.json, of which `keys` lead to it."""
    path = converted_once / "config.json"
    whole = path.read_text()

    def change(changes: dict[str, Any], *keys: str) -> Path:
        values = json.loads(whole)
        place = values
        for key in keys:
            place = place[key]
        place.update(changes)
        path.write_text(json.dumps(values))
        return converted_once

    yield change
    path.write_text(whole)


# Sizes are bounded by what the tensors can fill.


@pytest.mark.parametrize("layers", [2**31, 2**31 - 1, 9_999, 3])
def test_more_layers_than_there_are_tensors_for(layers, hf, gguf, converted):
    refusal(hf({"num_hidden_layers": layers}), "layers")
    refusal(
        gguf({"llama.block_count": (seeds.U32, layers)}), "blk" if layers == 3 else "block_count"
    )
    refusal(converted({"num_layers": layers}, "model"), "layers")


def test_layers_are_counted_before_a_draft_is_thought_of(hf, capsys):
    """Names of a draft's layers are made from the configuration alone."""
    source = hf({"num_hidden_layers": 2**31 - 1})
    start = time.process_time()
    with pytest.raises(ValueError, match=r"num_hidden_layers in .*config\.json is 2147483647"):
        qs.load(str(source), "float32", qs.DraftConfig())
    assert cli.main(["info", str(source)]) == 2
    assert time.process_time() - start < 4
    assert capsys.readouterr().err.count("\n") == 1


def test_a_header_with_many_names_takes_linear_time(tmp_path):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    entries = [f'"{i}":{entry}' for i in range(80_000)]
    for names, words in ((entries, None), ([*entries, f'"7":{entry}'], "duplicate tensor 7")):
        path = _raw(tmp_path / "many.safetensors", "{" + ",".join(names) + "}")
        start = time.process_time()
        if words is None:
            assert len(read_safetensors(path)) == len(entries)
        else:
            with pytest.raises(ValueError, match=words):
                read_safetensors(path)
        assert time.process_time() - start < 4


@pytest.mark.parametrize(
    "shape", [[1] * 450_000, [2**62] * 8, [2**64], [10**400], [-1], [True], [1.0], 3, "1", None]
)
def test_dimensions_are_few_and_whole(shape, tmp_path):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
    path = _raw(tmp_path / "a.safetensors", json.dumps({"w": entry}), b"\0" * 4)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"a\.safetensors.*tensor w"):
        read_safetensors(path)
    assert time.process_time() - start < 1


def _raw(path: Path, header: str, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


@pytest.mark.parametrize("number", [2**32 - 1, 100_000, 2**31])
def test_parts_of_a_file_are_not_made_up(number, gguf):
    refusal(gguf({"split.count": (seeds.U32, number)}), "split.count")


# Every number of a configuration is checked.


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_what_is_no_positive_number_is_refused(value, hf, converted):
    for key in ("rms_norm_eps", "rope_theta"):
        source = hf({key: value})
        refusal(source, f"{key} in {source}/config.json is ")
        _remove(source)
    refusal(converted({"rms_norm_eps": value}, "model"), "rms_norm_eps is ")
    refusal(converted({"theta": value}, "model", "rope"), "rope theta is ")
    yarn = {**seeds.YARN, "attention_factor": value}
    source = hf({"rope_scaling": yarn})
    refusal(source, "attention_factor in ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_in_gguf_metadata_too(value, gguf):
    for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
        path = gguf({f"llama.{key}": (seeds.F32, value)})
        refusal(path, f"llama.{key} in {path} is ")
        path.unlink()
        path.parent.rmdir()


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (seeds.LLAMA3 | {"low_freq_factor": 4.0}, "high_freq_factor is 4.0"),
        (seeds.LLAMA3 | {"high_freq_factor": 0.5}, "high_freq_factor is 0.5"),
        (seeds.LLAMA3 | {"factor": math.nan}, "factor in"),
        (seeds.LLAMA3 | {"factor": "8"}, "factor in"),
        (seeds.YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        (seeds.YARN | {"beta_fast": 0.5}, "beta_fast is 0.5"),
        (seeds.YARN | {"beta_slow": [1]}, "beta_slow in"),
        (seeds.YARN | {"mscale": True}, "mscale in"),
        (seeds.YARN | {"truncate": 1}, "truncate in"),
        (seeds.YARN | {"factor": 1e300}, "factor in"),
        ({"rope_type": ["yarn"]}, "rope_type in"),
        ({"rope_type": "linear", "factor": 9e5}, "max_context is"),
        ({"rope_type": "dynamic", "factor": 9e5}, "max_context is"),
    ],
)
def test_a_scaling_that_divides_by_zero_or_overflows(scaling, words, hf):
    refusal(hf({"rope_scaling": scaling, "max_position_embeddings": 4096}), words)


def test_dynamic_scaling_whose_base_is_no_float32():
    rope = RopeConfig("dynamic", theta=1e30, factor=1e6, original_max_position=100)
    config = ModelConfig("llama", 8, 8, 8, 1, 1, 1, 4, 2**27)
    with pytest.raises(ValueError, match="the base of RoPE is no float32"):
        dataclasses.replace(config, rope=rope)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_types", 5),
        ("layer_types", [[1]]),
        ("sliding_window", "4096"),
        ("sliding_window", True),
        ("rope_theta", [1]),
        ("rope_theta", 10**400),
        ("rope_scaling", [1]),
        ("hidden_size", "32"),
        ("hidden_size", 32.0),
        ("hidden_size", True),
        ("vocab_size", 10**400),
        ("num_attention_heads", 0),
        ("num_attention_heads", [2]),
        ("max_position_embeddings", 2**31),
        ("max_window_layers", "x"),
        ("tie_word_embeddings", 1),
        ("model_type", ["llama"]),
        ("model_type", {}),
        ("eos_token_id", [[1]]),
        ("hidden_act", [1]),
        ("original_max_position_embeddings", 0),
    ],
)
def test_a_value_of_another_type_in_config_json(key, value, hf):
    source = hf({key: value})
    line = refusal(source, f"{key} in {source}/config.json is ", "; allowed: ")
    assert len(line) < 700


@pytest.mark.parametrize(
    ("key", "typed"),
    [
        ("general.architecture", (seeds.ARRAY, (seeds.STRING, ["llama"]))),
        ("general.alignment", (seeds.BOOL, True)),
        ("general.alignment", (10, 2**63)),
        ("split.count", (seeds.STRING, "1")),
        ("llama.rope.freq_base", (seeds.ARRAY, (seeds.F32, [1.0, 2.0]))),
        ("llama.rope.freq_base", (seeds.F64, 1e308)),
        ("llama.attention.head_count", (seeds.U32, 0)),
        ("llama.attention.head_count", (seeds.STRING, "2")),
        ("llama.attention.head_count_kv", (seeds.ARRAY, (seeds.STRING, ["1", "1"]))),
        ("llama.attention.sliding_window", (seeds.STRING, "4096")),
        ("llama.rope.scaling.type", (seeds.ARRAY, (seeds.U32, [1, 2]))),
        ("llama.rope.scaling.factor", (seeds.STRING, "4")),
        ("tokenizer.ggml.model", (seeds.ARRAY, (seeds.STRING, ["gpt2"]))),
        ("tokenizer.ggml.pre", (seeds.ARRAY, (seeds.STRING, ["qwen2"]))),
        ("tokenizer.ggml.tokens", (seeds.ARRAY, (seeds.U32, [1, 2]))),
        ("tokenizer.ggml.tokens", (seeds.ARRAY, (seeds.STRING, ["x" * 9000] * 48))),
        ("tokenizer.ggml.token_type", (seeds.U32, 1)),
        ("tokenizer.ggml.token_type", (seeds.ARRAY, (seeds.STRING, ["1"] * 48))),
        ("tokenizer.ggml.eos_token_id", (seeds.ARRAY, (seeds.U32, [1]))),
        ("tokenizer.ggml.bos_token_id", (seeds.F32, 1.0)),
        ("tokenizer.ggml.merges", (seeds.ARRAY, (seeds.U32, [1]))),
        ("tokenizer.ggml.merges", (seeds.STRING, "a b")),
        ("tokenizer.ggml.add_bos_token", (seeds.U32, 1)),
        ("tokenizer.chat_template", (seeds.U32, 1)),
        ("tokenizer.chat_template", (seeds.ARRAY, (seeds.STRING, ["x"]))),
    ],
)
def test_a_value_of_another_type_in_gguf_metadata(key, typed, gguf):
    path = gguf({key: typed})
    refusal(path, f"{key} in {path}", " is ", "; allowed: ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.rope.scaling.original_context_length": (seeds.STRING, "0")}, "original_context"),
        ({"llama.rope.scaling.factor": (seeds.F32, math.nan)}, "rope.scaling.factor"),
        ({"tokenizer.ggml.scores": (seeds.ARRAY, (seeds.F32, [math.nan] * 48))}, "scores"),
        ({"tokenizer.ggml.scores": (seeds.F32, 1.0)}, "scores"),
        ({"tokenizer.ggml.add_space_prefix": (seeds.STRING, "yes")}, "add_space_prefix"),
    ],
)
def test_in_other_keys_of_gguf_too(changes, words, gguf):
    refusal(gguf(changes, tokenizer="llama", **seeds.GGUF_YARN), words)


@pytest.mark.parametrize(
    ("changes", "keys", "words"),
    [
        ({"model": [1]}, (), "model in config.json is [1]"),
        ({"draft": 4}, (), "draft in config.json is 4"),
        ({"dtype": ["float32"]}, (), "dtype in config.json is"),
        ({"version": True}, (), "version in"),
        ({"draft_arrays": [1]}, (), "draft_arrays in config.json is [1]"),
        ({"draft_arrays": {"../../../etc": [[1], "float32"]}}, (), "../../../etc in config.json"),
        ({"draft_arrays": {"layers.0.q.order": [[2**40], "int32"]}}, (), "layers.0.q.order"),
        ({"draft_arrays": {"layers": [[1], "int32"]}}, (), "layers in config.json"),
        ({"layout_version": [1]}, (), "layout_version in"),
        ({"hidden_size": 32.0}, ("model",), "hidden_size is 32.0"),
        ({"qkv_bias": 0}, ("model",), "qkv_bias is 0"),
        ({"eos_ids": "12"}, ("model",), "eos_ids is '12'"),
        ({"eos_ids": [48]}, ("model",), "eos_ids is (48,)"),
        ({"sliding_window": "4096"}, ("model",), "sliding_window is '4096'"),
        ({"family": ["llama"]}, ("model",), "family is ['llama']"),
        ({"rope": 1}, ("model",), "rope is 1"),
        ({"type": []}, ("model", "rope"), "rope type is []"),
        ({"bits": True}, ("draft",), "draft bits is True"),
        ({"bits": [4]}, ("draft",), "draft bits is [4]"),
        ({"symmetric": 1}, ("draft",), "draft symmetric is 1"),
        ({"layers": 5}, ("draft",), "draft layers is 5"),
        ({"formats": [1]}, ("draft",), "draft formats is [1]"),
        ({"formats": {"layers.0.q": {"bits": "4"}}}, ("draft",), "draft bits is '4'"),
        ({"formats": {"layers.9.q": {}}}, ("draft",), "draft formats is ['layers.9.q']"),
    ],
)
def test_a_value_of_another_type_in_a_converted_directory(changes, keys, words, converted):
    refusal(converted(changes, *keys), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": ["gptq"]}, "quant_method in"),
        ({"bits": True}, "bits in"),
        ({"bits": [4]}, "bits in"),
        ({"group_size": True}, "group_size in"),
        ({"group_size": 10**400}, "group_size in"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format in"),
    ],
)
def test_a_value_of_another_type_in_a_quantization_config(changes, words, tmp_path):
    files = seeds.packed("gptq")
    values = json.loads(files["config.json"])
    values["quantization_config"] |= changes
    path = seeds.write(files | {"config.json": json.dumps(values).encode()}, tmp_path / "gptq")
    target = convert.open_source(seeds.write(seeds.hugging_face("llama"), tmp_path / "hf"))
    with pytest.raises(ValueError, match=rf"{words} {path} is .*; allowed: "):
        convert.open_draft(path, target.config)


# Texts that are hard on a parser.


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 100_000, '{"a":' * 50_000, "\xff", ""])
def test_a_text_that_is_no_json(text, hf):
    source = hf(**{"config.json": f'{{"model_type": {text}'.encode("latin-1")})
    refusal(source, "config.json is not JSON")


def test_a_number_of_5000_digits(hf):
    source = hf()
    config = source / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 48', f'"vocab_size": {"1" * 5000}'))
    refusal(source, "config.json is not JSON")


@pytest.mark.parametrize("length", [300, 5000])
def test_a_file_name_that_is_too_long(length, tmp_path):
    name = "x" * length
    files = seeds.hugging_face("mistral", shards=True)
    index = json.dumps({"weight_map": {"lm_head.weight": f"{name}.safetensors"}}).encode()
    source = seeds.write(files | {"model.safetensors.index.json": index}, tmp_path / "hf")
    refusal(source, "names xxx")
    for given in (name, f"~{name}", f"{name}/{name}", f"/{name}"):
        with pytest.raises((ValueError, ConnectionError)) as caught:
            convert.open_source(given)
        assert len(terminal.describe(caught.value)) < 700


def test_given_values_are_shown_short():
    for given in (
        10**4000,
        "x" * 10**6,
        [[1] * 1000] * 1000,
        {"a": "x" * 10**6},
        list(range(10**6)),
    ):
        with pytest.raises(ValueError, match="; allowed: less") as caught:
            require(False, "it", given, "less")
        assert len(str(caught.value)) < 10_000


def test_no_code_of_a_terminal_reaches_it():
    line = terminal.describe(ValueError("tensor \x1b[31mred\x07 größer"))
    assert line == r"tensor \x1b[31mred\x07 größer"


# Every byte of a GGUF file belongs to something.


def test_a_type_made_smaller_leaves_a_gap(tmp_path):
    for index in (0, -1):  # the last one leaves it at the end
        parts = seeds.gguf_file("F32")
        name, shape, _, content = parts.tensors[index]
        parts.tensors[index] = (name, shape, 1, content)  # F16
        path = seeds.write(parts, tmp_path / str(index))
        refusal(path, "is corrupt", "bytes after the last" if index else "belong to none")


def test_bytes_after_the_last_tensor(tmp_path):
    path = seeds.write(seeds.gguf_file("F32"), tmp_path / "gguf")
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 32)
    refusal(path, "32 bytes after the last tensor")
    path.write_bytes(whole[:-1])
    refusal(path, "is truncated")


def test_padding_after_the_last_tensor_may_be_there_or_not(tmp_path):
    """Some writers pad it as the others, some do not."""
    parts = seeds.gguf_file("F32", "qwen2")
    parts.tensors.sort(key=lambda tensor: tensor[0] != "token_embd.weight")
    assert parts.tensors[-1][0] != "token_embd.weight"
    parts.tensors.append(("rope_freqs.weight", (8,), 1, np.ones(8, np.float16).tobytes()))
    path = seeds.write(parts, tmp_path / "gguf")
    whole = path.read_bytes()
    convert.open_source(path).load("float32")
    path.write_bytes(whole[:-16])
    convert.open_source(path).load("float32")
    path.write_bytes(whole[:-17])
    refusal(path, "is truncated")


# Files that are none.


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "loop", "directory"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_only_regular_files_are_read(what, name, hf):
    source = hf()
    _put(source / name, what)
    with at_most(20), pytest.raises((ValueError, OSError)) as caught:
        load(source)
    assert terminal.status_of(caught.value) == 2
    assert str(source) in terminal.describe(caught.value)


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "loop"])
def test_only_a_regular_file_is_a_gguf_file(what, tmp_path):
    path = tmp_path / "model.gguf"
    path.touch()
    _put(path, what)
    with at_most(20), pytest.raises(ValueError, match=r"model\.gguf"):
        convert.open_source(path)
    with at_most(20), pytest.raises(ValueError, match=r"regular|opened"):
        open_file(path)


@pytest.mark.parametrize("what", ["pipe", "/dev/zero"])
@pytest.mark.parametrize(
    "name", ["config.json", "weights/_METADATA", "weights/final_norm/zarr.json", "draft/_sharding"]
)
def test_only_regular_files_of_a_converted_directory_are_read(what, name, converted_once, tmp_path):
    out = shutil.copytree(converted_once, tmp_path / "out")
    _put(out / name, what)
    with at_most(20), pytest.raises(ValueError, match=name.rpartition("/")[2]):
        qs.load(str(out), "float32")


def test_what_the_tokenizers_package_prints_is_no_result(hf, capfd):
    """An unknown key of an added token is noted on the process's own streams: a warning says it."""
    values = json.loads(seeds.tokenizer_files()["tokenizer.json"])
    values["added_tokens"][0]["colour"] = 1
    source = hf(**{"tokenizer.json": json.dumps(values).encode()})
    with contextlib.suppress(ValueError), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _ = convert.open_source(source).tokenizer
        assert any(str(source) in str(x.message) for x in said)
    os.write(1, b"alive")
    assert capfd.readouterr() == ("alive", "")


def test_a_json_file_has_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr("quantspec_jax.files.read_bytes.__defaults__", (10,))
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": 12345}')
    with pytest.raises(ValueError, match=r"size of .*config\.json"):
        read_json(path)


def _put(path: Path, what: str) -> None:
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.name if what == "loop" else what)


def _remove(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


# Panics of the tokenizers package.


def _tokenizer(**changes: Any) -> dict[str, bytes]:
    values = json.loads(seeds.tokenizer_files()["tokenizer.json"])
    model = values["model"] | changes.pop("model", {})
    return {"tokenizer.json": json.dumps(values | {"model": model} | changes).encode()}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"continuing_subword_prefix": "longer than every token"}},
        {"model": {"merges": [["longer than every token", "of all"]]}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
        {"decoder": {"type": "Strip", "content": "a", "start": 10**10, "stop": 1}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "none", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
)
def test_a_panic_is_one_line(changes, hf, capfd):
    source = hf(**_tokenizer(**changes))
    refusal(source, f"the tokenizer in {source} cannot be read: ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("index", [2**22, 2**31 - 1, 2**31])
@pytest.mark.parametrize("key", ["model", "added_tokens"])
def test_an_id_beyond_every_vocabulary_is_refused_before_ids_are_listed(key, index, hf, capfd):
    vocabulary = json.loads(seeds.tokenizer_files()["tokenizer.json"])["model"]["vocab"]
    token = {"id": index, "content": "new", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    changes = {"model": {"vocab": vocabulary | {"ab": index}}, "added_tokens": [token | flags]}
    source = hf(**_tokenizer(**{key: changes[key]}))
    named = "the id of 'ab'" if key == "model" else "added_tokens' id"
    refusal(source, f"{named} in {source}/tokenizer.json is {index}; allowed: an id below 4,194")
    assert capfd.readouterr() == ("", "")


def test_ids_may_have_gaps(hf):
    vocabulary = json.loads(seeds.tokenizer_files()["tokenizer.json"])["model"]["vocab"]
    load(hf(**_tokenizer(model={"vocab": vocabulary | {"ab": 2**22 - 1}})))


@pytest.mark.parametrize("merge", ["abcdefghijklmnop q", "a z", "a c", "a b ", "ab", " "])
def test_a_merge_of_what_are_no_tokens_is_named(merge, gguf, capfd):
    typed = (seeds.ARRAY, (seeds.STRING, ["a b", merge]))
    path = gguf({"tokenizer.ggml.merges": typed})
    refusal(path, f"tokenizer.ggml.merges in {path} is {merge!r}")
    assert capfd.readouterr() == ("", "")


# Chat templates.

GGUF_FILES = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.merges": ["a b"],
}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "seconds",
        ),
        ("{{ 'x' * 10 ** 10 }}", "MemoryError"),
        ("{{ '%10000000000d' % 1 }}", "MemoryError"),
        ("{{ 'x' * 10 ** 7 }}", "it renders 10,000,000 characters"),
        (
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
            "{% endfor %}{{ n.s }}",
            "MemoryError",
        ),
    ],
)
def test_a_template_has_bounded_time_and_size(template, words, monkeypatch):
    # What grows is ended by its memory, however slow the machine.
    monkeypatch.setattr(templates, "SECONDS", 2.0 if words == "seconds" else 60.0)
    tokenizer = gguf_tokenizer(GGUF_FILES | {"tokenizer.chat_template": template})
    with pytest.raises(ValueError, match=f"the chat template fails with .*{words}") as caught:
        chat_text("ab", tokenizer)
    assert len(terminal.describe(caught.value).splitlines()) == 1
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert chat_text("x" * 10**6, tokenizer) == "x" * 10**6


def test_a_template_reaches_nothing_of_python():
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = gguf_tokenizer(GGUF_FILES | {"tokenizer.chat_template": template})
    with pytest.raises(ValueError, match=r"the chat template .*'__class__' .* is unsafe"):
        chat_text("ab", tokenizer)


# Regular expressions of a tokenizer.

SLOW = "(?:a|aa|aaa){1,11}c"  # a tenth of a second for each character


def with_tokenizer(path: Path, **parts: Any) -> Path:
    """A directory with a tokenizer, and some of its parts in place of its own."""
    files = seeds.tokenizer_files()
    values = json.loads(files["tokenizer.json"]) | parts
    files["tokenizer.json"] = json.dumps(values).encode()
    return seeds.write(files, path)


def split(expression: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": "Isolated",
        "invert": False,
    }


def replace(expression: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": expression}, "content": "b"}


@pytest.fixture
def little_time(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 1.0)


def test_an_expression_has_bounded_time_for_a_text(tmp_path, little_time):
    path = with_tokenizer(tmp_path / "t", pre_tokenizer=split(SLOW))
    tokenizer = saved_tokenizer(path)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"by regular expressions of its own.*seconds") as caught:
        encode("a" * 3000, tokenizer)
    assert time.monotonic() - start < 5
    assert str(path) in terminal.describe(caught.value)
    # The child that was ended is replaced, and whatever else the tokenizer is given is encoded.
    assert encode("abc", tokenizer) == tokenizer("abc")["input_ids"]


def test_an_expression_has_bounded_time_when_a_tokenizer_is_read(tmp_path, little_time):
    """What the normalizer does to added tokens is done as they are read."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    token = {"id": 3, "content": "a" * 9000, "normalized": True, **flags}
    path = with_tokenizer(tmp_path / "t", normalizer=replace(SLOW), added_tokens=[token])
    start = time.process_time()
    with pytest.raises(ValueError, match=r"cannot be read: it takes over .* seconds") as caught:
        saved_tokenizer(path)
    assert time.process_time() - start < 1
    assert str(path) in terminal.describe(caught.value)


@pytest.mark.parametrize("special", [True, False])
def test_ids_are_the_same_whoever_finds_them(special, tmp_path):
    texts = ["abab 123 a\n b", "", "  a", "</s>ab<s>", "x" * 1000]
    expression = r"\p{L}+|\s"  # no model's
    tokenizer = saved_tokenizer(with_tokenizer(tmp_path / "t", pre_tokenizer=split(expression)))
    assert expressions.is_marked(tokenizer)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        assert encode(text, tokenizer, special=special) == ids


@pytest.mark.parametrize("name", sorted(BYTE_PAIRS))
def test_expressions_of_real_models_need_no_child(name, tmp_path, monkeypatch):
    monkeypatch.setattr(expressions, "_child", None)
    splits = [split(expression) for expression in BYTE_PAIRS[name].splits]
    parts = {"type": "Sequence", "pretokenizers": splits}
    tokenizer = saved_tokenizer(with_tokenizer(tmp_path / "t", pre_tokenizer=parts))
    assert encode("ab 12", tokenizer) == tokenizer("ab 12")["input_ids"]
    assert not expressions.is_marked(tokenizer)


def test_a_key_that_is_there_twice_hides_no_expression(tmp_path):
    path = with_tokenizer(tmp_path / "t", pre_tokenizer=split(expressions.QWEN2))
    file = path / "tokenizer.json"
    assert not expressions.foreign_in_files([file])
    for twice in ('{"\\u0052egex": "b+", "Regex": ', '{"Regex": "b+", "Regex": '):
        file.write_text(file.read_text().replace('{"Regex": ', twice))
        assert expressions.foreign_in_files([file])


def test_a_decoder_replaces_texts_alone(tmp_path):
    path = with_tokenizer(tmp_path / "t", decoder=replace("b+"))
    with pytest.raises(ValueError, match=f"{path} cannot be read: its decoder replaces by"):
        saved_tokenizer(path)
