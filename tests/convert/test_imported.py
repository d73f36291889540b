"""Existing 4-bit checkpoints as drafts: the draft is the checkpoint's model, up to rounding scales.

The packers here are written from the formats' definitions, a bit field at a time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
import quantspec_jax as qs
from convert import sources
from convert.weights import load_parameters
from pallas_kernels.int4_matmul.xla import dequantize
from pallas_kernels.layout import unpack
from quantspec_jax.dtypes import FLOAT32
from quantspec_jax.loading import Model, full_logits
from quantspec_jax.models.parameters import LINEAR_LAYERS, flatten
from quantspec_jax.weights.formats import DraftConfig, WeightFormat

HF = {
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
GROUP = 32


class Rounded(NamedTuple):
    """A [Kin, N] weight in groups of input channels: scale · (code − zero)."""

    codes: np.ndarray  # [Kin, N]
    scale: np.ndarray  # float16 [groups, N]
    zero: np.ndarray  # [groups, N]
    group_of: np.ndarray  # [Kin]

    @property
    def values(self) -> np.ndarray:
        scale = self.scale.astype(np.float32)[self.group_of]
        return scale * (self.codes - self.zero[self.group_of].astype(np.float32))


def round_to_codes(w: np.ndarray, group_of: np.ndarray, symmetric: bool) -> Rounded:
    groups = [w[group_of == g] for g in range(group_of.max() + 1)]
    low = np.minimum(np.stack([g.min(0) for g in groups]), 0)
    high = np.maximum(np.stack([g.max(0) for g in groups]), 0)
    if symmetric:
        scale = (2 * np.maximum(-low, high) / 15).astype(np.float16)
        zero = np.full(scale.shape, 8)
    else:
        scale = ((high - low) / 15).astype(np.float16)
        zero = np.clip(np.round(-low / scale.astype(np.float32)), 0, 15).astype(int)
    codes = np.round(w / scale.astype(np.float32)[group_of]) + zero[group_of]
    return Rounded(np.clip(codes, 0, 15).astype(int), scale, zero, group_of)


def words(fields: list[np.ndarray]) -> np.ndarray:
    """Eight arrays of four-bit numbers → int32, the first in the lowest bits."""
    total = sum(field.astype(np.uint64) << np.uint64(4 * i) for i, field in enumerate(fields))
    return total.astype(np.uint32).view(np.int32)


def gptq_tensors(r: Rounded, v2: bool) -> dict[str, np.ndarray]:
    zero = r.zero if v2 else (r.zero - 1) % 16
    return {
        "qweight": words([r.codes[i::8] for i in range(8)]),
        "qzeros": words([zero[:, i::8] for i in range(8)]),
        "scales": r.scale,
        "g_idx": r.group_of.astype(np.int32),
    }


def awq_tensors(r: Rounded) -> dict[str, np.ndarray]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words([r.codes[:, i::8] for i in order]),
        "qzeros": words([r.zero[:, i::8] for i in order]),
        "scales": r.scale,
    }


class Made(NamedTuple):
    directory: Path
    rounded: dict[str, Rounded]  # by layer
    params: dict  # the tree of the checkpoint's own model, dequantized


def quantize_directory(
    source: Path,
    out: Path,
    method: str,
    *,
    group: int = GROUP,
    symmetric: bool = False,
    v2: bool = False,
    act_order: bool = False,
    scaled: tuple[str, ...] = (),
    leave: tuple[str, ...] = (),
    **settings,
) -> Made:
    """A GPTQ or AWQ checkpoint of the model in `source`.

    `scaled`: AWQ's scalings to apply first, of "norms", "v" and "up". `leave`: layers, by their
    last name, that stay in float.
    """
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    params = convert.open_source(source).load("float32")
    rng = np.random.default_rng(1)
    rounded = {}

    def scale_of(channels: int) -> np.ndarray:
        return np.exp(rng.uniform(-1, 1, channels)).astype(np.float32)

    for i in range(len(params["layers"])):
        prefix = f"model.layers.{i}."
        kernels = {name: tensors.pop(f"{prefix}{HF[name]}.weight").T.copy() for name in HF}
        block = params["layers"][str(i)]
        if "norms" in scaled:
            for norm, hf, names in (
                ("attention_norm", "input_layernorm", "qkv"),
                ("mlp_norm", "post_attention_layernorm", ("gate", "up")),
            ):
                s = scale_of(len(block[norm]))
                tensors[f"{prefix}{hf}.weight"] /= s
                block[norm] = block[norm] / s
                for name in names:
                    kernels[name] *= s[:, None]
        for before, after in (("v", "o"), ("up", "down")):
            if before in scaled:
                s = scale_of(kernels[before].shape[1])
                kernels[before] /= s
                kernels[after] *= np.resize(s, len(kernels[after]))[:, None]
        for name, kernel in kernels.items():
            kin = len(kernel)
            if name in leave:
                tensors[f"{prefix}{HF[name]}.weight"] = kernel.T.copy()
                continue
            group_of = np.arange(kin) // (kin if group == -1 else group)
            if act_order:
                group_of = rng.permutation(group_of)
            r = rounded[f"layers.{i}.{name}"] = round_to_codes(kernel, group_of, symmetric)
            packed = awq_tensors(r) if method == "awq" else gptq_tensors(r, v2)
            tensors |= {f"{prefix}{HF[name]}.{part}": x for part, x in packed.items()}
            block[name]["kernel"] = jnp.asarray(r.values)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()},
              out / "model.safetensors")  # fmt: skip
    form = {"checkpoint_format": "gptq_v2" if v2 else "gptq", "desc_act": act_order}
    own = {"version": "gemm", "zero_point": not symmetric} if method == "awq" else form
    config = json.loads((out / "config.json").read_text())
    quantization = {"quant_method": method, "bits": 4, "group_size": group, **own, **settings}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return Made(out, rounded, params)


def edit_quantization(directory: Path, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def target(tiny_llama_dir):
    return qs.load(str(tiny_llama_dir), dtype="float32", draft=DraftConfig(bits=None))


@pytest.fixture(scope="module")
def gptq(tiny_llama_dir, tmp_path_factory) -> Made:
    """A GPTQ checkpoint that tests only read, or copy."""
    return quantize_directory(tiny_llama_dir, tmp_path_factory.mktemp("gptq") / "model", "gptq")


VARIANTS = {
    "gptq": {"method": "gptq"},
    "gptq symmetric": {"method": "gptq", "symmetric": True},
    "gptq v2": {"method": "gptq", "v2": True},
    "gptq v2 symmetric": {"method": "gptq", "v2": True, "symmetric": True},
    "gptq one group": {"method": "gptq", "group": -1},
    "gptq desc_act": {"method": "gptq", "act_order": True},
    "gptq desc_act symmetric": {"method": "gptq", "act_order": True, "symmetric": True},
    "gptq, large groups": {"method": "gptq", "group": 64},
    "awq": {"method": "awq"},
    "awq scaled": {"method": "awq", "scaled": ("norms", "up")},
    "awq scaled, values too": {"method": "awq", "scaled": ("norms", "v", "up")},
}


@pytest.fixture(scope="module")
def wide(make_tiny_llama, tmp_path_factory) -> Path:
    """With as many key-value heads as heads, as where AWQ scales the values."""
    return make_tiny_llama(tmp_path_factory.mktemp("wide"), num_key_value_heads=4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_draft_is_the_checkpoints_model(variant, wide, tmp_path):
    """Codes exactly, values but for the rounding of scales and minima, norms."""
    made = quantize_directory(wide, tmp_path / "quantized", **VARIANTS[variant])
    model = qs.load(str(wide), dtype="float32", draft=str(made.directory))
    assert model.draft.method == "imported"
    own = model.draft_params["layers"]
    for layer, rounded in made.rounded.items():
        _, i, name = layer.split(".")
        if "values too" in variant and name in "vo":
            continue
        entry, (kin, n) = own[i][name], rounded.codes.shape
        order = np.asarray(entry.get("order", np.arange(kin)))
        codes = np.asarray(unpack(entry["kernel"].packed)).reshape(-1, n)[:kin] + 8
        np.testing.assert_array_equal(codes, rounded.codes[order])
        assert (entry["kernel"].minimum is None) == VARIANTS[variant].get("symmetric", False)
        error = np.abs(np.asarray(dequantize(entry["kernel"]))[:kin] - rounded.values[order])
        scale = rounded.scale.astype(np.float32)[rounded.group_of[order]]
        assert (error <= 25 * 2.0**-8 * scale).all()
    for i in own:
        for norm in ("attention_norm", "mlp_norm"):
            np.testing.assert_allclose(own[i][norm], made.params["layers"][i][norm], rtol=1e-6)


def test_scaled_values_are_scaled_back(wide, tmp_path):
    """The draft's values go beside the target's in one cache: v has the target's scale again, and
    so has o, in 8 bits."""
    made = quantize_directory(wide, tmp_path / "q", **VARIANTS["awq scaled, values too"])
    model = qs.load(str(wide), dtype="float32", draft=str(made.directory))
    for i, block in model.params["layers"].items():
        own = model.draft_params["layers"][i]
        norms = own["attention_norm"] / block["attention_norm"]
        v = dequantize(own["v"]["kernel"]) * norms[:, None]
        o = sum(dequantize(own["o"][part]) for part in ("kernel", "residual"))
        for restored, kernel in ((v, block["v"]["kernel"]), (o, block["o"]["kernel"])):
            assert float(jnp.linalg.norm(restored - kernel) / jnp.linalg.norm(kernel)) < 0.25
    logits, drafted, checkpoint = (
        full_logits(tree, jnp.arange(24)[None] * 7, model.config)
        for tree in (model.params, model.draft_params, made.params)
    )
    ours, theirs = (float(jnp.linalg.norm(x - logits)) for x in (drafted, checkpoint))
    assert ours < 1.2 * theirs


def test_formats_say_how_each_layer_is_stored(tiny_llama_dir, target, tmp_path):
    made = quantize_directory(tiny_llama_dir, tmp_path / "q", "gptq", leave=("down", "o"))
    config, entries = convert.open_draft(made.directory, target.config).load(target.params)
    assert (config.bits, config.group_size, config.symmetric) == (4, GROUP, False)
    left = {f"layers.{i}.{name}" for i in range(2) for name in ("o", "down")}
    assert dict(config.formats) == dict.fromkeys(left, WeightFormat(8, 64))
    eight = entries["layers"]["0"]["down"]
    restored = sum(dequantize(eight[part]) for part in ("kernel", "residual"))
    kernel = target.params["layers"]["0"]["down"]["kernel"]
    assert float(jnp.abs(restored[: len(kernel)] - kernel).max()) < 0.01 * float(kernel.max())


def test_other_places_of_names_and_settings(gptq, target, tmp_path):
    """quantize_config.json instead of config.json's entry, a file with a name of its own."""
    shutil.copytree(gptq.directory, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"], settings["checkpoint_format"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    (tmp_path / "old" / "quantize_config.json").write_text(json.dumps(settings))
    (tmp_path / "old" / "model.safetensors").rename(
        tmp_path / "old" / "gptq_model-4bit-32g.safetensors"
    )
    one, other = (
        convert.open_draft(path, target.config).load(target.params)
        for path in (gptq.directory, tmp_path / "old")
    )
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


# GGUF.


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gguf_blocks_are_the_files_weights(kind, family, tools, tmp_path):
    """The file as its own draft; in the llama family rows of q and k have an order of their own."""
    path = tools.write_gguf(tools.make_model(family), tmp_path / "m.gguf", kind)
    checkpoint = convert.open_source(path)
    params = checkpoint.load("float32")
    config, entries = convert.open_draft(path, checkpoint.config).load(params)
    assert config == DraftConfig(4, 32, kind == "Q4_0", method="imported")
    for i, block in params["layers"].items():
        for name in LINEAR_LAYERS:
            weight = entries["layers"][i][name]["kernel"]
            error = jnp.abs(dequantize(weight) - block[name]["kernel"])
            scale = jnp.repeat(jnp.abs(weight.scale.astype(jnp.float32)), 32, 0)
            low = 0 * weight.scale if weight.minimum is None else weight.minimum
            minimum = jnp.repeat(jnp.abs(low.astype(jnp.float32)), 32, 0)
            assert bool((error <= 1.01 * 2.0**-8 * (15 * scale + minimum)).all())


def test_other_gguf_types_get_eight_bits_of_the_targets_weights(tools, tmp_path):
    model = tools.make_model("qwen2")
    kinds = {"ffn_down": "Q5_0", "attn_v": "Q8_0"}
    path = tools.write_gguf(model, tmp_path / "mixed.gguf", "Q4_0", kinds=kinds)
    source = tools.write_hf(model, tmp_path / "hf")
    loaded = qs.load(str(source), dtype="float32", draft=str(path))
    formats = dict(loaded.draft.formats)
    assert set(formats) == {f"layers.{i}.{name}" for i in range(2) for name in ("v", "down")}
    assert set(formats.values()) == {WeightFormat(8, 64)}
    down = loaded.draft_params["layers"]["1"]["down"]
    error = sum(map(dequantize, (down["kernel"], down["residual"])))
    error -= loaded.params["layers"]["1"]["down"]["kernel"]
    assert float(jnp.abs(error).max()) < 0.002


def test_smollm2_reproduces_itself(smollm2_gguf):
    """The first and the last block of a real model's Q4_1 file."""
    checkpoint = convert.open_source(smollm2_gguf)
    wanted = ("layers.0.", "layers.29.")
    parameters = [p for p in checkpoint._parameters if p.path.startswith(wanted)]
    params = load_parameters(parameters, FLOAT32)
    quantized = convert.open_draft(smollm2_gguf, checkpoint.config)
    assert quantized.draft_config() == DraftConfig(group_size=32, method="imported")
    for i in (0, 29):
        block = params["layers"][str(i)]
        entries = quantized.block(i, block)
        for name in LINEAR_LAYERS:
            kernel = block[name]["kernel"]
            error = dequantize(entries[f"{name}.kernel"]) - kernel
            assert float(jnp.linalg.norm(error) / jnp.linalg.norm(kernel)) < 0.006


# Stored, loaded, decoded with.


@pytest.mark.parametrize("variant", ["gptq desc_act", "awq scaled"])
def test_converted_with_it_the_draft_is_loaded_as_imported(variant, tiny_llama_dir, tmp_path):
    made = quantize_directory(tiny_llama_dir, tmp_path / "q", **VARIANTS[variant])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.Checkpoint, "load", lambda *_, **__: pytest.fail("read them all"))
        out = convert.convert(
            tiny_llama_dir, tmp_path / "out", draft_from=made.directory, progress=False
        )
    stored = qs.load(str(out), dtype="float32")
    direct = qs.load(str(tiny_llama_dir), dtype="float32", draft=str(made.directory))
    assert stored.draft == direct.draft
    one, other = flatten(stored.draft_params), flatten(direct.draft_params)
    assert set(one) == set(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_tokens_do_not_depend_on_it(make_tiny_llama, tmp_path):
    """The same with its weights and with all of them 0, where hardly a proposal is right."""
    (tmp_path / "hf").mkdir()
    source = make_tiny_llama(tmp_path / "hf", num_hidden_layers=1)
    made = quantize_directory(source, tmp_path / "q", "gptq", act_order=True)
    model = qs.load(str(source), dtype="float32", draft=str(made.directory))
    quantized = convert.open_draft(made.directory, model.config)
    draft, entries = quantized.load(model.params)
    for entry in entries["layers"]["0"].values():
        kernel = entry["kernel"]
        entry["kernel"] = kernel._replace(scale=0 * kernel.scale, minimum=0 * kernel.minimum)
    other = Model(model.config, model.params, model.tokenizer, draft, entries)
    config = qs.GenerateConfig(gamma=2, max_new_tokens=24, ignore_eos=True)
    good, bad = (qs.generate(m, [list(range(5, 29))], config) for m in (model, other))
    assert good.tokens == bad.tokens
    assert good.stats[0]["acceptance_rate"] > bad.stats[0]["acceptance_rate"] + 0.2


# What is refused.


def refused(match: str, draft, source: Path, tmp_path: Path) -> None:
    """Conversion names what is wrong, and leaves nothing."""
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=match):
        convert.convert(source, tmp_path / "out", draft_from=draft, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_another_model_is_refused(gptq, make_tiny_llama, tiny_llama_dir, tmp_path):
    for name, changes in (("seed", {"seed": 5}), ("layers", {"num_hidden_layers": 1}),
                          ("width", {"intermediate_size": 128})):  # fmt: skip
        (tmp_path / name).mkdir()
        make_tiny_llama(tmp_path / name, **changes)
    other = r"draft_from is '.*', a checkpoint of another model: its "
    refused(other + r"weights in layers\.0\.q", gptq.directory, tmp_path / "seed", tmp_path)
    refused(
        other + r"num_layers is 2, the model's is 1", gptq.directory, tmp_path / "layers", tmp_path
    )
    refused(other + "intermediate_size", gptq.directory, tmp_path / "width", tmp_path)


def test_another_models_awq_is_refused(make_tiny_llama, tiny_llama_dir, tmp_path):
    quantize_directory(tiny_llama_dir, tmp_path / "q", "awq", scaled=("norms", "up"))
    (tmp_path / "other").mkdir()
    make_tiny_llama(tmp_path / "other", seed=3)
    refused("another model: its weights in", tmp_path / "q", tmp_path / "other", tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 8}, "bits in .* is 8; allowed: 4"),
        ({"bits": None}, "bits in .* is None"),
        ({"group_size": 20}, "group_size in .* is 20"),
        ({"group_size": 64}, r"tensor model.layers.0.self_attn.q_proj.qzeros is I32 \[2, 8\] "),
        ({"checkpoint_format": "marlin"}, "checkpoint_format in .* is 'marlin'; allowed: gptq"),
        ({"quant_method": "compressed-tensors"}, "quant_method in .* is 'compressed-tensors'"),
        ({"quant_method": "awq", "version": "gemv"}, "version in .* is 'gemv'; allowed: gemm"),
        ({"quant_method": "awq", "checkpoint_format": "gemm"}, r"qweight is I32 \[8, 64\]"),
    ],
)
def test_other_packings_are_refused_by_name(changes, words, gptq, tiny_llama_dir, tmp_path):
    shutil.copytree(gptq.directory, tmp_path / "q")
    edit_quantization(tmp_path / "q", **changes)
    refused(words, tmp_path / "q", tiny_llama_dir, tmp_path)


DOWN = "model.layers.1.mlp.down_proj."


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(DOWN + "qweight"), f"missing tensor {DOWN}qweight"),
        (lambda t: t.pop(DOWN + "scales"), f"missing tensor {DOWN}scales"),
        (
            lambda t: t.update({DOWN + "qzeros": t[DOWN + "qzeros"].astype(np.float32)}),
            f"tensor {DOWN}qzeros is F32",
        ),
        (
            lambda t: t.update({DOWN + "scales": t[DOWN + "scales"] * np.float16(np.nan)}),
            f"{DOWN}scales has a NaN or infinite scale",
        ),
        (
            lambda t: t.update({DOWN + "g_idx": np.zeros(96, np.int32)}),
            "g_idx of layers.1.down does not deal",
        ),
    ],
)
def test_damaged_tensors_are_named(edit, words, gptq, tiny_llama_dir, tmp_path):
    shutil.copytree(gptq.directory, tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    refused(words, tmp_path / "q", tiny_llama_dir, tmp_path)


def test_what_is_no_quantized_checkpoint_is_refused(tools, tiny_llama_dir, tmp_path):
    refused("has no quantization_config", tiny_llama_dir, tiny_llama_dir, tmp_path)
    refused("does not exist", tmp_path / "nowhere" / "here", tiny_llama_dir, tmp_path)
    (tmp_path / "file").write_text("text")
    refused("draft_from is .*file", tmp_path / "file", tiny_llama_dir, tmp_path)
    model = tools.make_model("qwen2")
    tools.write_gguf(model, tmp_path / "q8.gguf", "Q8_0")
    refused("whose blocks are Q8_0", tmp_path / "q8.gguf", tmp_path / "q8.gguf", tmp_path)


def test_a_nan_in_a_gguf_scale_is_named(tools, tmp_path):
    model = tools.make_model("qwen2")
    source = tools.write_hf(model, tmp_path / "hf")
    path = tools.write_gguf(model, tmp_path / "m.gguf", "Q4_1")
    tensor = next(
        p.tensor for p in convert.open_source(path)._parameters if p.path == "layers.1.o.kernel"
    )
    data = bytearray(path.read_bytes())
    data[tensor.offset + 2 : tensor.offset + 4] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    refused("blk.1.attn_output.weight has a NaN or infinite scale", path, source, tmp_path)
