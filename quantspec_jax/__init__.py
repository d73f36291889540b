"""QuantSpec-JAX: self-speculative long-context decoding with a hierarchical 4-bit KV cache."""

from quantspec_jax.api import Generation, generate, stream
from quantspec_jax.config import CacheConfig, DraftConfig, GenerateConfig, ModelConfig, RopeConfig
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.prefill import prefill
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.model import Model, load

__version__ = "0.1.0"

__all__ = [
    "CacheConfig",
    "DecodeState",
    "DraftConfig",
    "GenerateConfig",
    "Generation",
    "Model",
    "ModelConfig",
    "Program",
    "RopeConfig",
    "generate",
    "generate_tokens",
    "load",
    "prefill",
    "stream",
]
