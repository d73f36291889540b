"""Every way to store a model gives the same parameters, and each tensor is used exactly once."""

from __future__ import annotations

import json

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from quantspec_jax.models.parameters import flatten, parameter_shapes

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HF_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    **{f"{n}.kernel": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"{n}.bias": f"self_attn.{n}_proj.bias" for n in "qkvo"},
    **{f"{n}.kernel": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
    **{f"{n}.bias": f"mlp.{n}_proj.bias" for n in ("gate", "up", "down")},
}


def expected_parameters(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From transformers' names and layout to the tree's, by a table of its own."""
    paths = {name: path for path, name in HF_NAMES.items()}
    expected = {}
    for name, weight in weights.items():
        prefix = ""
        if name.startswith("model.layers."):
            _, _, index, name = name.split(".", 3)
            prefix = f"layers.{index}."
        path = prefix + paths[name]
        expected[path] = weight.T if path.endswith(".kernel") else weight
    return expected


def assert_same(tree: dict, expected: dict[str, np.ndarray]) -> None:
    actual = flatten(tree)
    assert set(actual) == set(expected)
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(actual[path]), array, err_msg=path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_source_gives_the_models_own_weights(family, tools, tmp_path):
    model = tools.make_model(family)
    expected = expected_parameters(tools.weights_of(model))
    single = tools.write_hf(model, tmp_path / "single")
    sharded = tools.write_hf(model, tmp_path / "sharded", sharded=True)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    sources = [single, sharded, tools.write_gguf(model, tmp_path / "model.gguf")]
    for i, source in enumerate(sources):
        converted = convert.convert(source, tmp_path / f"out{i}", dtype="float32", progress=False)
        for opened in (convert.open_source(source), convert.open_source(converted)):
            assert_same(opened.load("float32"), expected)
            assert opened.parameter_count == sum(w.size for w in expected.values())
    configs = {repr(convert.open_source(s).config) for s in (single, sharded, tmp_path / "out0")}
    assert len(configs) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tree_is_the_declared_one(family, tools, tmp_path):
    opened = convert.open_source(tools.write_hf(tools.make_model(family), tmp_path))
    shapes = {path: spec.shape for path, spec in parameter_shapes(opened.config).items()}
    loaded = flatten(opened.load("bfloat16"))
    assert {path: array.shape for path, array in loaded.items()} == shapes
    assert {array.dtype.name for array in loaded.values()} == {"bfloat16"}
    assert all(isinstance(array, jax.Array) for array in loaded.values())


def test_gguf_config_is_the_safetensors_one(tools, tmp_path):
    """But for what llama.cpp does not store: the family of Mistral."""
    for family in FAMILIES:
        model = tools.make_model(family)
        from_hf = convert.open_source(tools.write_hf(model, tmp_path / family)).config
        from_gguf = convert.open_source(tools.write_gguf(model, tmp_path / f"{family}.gguf")).config
        ours, theirs = from_gguf.to_dict(), from_hf.to_dict()
        if family == "mistral":
            assert ours.pop("family") == "llama"
            assert theirs.pop("family") == "mistral"
        assert ours == theirs


KINDS = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_types_dequantize_as_the_gguf_package_does(kind, tools, tmp_path):
    path = tools.write_gguf(tools.make_model("qwen3"), tmp_path / "model.gguf", kind)
    reference = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }
    opened = convert.open_source(path)
    assert opened.storage.split(", ")[0] == kind
    assert opened.source_dtype.name == "bfloat16"
    tree = flatten(opened.load("float32"))
    rounded = flatten(opened.load("bfloat16"))
    names = {"embedding": "token_embd", "layers.1.q.kernel": "blk.1.attn_q",
             "layers.0.down.kernel": "blk.0.ffn_down", "final_norm": "output_norm"}  # fmt: skip
    assert len(tree) == len(reference)
    for ours, theirs in names.items():
        expected = reference[f"{theirs}.weight"]
        expected = expected.T if ours.endswith(".kernel") else expected
        np.testing.assert_array_equal(np.asarray(tree[ours]), expected)
        np.testing.assert_array_equal(
            np.asarray(rounded[ours]), expected.astype(ml_dtypes.bfloat16)
        )


def test_real_gguf_equals_the_gguf_package(smollm2_gguf):
    tree = flatten(convert.open_source(smollm2_gguf).load("float32"))
    reader = gguf.GGUFReader(smollm2_gguf)
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == len(tree)
    for path, name in (("embedding", "token_embd"), ("layers.29.up.kernel", "blk.29.ffn_up")):
        tensor = tensors[f"{name}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = expected.T if path.endswith(".kernel") else expected
        np.testing.assert_array_equal(np.asarray(tree[path]), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_types_are_kept_or_rounded_once(dtype, tools, tmp_path):
    model = tools.make_model("mistral")
    weights = tools.weights_of(model)
    numpy_dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    tools.write_hf(model, tmp_path)
    stored = {name: w.astype(numpy_dtype) for name, w in weights.items()}
    save_file(stored, tmp_path / "model.safetensors")
    opened = convert.open_source(tmp_path)
    assert opened.source_dtype.name == dtype
    assert_same(opened.load(dtype), expected_parameters(stored))
    widened = {name: w.astype(np.float32) for name, w in stored.items()}
    assert_same(opened.load("float32"), expected_parameters(widened))


def test_opening_reads_no_weights(tools, tmp_path):
    """The tensors' bytes are gone, and everything but loading still works."""
    directory = tools.write_hf(tools.make_model("qwen2"), tmp_path / "hf")
    path = tools.write_gguf(tools.make_model("qwen2"), tmp_path / "model.gguf")
    with path.open("r+b") as stream:
        size = path.stat().st_size
        stream.seek(size // 2)
        stream.write(b"\xff" * (size - size // 2))
    (directory / "model.safetensors").unlink()
    for source in (directory, path):
        opened = convert.open_source(source)
        assert opened.parameter_count > 1000
        assert opened.config.num_layers == 2
        with pytest.raises(ValueError, match=r"NaN|neither"):
            opened.load("float32")


# What does not fit. `edit` changes the tensors of a Hugging Face model.


def rename(old: str, new: str):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (rename("model.norm.weight", "norm"), r"missing model.norm.weight; unknown norm"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing .*1.mlp.up_proj.weight"),
        (lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"), r"missing .*q_proj.bias"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), r"unknown extra"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(255, np.float32)}),
            r"misshapen model.norm.weight \[255\] \(expected \[256\]\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.copy()}),
            r"misshapen lm_head.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(256, np.int32)}),
            r"model.norm.weight has dtype I32",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(256, np.float64)}),
            r"model.norm.weight has dtype F64",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(edit, words, llama_model, tools, tmp_path):
    tensors = tools.weights_of(llama_model)
    tools.write_hf(llama_model, tmp_path / "hf")
    edit(tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        convert.open_source(tmp_path / "hf").load("float32")
    with pytest.raises(ValueError, match=words):
        convert.convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_value_that_is_not_finite_is_named(value, name, llama_model, tools, tmp_path):
    tensors = tools.weights_of(llama_model)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value
    tools.write_hf(llama_model, tmp_path / "hf")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match=f"{name} has a NaN or infinite value"):
            convert.open_source(tmp_path / "hf").load(dtype)


def test_a_value_too_large_for_the_type_is_named(llama_model, tools, tmp_path):
    tensors = tools.weights_of(llama_model)
    tensors["model.norm.weight"] = np.full(256, 1e5, np.float32)
    tools.write_hf(llama_model, tmp_path / "hf")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight has a value too large for float16"):
        convert.open_source(tmp_path / "hf").load("float16")
    convert.open_source(tmp_path / "hf").load("bfloat16")


def test_a_tied_model_may_store_its_head_if_it_is_the_embedding(tools, tmp_path):
    model = tools.make_model("qwen2")
    tensors = tools.weights_of(model)
    tools.write_hf(model, tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.copy()}, tmp_path / "model.safetensors")
    assert "lm_head" not in convert.open_source(tmp_path).load("float32")
    save_file(tensors | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight differs"):
        convert.open_source(tmp_path).load("float32")


def test_rotary_buffers_change_nothing(llama_model, tools, tmp_path):
    tensors = tools.weights_of(llama_model)
    expected = expected_parameters(tensors)
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tools.write_hf(llama_model, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(convert.open_source(tmp_path).load("float32"), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_base_model_without_the_prefix_is_the_same_model(family, tools, tmp_path):
    """As `AutoModel` saves it: no `model.` before the names."""
    model = tools.make_model(family)
    tools.write_hf(model, tmp_path)
    tensors = tools.weights_of(model)
    expected = expected_parameters(tensors)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    bare["rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(bare, tmp_path / "model.safetensors")
    assert_same(convert.open_source(tmp_path).load("float32"), expected)
    if family == "qwen2":  # whose head is the embedding
        (tmp_path / "model.safetensors").unlink()
        model.model.save_pretrained(tmp_path, max_shard_size="300KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert_same(convert.open_source(tmp_path).load("float32"), expected)
    else:
        del bare["lm_head.weight"]
        save_file(bare, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
            convert.open_source(tmp_path).load("float32")


def test_gguf_tensors_that_do_not_fit_are_named(tools, tmp_path):
    model = tools.make_model("qwen2")
    weights = tools.gguf_weights(model)
    cases = {
        r"missing blk.1.ffn_up.weight": {k: w for k, w in weights.items() if "1.ffn_up" not in k},
        r"missing blk.0.attn_q.bias": {k: w for k, w in weights.items() if "bias" not in k},
        r"unknown blk.0.ffn_up_exps.weight": weights
        | {"blk.0.ffn_up_exps.weight": weights["blk.0.ffn_up.weight"]},
        r"misshapen blk.0.attn_v.weight": weights
        | {"blk.0.attn_v.weight": weights["blk.0.attn_v.weight"][:-64]},
    }
    for words, tensors in cases.items():
        path = tools.write_gguf(model, tmp_path / "model.gguf", tensors=tensors)
        with pytest.raises(ValueError, match=words):
            convert.open_source(path).load("float32")


# Shards.


@pytest.fixture
def sharded(llama_model, tools, tmp_path):
    return tools.write_hf(llama_model, tmp_path / "hf", sharded=True)


def test_a_shard_that_is_missing_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        convert.open_source(sharded).load("float32")


def test_a_tensor_in_two_shards_is_named(sharded):
    one, two = sorted(sharded.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(one).items()))
    save_file(load_file(two) | {name: tensor}, two)
    with pytest.raises(ValueError, match=f"duplicate tensor {name}"):
        convert.open_source(sharded).load("float32")


def test_a_tensor_that_its_shard_does_not_hold_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=f"missing tensor {name}"):
        convert.open_source(sharded).load("float32")


def edit_index(sharded, edit) -> None:
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    edit(values["weight_map"])
    index.write_text(json.dumps(values))


@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq",
])  # fmt: skip
@pytest.mark.parametrize("where", ["index", "shard", "another shard", "two shards", "no file"])
def test_buffers_that_can_be_derived_may_be_on_either_side(
    name, where, sharded, llama_model, tools
):
    one, two = sorted(sharded.glob("model-*.safetensors"))[:2]
    shards = {"shard": [one], "another shard": [two], "two shards": [one, two]}.get(where, [])
    for shard in shards:
        save_file(load_file(shard) | {name: np.ones(8, np.float32)}, shard)
    if where in ("index", "another shard"):
        edit_index(sharded, lambda weights: weights.update({name: one.name}))
    if where == "no file":
        edit_index(sharded, lambda weights: weights.update({name: "model-9.safetensors"}))
    expected = expected_parameters(tools.weights_of(llama_model))
    assert_same(convert.open_source(sharded).load("float32"), expected)


@pytest.mark.parametrize("where", ["index", "shard"])
def test_a_tied_head_may_be_on_either_side(where, tools, tmp_path):
    model = tools.make_model("qwen2")
    tools.write_hf(model, tmp_path, sharded=True)
    tensors = tools.weights_of(model)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    if where == "index":
        edit_index(tmp_path, lambda weights: weights.update({"lm_head.weight": shard.name}))
    else:
        head = tensors["model.embed_tokens.weight"].copy()
        save_file(load_file(shard) | {"lm_head.weight": head}, shard)
    assert_same(convert.open_source(tmp_path).load("float32"), expected_parameters(tensors))
    if where == "shard":
        save_file(load_file(shard) | {"lm_head.weight": head + 1}, shard)
        with pytest.raises(ValueError, match=r"lm_head.weight differs"):
            convert.open_source(tmp_path).load("float32")


def test_an_unknown_tensor_that_the_index_does_not_place_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    save_file(load_file(shard) | {"extra": np.ones(3, np.float32)}, shard)
    with pytest.raises(ValueError, match=r"holds extra, which .* does not place"):
        convert.open_source(sharded).load("float32")


def test_an_index_may_not_lead_outside_its_directory(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"../hf/model-'))
    with pytest.raises(ValueError, match=r"names \.\./hf/model-"):
        convert.open_source(sharded).load("float32")


# Damaged safetensors.


def test_damaged_safetensors(llama_dir, tmp_path):
    """Cut anywhere, or with a damaged header: an error that names the file, never a wrong model."""
    whole = (llama_dir / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((llama_dir / "config.json").read_bytes())
    path = tmp_path / "model.safetensors"
    header_bytes = int.from_bytes(whole[:8], "little")
    cuts = [0, 4, 8, 100, header_bytes, header_bytes + 8, len(whole) // 2, len(whole) - 1]
    damaged = [whole[:cut] for cut in cuts]
    damaged += [whole + b"\0", b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:]]
    damaged += [whole[:8] + b"\xff" + whole[9:]]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors is (truncated|corrupt)"):
            convert.open_source(tmp_path).load("float32")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([("a", "F32", [2], b"\0" * 8), ("a", "F32", [2], b"\0" * 8)], "duplicate tensor a"),
        ([("a", "F32", [3], b"\0" * 8)], r"tensor a of shape \[3\] and dtype F32 has 8 bytes"),
        ([("a", "F32", [-2], b"\0" * 8)], "bad header entry of tensor a"),
    ],
)
def test_wrong_safetensors_headers(tensors, words, llama_dir, raw_safetensors, tmp_path):
    (tmp_path / "config.json").write_bytes((llama_dir / "config.json").read_bytes())
    raw_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=words):
        convert.open_source(tmp_path).load("float32")


# Sources that are none.


def test_pickled_weights_are_refused_by_name(llama_dir, tmp_path):
    (tmp_path / "config.json").write_bytes((llama_dir / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickled weights are not read"):
        convert.open_source(tmp_path).load("float32")


@pytest.mark.parametrize(
    "source",
    [
        "/no/such/dir", "./model", "../a/b", "~/no-such-model", "model.gguf", "owner/model.gguf",
        "a/b/c", "model", "", "owner/model/", "C:\\model", "owner/model.safetensors", "owner/..",
    ],
)  # fmt: skip
def test_a_path_that_does_not_exist_is_not_tried_as_a_hub_id(source, monkeypatch):
    monkeypatch.setattr("convert.files.hub._snapshot", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="source is"):
        convert.open_source(source)


def test_a_path_below_a_directory_here_is_not_tried_as_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.files.hub._snapshot", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match="does not exist"):
        convert.open_source("models/mine")


def test_directories_and_files_that_hold_no_model(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"without config.json; it holds a.gguf"):
        convert.open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="a file that is not GGUF"):
        convert.open_source(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        convert.open_source(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a JSON object"):
        convert.open_source(tmp_path)
