"""A loaded model: configuration, parameters, tokenizer and, when it is needed, a draft."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from quantspec_jax import compilation_cache
from quantspec_jax.config import DraftConfig, ModelConfig, require
from quantspec_jax.draft import merge, quantize_params
from quantspec_jax.models.attention import causal_attention
from quantspec_jax.models.decoder import Params, check_params, forward, unembed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16")


class Model:
    """What `load` returns and `generate` takes.

    Args:
      config: the architecture.
      params: the tree of `quantspec_jax.models.parameters`, arrays of one float type.
      tokenizer: a transformers tokenizer, or None (then prompts are token ids and texts empty).
      draft: how the draft's weights are quantized.
      draft_entries: the draft's own entries of the tree if they exist already (a stored draft);
        None: made from `params` on first use.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: PreTrainedTokenizerBase | None = None,
        draft: DraftConfig | None = None,
        draft_entries: dict[str, Any] | None = None,
    ):
        check_params(config, params)
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.draft = draft or DraftConfig()
        self.dtype = str(params["embedding"].dtype)
        require(self.dtype in DTYPES, "params dtype", self.dtype, ", ".join(DTYPES))
        self._draft_entries = draft_entries

    @functools.cached_property
    def draft_params(self) -> Params:
        """The draft's tree: packed 4-bit kernels, every other array shared with `params`."""
        entries = self._draft_entries
        if entries is None:
            entries = quantize_params(self.params, self.draft)
        return merge(self.params, entries)

    def logits(self, tokens: Any) -> jax.Array:
        """Full-precision logits: token ids [B, S] → [B, S, N] float32."""
        tokens = np.asarray(tokens)
        require(tokens.ndim == 2, "tokens", tokens.shape, "an array of shape [B, S]")
        require(np.issubdtype(tokens.dtype, np.integer), "tokens dtype", tokens.dtype, "integers")
        inside = (tokens >= 0) & (tokens < self.config.vocab_size)
        require(
            bool(inside.all()),
            "tokens",
            tokens[~inside][:3].tolist(),
            f"ids from 0 to {self.config.vocab_size - 1}",
        )
        return full_logits(self.params, jnp.asarray(tokens, jnp.int32), self.config)


@functools.partial(jax.jit, static_argnames="config")
def full_logits(params: Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """Causal forward pass in full precision, no cache: [B, S] → [B, S, N] float32."""
    b, s = tokens.shape

    def attend(state: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return causal_attention(q, k, v, config.head_dim**-0.5), state

    hidden, _ = forward(
        params,
        config,
        tokens,
        jnp.broadcast_to(jnp.arange(s), (b, s)),
        (None,) * config.num_layers,
        attend,
        rope_length=s,
    )
    return unembed(params, hidden)


def default_dtype() -> str:
    """float32 on the CPU, bfloat16 on an accelerator."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load(source: str, dtype: str | None = None, draft: DraftConfig | None = None) -> Model:
    """Load a model.

    Args:
      source: directory that `quantspec convert` wrote, local Hugging Face directory (safetensors),
        GGUF file, or hub id.
      dtype: `float32` or `bfloat16`; None: float32 on the CPU, bfloat16 elsewhere.
      draft: how to quantize the draft's weights. None: the draft stored with the checkpoint, else
        `DraftConfig()`. `DraftConfig(bits=None)` drafts with the full weights.

    Turns JAX's persistent compilation cache on (`quantspec_jax.compilation_cache`).

    Raises:
      ValueError: the source or an argument is wrong; says which.
    """
    dtype = dtype or default_dtype()
    require(dtype in DTYPES, "dtype", dtype, ", ".join(DTYPES))
    compilation_cache.enable()
    import convert  # the one import against the direction of the packages, with the CLI's

    checkpoint = convert.open_source(str(source))
    stored = checkpoint.load_draft() if draft is None else None
    params = checkpoint.load(dtype)
    if stored is not None:
        return Model(checkpoint.config, params, checkpoint.tokenizer, *stored)
    return Model(checkpoint.config, params, checkpoint.tokenizer, draft)
