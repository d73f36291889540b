"""QuantSpec-JAX: self-speculative long-context decoding with a hierarchical 4-bit KV cache."""

from quantspec_jax.api import Generation, generate, stream
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.engine.engine import Engine
from quantspec_jax.engine.prepare import prepare
from quantspec_jax.engine.session import Session, Turn
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.prefill import prefill
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.loading import Model, load
from quantspec_jax.models.config import ModelConfig, RopeConfig, RopeScaling
from quantspec_jax.sharding import make_mesh
from quantspec_jax.weights.formats import DraftConfig

__version__ = "0.1.0"

__all__ = [
    "CacheConfig",
    "DecodeState",
    "DraftConfig",
    "Engine",
    "GenerateConfig",
    "Generation",
    "Model",
    "ModelConfig",
    "Program",
    "RopeConfig",
    "RopeScaling",
    "Session",
    "Turn",
    "generate",
    "generate_tokens",
    "load",
    "make_mesh",
    "prefill",
    "prepare",
    "stream",
]
