"""What `quantspec info` prints: a model's architecture and sizes, from its headers alone."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any, Protocol

import jax
import numpy as np

from quantspec_jax.cache import cache_bytes, create
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.dtypes import BFLOAT16
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.sizes import bits_per_weight, draft_bytes, layer_formats

CONTEXTS = (2048, 8192, 32768, 131072)
CACHE_DTYPE = BFLOAT16  # of the tokens in full precision


class Opened(Protocol):
    """A checkpoint whose headers are read, as `convert.open_source` gives it."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def draft_config(self) -> DraftConfig | None: ...

    @property
    def storage(self) -> str: ...

    @property
    def source_dtype(self) -> np.dtype: ...

    @property
    def parameter_count(self) -> int: ...


def info(source: str, checkpoint: Opened) -> dict[str, Any]:
    """Architecture, parameters, draft and cache sizes of what was opened by the name `source`."""
    config = checkpoint.config
    stored = checkpoint.draft_config
    draft = stored or DraftConfig()
    return {
        "source": str(source),
        "architecture": config.to_dict(),
        "context_limit": config.max_context,
        "stored_as": checkpoint.storage,
        "dtype": checkpoint.source_dtype.name,
        "parameters": checkpoint.parameter_count,
        "parameter_bytes": checkpoint.parameter_count * checkpoint.source_dtype.itemsize,
        "draft": draft.describe(),
        "draft_stored": stored is not None,
        "draft_bytes": draft_bytes(config, draft),
        "draft_bits_per_weight": bits_per_weight(config, draft),
        "draft_formats": formats(config, draft),
        "cache_dtype": CACHE_DTYPE.name,
        "cache": [cache_sizes(config, context) for context in contexts(config)],
    }


def formats(config: ModelConfig, draft: DraftConfig) -> list[dict[str, Any]]:
    """How many linear layers the draft stores in each format, the most common first."""
    counted = collections.Counter(layer_formats(config, draft).values())
    return [
        {"layers": count, **dataclasses.asdict(stored)} for stored, count in counted.most_common()
    ]


def contexts(config: ModelConfig) -> list[int]:
    """The contexts to report: none beyond the model's own."""
    return sorted({min(context, config.max_context) for context in CONTEXTS})


def cache_sizes(config: ModelConfig, context: int) -> dict[str, int]:
    """`cache_bytes` of one sequence of `context` tokens; nothing is allocated."""
    cache_config = CacheConfig(max_length=context, dtype=CACHE_DTYPE)

    def sizes(layers: int) -> dict[str, int]:
        model = dataclasses.replace(config, num_layers=layers)
        cache = jax.eval_shape(functools.partial(create, model, cache_config, 1))
        return cache_bytes(cache, context)

    one, two = sizes(1), sizes(2)  # each further layer takes as much again
    more = config.num_layers - 1
    return {"context": context} | {k: one[k] + more * (two[k] - one[k]) for k in one}


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    config = result["architecture"]
    rope = config["rope"]
    parts = [
        ("family", config["family"]),
        (
            "layers",
            f"{config['num_layers']}, hidden {config['hidden_size']}, "
            f"intermediate {config['intermediate_size']}",
        ),
        (
            "attention",
            f"{config['num_heads']} heads, {config['num_kv_heads']} key-value heads, "
            f"head_dim {config['head_dim']}",
        ),
        (
            "vocabulary",
            f"{config['vocab_size']:,}"
            f"{', tied embeddings' if config['tie_embeddings'] else ''}, "
            f"EOS {', '.join(map(str, config['eos_ids'])) or 'none'}",
        ),
        ("context", f"{result['context_limit']:,} (RoPE {_rope(rope)}, theta {rope['theta']:g})"),
        (
            "parameters",
            f"{result['parameters']:,}, {_size(result['parameter_bytes'])} as {result['dtype']}, "
            f"stored as {result['stored_as']}",
        ),
        (
            "draft",
            f"{result['draft']}{' (stored)' if result['draft_stored'] else ''}: "
            f"{_size(result['draft_bytes'])}, {result['draft_bits_per_weight']:.2f} bits a weight",
        ),
    ]
    if len(result["draft_formats"]) > 1:
        parts.append(("", "; ".join(map(_format_line, result["draft_formats"]))))
    columns = ("upper", "lower", "scales", "buffer", "total", "bf16_equivalent")
    head = "".join(name.replace("bf16_equivalent", "bf16 cache").rjust(12) for name in columns)
    lines = [f"{name:<12}{value}" for name, value in parts]
    lines.append(f"{'cache of':<12}{head}{'ratio':>8}")
    for row in result["cache"]:
        cells = "".join(_size(row[name]).rjust(12) for name in columns)
        ratio = row["total"] / row["bf16_equivalent"]
        lines.append(f"{row['context']:<12,}{cells}{ratio:>8.3f}")
    return "\n".join(lines)


def _rope(rope: dict[str, Any]) -> str:
    """The scaling, by what, and of which context."""
    if rope["type"] == "default":
        return "default"
    original = rope["original_max_position"]
    context = "" if original is None else f" from {original:,}"
    return f"{rope['type']} × {rope['factor']:g}{context}"


def _format_line(row: dict[str, Any]) -> str:
    if row["bits"] == 16:
        return f"{row['layers']} layers as they are"
    kind = "symmetric" if row["symmetric"] else "asymmetric"
    return f"{row['layers']} layers {row['bits']}-bit {kind}, group {row['group_size']}"


def _size(count: int) -> str:
    """Bytes in binary units."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
