"""Small checkpoints of every format that is read, whole: what the fuzzer damages.

Written from the formats' definitions with NumPy, so that a process is ready in seconds.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# One set of shapes for all formats, so that little is compiled; the rows of ffn_down are as long as
# the longest block of a GGUF type.
HIDDEN, MLP, H, K, D, LAYERS, VOCAB = 32, 256, 2, 1, 16, 2, 48
TEXT = "ab ab 1"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

U32, F32, BOOL, STRING, ARRAY, F64 = 4, 6, 7, 8, 9, 12  # types of GGUF's metadata


@dataclasses.dataclass
class Gguf:
    """A GGUF file by its parts: metadata as (key, type, value), the value of an array as (type,
    elements); tensors as (name, shape, type, bytes)."""

    metadata: list[tuple[str, int, Any]]
    tensors: list[tuple[str, tuple[int, ...], int, bytes]]

    def to_bytes(self) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))
        head += b"".join(
            _text(k) + struct.pack("<I", t) + _value(t, v) for k, t, v in self.metadata
        )
        data = b""
        for name, shape, kind, content in self.tensors:
            dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
            head += _text(name) + dimensions + struct.pack("<IQ", kind, len(data))
            data += content + b"\0" * (-len(content) % 32)
        return head + b"\0" * (-len(head) % 32) + data


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded


_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        inner, elements = value
        return struct.pack("<IQ", inner, len(elements)) + b"".join(
            _value(inner, element) for element in elements
        )
    return struct.pack("<" + _FORMS[kind], value)


def config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model."""
    return {
        "architectures": ["AnyForCausalLM"],
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "head_dim": D,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "torch_dtype": "float32",
        "eos_token_id": 1,
        **changes,
    }


_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def weights(family: str) -> dict[str, np.ndarray]:
    """Random weights by their Hugging Face names."""
    rng = np.random.default_rng(16)
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (H * D, HIDDEN),
        "self_attn.k_proj.weight": (K * D, HIDDEN),
        "self_attn.v_proj.weight": (K * D, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, H * D),
        "mlp.gate_proj.weight": (MLP, HIDDEN),
        "mlp.up_proj.weight": (MLP, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, MLP),
    }
    if family == "qwen2":
        shapes |= {f"self_attn.{n}_proj.bias": ((H if n == "q" else K) * D,) for n in "qkv"}
    if family == "qwen3":
        shapes |= {f"self_attn.{n}_norm.weight": (D,) for n in "qk"}
    named = {
        f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()
    }
    named |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    named |= {"lm_head.weight": (VOCAB, HIDDEN)}
    return {
        name: (rng.standard_normal(shape) * 0.1 + ("norm" in name)).astype(np.float32)
        for name, shape in named.items()
    }


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    kinds = {"float32": "F32", "float16": "F16", "int32": "I32"}
    header, data = {}, b""
    for name, array in tensors.items():
        span = [len(data), len(data) + array.nbytes]
        kind = kinds[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tokens() -> list[str]:
    letters = [chr(c) for c in range(ord("a"), ord("a") + 20)] + list("0123456789")
    tokens = ["<s>", "</s>", "<unk>", *letters, "Ġ", "ab", "Ġab", "abc", "▁", "▁ab"]
    return tokens + [f"<extra{i}>" for i in range(VOCAB - len(tokens))]


def tokenizer_files() -> dict[str, bytes]:
    vocabulary = {token: i for i, token in enumerate(_tokens())}
    special = [
        {
            "id": vocabulary[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in ("<s>", "</s>", "<unk>")
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": {**byte_level, "use_regex": True},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [["a", "b"], ["Ġ", "ab"], ["ab", "c"]],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def hugging_face(family: str, shards: bool = False, **changes: Any) -> dict[str, bytes]:
    files = {
        "config.json": json.dumps(config(family, **changes)).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [1, 2]}).encode(),
        **tokenizer_files(),
    }
    tensors = weights(family)
    if not shards:
        return files | {"model.safetensors": safetensors(tensors)}
    names = sorted(tensors)
    parts = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    where = {name: part for part, held in parts.items() for name in held}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    for part, held in parts.items():
        files[part] = safetensors({name: tensors[name] for name in held})
    return files


def gguf_file(kind: str, family: str = "llama", tokenizer: str = "gpt2", **changes: Any) -> Gguf:
    """`changes`: metadata of the architecture by key, with its type."""
    metadata: list[tuple[str, int, Any]] = [
        ("general.architecture", STRING, family),
        ("general.alignment", U32, 32),
        (f"{family}.block_count", U32, LAYERS),
        (f"{family}.context_length", U32, 256),
        (f"{family}.embedding_length", U32, HIDDEN),
        (f"{family}.feed_forward_length", U32, MLP),
        (f"{family}.attention.head_count", U32, H),
        (f"{family}.attention.head_count_kv", ARRAY, (U32, [K] * LAYERS)),
        (f"{family}.attention.key_length", U32, D),
        (f"{family}.rope.freq_base", F32, 10000.0),
        (f"{family}.attention.layer_norm_rms_epsilon", F32, 1e-5),
        *((f"{family}.{key}", *typed) for key, typed in changes.items()),
        *gguf_tokenizer(tokenizer),
    ]
    tensors = []
    for name, array in weights(family).items():
        base, suffix = name.rsplit(".", 1)
        layer = ""
        if base not in _TOP:
            _, _, index, base = base.split(".", 3)
            layer = f"blk.{index}."
        named = f"{layer}{(_TOP | _LAYER)[base]}.{suffix}"
        chosen = kind if array.ndim == 2 else "F32"
        if chosen.endswith("_K") and array.shape[-1] % 256:
            chosen = "Q8_0"
        number, content = _encoded(chosen, array)
        tensors.append((named, array.shape, number, content))
    return Gguf(metadata, tensors)


def gguf_tokenizer(kind: str) -> list[tuple[str, int, Any]]:
    tokens = _tokens()
    types = [3, 3, 2] + [1] * (VOCAB - 3)
    named: list[tuple[str, int, Any]] = [
        ("model", STRING, kind),
        ("tokens", ARRAY, (STRING, tokens)),
        ("token_type", ARRAY, (5, types)),
        ("bos_token_id", U32, 0),
        ("eos_token_id", U32, 1),
        ("unknown_token_id", U32, 2),
        ("add_bos_token", BOOL, True),
    ]
    if kind == "gpt2":
        named += [
            ("pre", STRING, "qwen2"),
            ("merges", ARRAY, (STRING, ["a b", "Ġ ab", "ab c"])),
        ]
    else:
        named += [("scores", ARRAY, (F32, [-float(i) for i in range(VOCAB)]))]
    return [
        *((f"tokenizer.ggml.{key}", number, value) for key, number, value in named),
        ("tokenizer.chat_template", STRING, TEMPLATE),
    ]


def _encoded(kind: str, array: np.ndarray) -> tuple[int, bytes]:
    number = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return int(number), np.ascontiguousarray(gguf.quants.quantize(array, number)).tobytes()
    block, size = gguf.GGML_QUANT_SIZES[number]  # the package reads but does not write these
    rng = np.random.default_rng(array.shape[0])
    blocks = rng.integers(0, 256, (array.size // block, size), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.002, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        blocks[:, -2:] = scales[:, :2]
    else:
        blocks[:, :4] = scales
    return int(number), blocks.tobytes()


def packed(method: str) -> dict[str, bytes]:
    """The model of `hugging_face("llama")` in GPTQ's or AWQ's 4 bits, groups of 16 channels."""
    quantization = {"quant_method": method, "bits": 4, "group_size": 16}
    quantization |= {"gptq": {"checkpoint_format": "gptq"}, "awq": {"version": "gemm"}}[method]
    values = config("llama", quantization_config=quantization)
    return {
        "config.json": json.dumps(values).encode(),
        "model.safetensors": safetensors(packed_tensors(method, weights("llama"))),
    }


def packed_tensors(method: str, whole: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The linear layers of blocks as GPTQ or AWQ store them; the others as they are."""
    tensors: dict[str, np.ndarray] = {}
    for name, weight in whole.items():
        if weight.ndim == 1 or "layers" not in name:
            tensors[name] = weight
            continue
        kernel = weight.T  # [in, out]
        groups = kernel.reshape(-1, 16, kernel.shape[1])
        scale = (np.abs(groups).max(1) / 7).astype(np.float16)
        codes = np.rint(groups / scale[:, None].astype(np.float32)) + 8
        codes = np.clip(codes, 0, 15).astype(np.uint32).reshape(kernel.shape)
        base, order = name.removesuffix("weight"), (0, 2, 4, 6, 1, 3, 5, 7)
        zeros = np.full(scale.shape, 7 if method == "gptq" else 8, np.uint32)
        if method == "gptq":
            tensors[base + "qweight"] = _words([codes[i::8] for i in range(8)])
            tensors[base + "qzeros"] = _words([zeros[:, i::8] for i in range(8)])
            tensors[base + "g_idx"] = (np.arange(len(kernel)) // 16).astype(np.int32)
        else:
            tensors[base + "qweight"] = _words([codes[:, i::8] for i in order])
            tensors[base + "qzeros"] = _words([zeros[:, i::8] for i in order])
        tensors[base + "scales"] = scale
    return tensors


def _words(fields: Sequence[np.ndarray]) -> np.ndarray:
    total = sum(field << np.uint32(4 * i) for i, field in enumerate(fields))
    return np.ascontiguousarray(total, np.uint32).view(np.int32)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GGUF_YARN = {
    "rope.scaling.type": (STRING, "yarn"),
    "rope.scaling.factor": (F32, 4.0),
    "rope.scaling.original_context_length": (U32, 64),
}

# Files by name, or the parts of a GGUF file.
SEEDS: dict[str, Callable[[], dict[str, bytes] | Gguf]] = {
    "hf llama": lambda: hugging_face("llama", rope_scaling=LLAMA3),
    "hf mistral, shards": lambda: hugging_face("mistral", shards=True),
    "hf qwen2": lambda: hugging_face("qwen2", rope_scaling={"type": "dynamic", "factor": 2.0}),
    "hf qwen3": lambda: hugging_face("qwen3", rope_scaling=YARN, layer_types=["full_attention"]),
    "gguf F32": lambda: gguf_file("F32", **GGUF_YARN),
    "gguf F16": lambda: gguf_file("F16", tokenizer="llama"),
    "gguf BF16": lambda: gguf_file("BF16", "qwen3"),
    **{f"gguf {kind}": lambda kind=kind: gguf_file(kind) for kind in ("Q8_0", "Q4_0", "Q4_1")},
    **{f"gguf {kind}": lambda kind=kind: gguf_file(kind) for kind in ("Q5_0", "Q5_1")},
    **{f"gguf {kind}": lambda kind=kind: gguf_file(kind) for kind in ("Q4_K", "Q5_K", "Q6_K")},
    "gptq": lambda: packed("gptq"),
    "awq": lambda: packed("awq"),
}
CONVERTED = "converted"  # made from the first one


def write(files: dict[str, bytes] | Gguf, directory: Path) -> Path:
    """Returns what is to be loaded."""
    directory.mkdir(parents=True)
    if isinstance(files, Gguf):
        (directory / "model.gguf").write_bytes(files.to_bytes())
        return directory / "model.gguf"
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory
