"""A loaded model: configuration, parameters, tokenizer and, when it is needed, a draft."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from quantspec_jax import compilation_cache
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.checks import require
from quantspec_jax.dtypes import BFLOAT16, FLOAT32, float_type
from quantspec_jax.models.attention import causal_attention
from quantspec_jax.models.config import ModelConfig, RopeScaling
from quantspec_jax.models.decoder import forward, unembed
from quantspec_jax.models.parameters import Params, check_params
from quantspec_jax.models.projection import Projection
from quantspec_jax.models.rope import rope_frequencies, rope_tables
from quantspec_jax.sharding import (
    check_draft,
    check_mesh,
    default_draft,
    mesh_of,
    place_model,
    place_params,
)
from quantspec_jax.stored_kv import StoredKV
from quantspec_jax.weights.entries import draft_tree, quantize_params, with_first
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.sizes import layer_formats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LearnedKV(NamedTuple):
    """A codec of the cache that is stored with a checkpoint, and what it has learned of each
    layer."""

    stored: StoredKV
    learned: list[Any]


class Model:
    """What `load` returns and `generate` takes.

    Args:
      config: the architecture.
      params: the tree of `quantspec_jax.models.parameters`, arrays of one float type.
      tokenizer: a transformers tokenizer, or None (then prompts are token ids and texts empty).
      draft: how the draft's weights are quantized.
      draft_entries: the draft's own entries of the tree if they exist already (a stored draft);
        None: rounded from `params` on first use.
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
        self.kv: LearnedKV | None = None
        if draft_entries is None:
            _check_made_at_load(config, self.draft)
        self.dtype = float_type(params["embedding"].dtype, "params dtype")
        self.draft_entries = draft_entries

    @functools.cached_property
    def draft_params(self) -> Params:
        """The draft's tree: packed 4-bit kernels, every other array shared with `params`."""
        entries, mesh = self.draft_entries, mesh_of(self.params)
        check_draft(self.config, self.draft, mesh)
        if entries is None:  # of parts become parts
            entries = quantize_params(self.params, self.draft)
        entries = with_first(self.params, entries, self.draft)
        self.draft_entries = None  # may be held in another arrangement from now on
        entries = place_params(self.config, entries, mesh)
        return place_params(self.config, draft_tree(self.params, entries), mesh)

    def params_for(self, cache: CacheConfig) -> Params:
        """The parameters that decoding with the cache takes: with what its codec has learned."""
        if not cache.codec.recodes:
            return self.params
        assert self.kv is not None
        return self.params | {"kv": self.kv.learned}

    @property
    def has_draft_arrays(self) -> bool:
        """Whether the draft's own arrays exist already; else `draft_params` makes them."""
        return "draft_params" in vars(self) or self.draft_entries is not None

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
    s = tokens.shape[1]

    def attend(state: None, heads: Projection) -> tuple[jax.Array, None]:
        return causal_attention(*heads.finished(), config.head_dim**-0.5), state

    frequencies = rope_frequencies(config.rope, config.head_dim, s)
    rope = rope_tables(*frequencies, jnp.arange(s)[None])
    layers = (None,) * config.num_layers
    hidden, _ = forward(params, config, tokens, rope, layers, attend, backend="xla")
    return unembed(params, hidden)


def default_dtype() -> np.dtype:
    """float32 on the CPU, bfloat16 on an accelerator."""
    return FLOAT32 if jax.default_backend() == "cpu" else BFLOAT16


def _check_made_at_load(config: ModelConfig, draft: DraftConfig) -> None:
    """ValueError for a draft that rounding does not make, or layers that the model has not."""
    if draft.method == "gptq":
        raise ValueError(
            "draft method is 'gptq', which calibrates on a text; allowed here: rtn. Convert once "
            "with --draft gptq (in Python: convert.convert), and load what that writes"
        )
    if draft.method == "imported":
        raise ValueError(
            "draft method is 'imported': name the quantized checkpoint instead of a DraftConfig"
        )
    layer_formats(config, draft)


def load(
    source: str,
    dtype: DTypeLike | None = None,
    draft: DraftConfig | str | Path | None = None,
    *,
    rope: RopeScaling | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Load a model.

    Args:
      source: directory that `quantspec convert` wrote, local Hugging Face directory (safetensors),
        GGUF file, or hub id.
      dtype: `float32` or `bfloat16`; None: float32 on the CPU, bfloat16 elsewhere.
      draft: how to quantize the draft's weights. None: the draft stored with the checkpoint, else
        `DraftConfig()`, over a mesh in smaller groups where it splits those.
        `DraftConfig(bits=None)` drafts with the full weights. A path or hub id: a 4-bit checkpoint
        of the same model (GGUF, GPTQ, AWQ) whose codes become the draft's.
      rope: a RoPE scaling that stretches the model's context, in place of the checkpoint's own
        (`ModelConfig.scaled`); None: the checkpoint's. No draft's weights depend on it.
      mesh: of devices that hold the model together, with axes `tp`, `cp` and `dp`
        (`quantspec_jax.sharding`); each reads its part. None: the default device.

    Turns JAX's persistent compilation cache on (`quantspec_jax.compilation_cache`).

    Raises:
      ValueError: the source or an argument is wrong; says which.
    """
    dtype = default_dtype() if dtype is None else float_type(dtype)
    compilation_cache.enable()
    import convert  # the one import against the direction of the packages, with the CLI's

    checkpoint = convert.open_source(str(source), rope)
    config = checkpoint.config
    if mesh is not None:
        check_mesh(config, mesh)
    if isinstance(draft, str | Path):
        quantized = convert.open_draft(draft, config)
        if mesh is not None:
            check_draft(config, quantized.draft_config(), mesh)
        params = checkpoint.load(dtype, device=mesh)
        model = Model(config, params, checkpoint.tokenizer, *quantized.load(params))
    else:
        if draft is not None:
            _check_made_at_load(config, draft)
        wanted = draft or checkpoint.draft_config
        if mesh is not None:
            wanted = wanted or default_draft(config, mesh)
            check_draft(config, wanted, mesh)
        stored = checkpoint.load_draft(mesh) if draft is None else None
        params = checkpoint.load(dtype, device=mesh)
        model = Model(config, params, checkpoint.tokenizer, *(stored or (wanted,)))
    if (kv := checkpoint.load_kv()) is not None:
        model.kv = LearnedKV(*kv)
    return model if mesh is None else place_model(model, mesh)
