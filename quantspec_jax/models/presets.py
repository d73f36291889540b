"""Shapes of well-known models, for measurements with random weights."""

from __future__ import annotations

from quantspec_jax.models.config import ModelConfig, RopeConfig

PRESETS: dict[str, ModelConfig] = {
    "llama-2-7b": ModelConfig("llama", 32000, 4096, 11008, 32, 32, 32, 128, 131072, 1e-5),
    "llama-3.1-8b": ModelConfig(
        "llama",
        128256,
        4096,
        14336,
        32,
        32,
        8,
        128,
        131072,
        1e-5,
        RopeConfig("llama3", 500000.0, 8.0, 8192, 1.0, 4.0),
    ),
    "qwen2.5-7b": ModelConfig(
        "qwen2",
        152064,
        3584,
        18944,
        28,
        28,
        4,
        128,
        131072,
        1e-6,
        RopeConfig(theta=1e6),
        qkv_bias=True,
    ),
    "smollm2-135m": ModelConfig(
        "llama",
        49152,
        576,
        1536,
        30,
        9,
        3,
        64,
        8192,
        1e-5,
        RopeConfig(theta=1e5),
        tie_embeddings=True,
    ),
}
