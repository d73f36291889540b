"""Perplexity of each view of the cache, and acceptance of the draft (`quantspec eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pallas_kernels.kv_attention.read import Read
from quantspec_jax.cache.codecs import CODECS
from quantspec_jax.checks import require
from quantspec_jax.evaluate.teacher_forced import Overlap, compare, score
from quantspec_jax.generate.config import Backend
from quantspec_jax.generate.policies import policy
from quantspec_jax.loading import Model
from quantspec_jax.text.prompts import read_prompts
from quantspec_jax.weights.sizes import bits_per_weight

SHORTEST = 8
VIEWS = (*CODECS["full"].views, *CODECS["hierarchical"].views)


def perplexity(
    model: Model,
    tokens: str | Sequence[int],
    *,
    context: int | None = None,
    group_size: int = 128,
    progress: bool = False,
    backend: Backend = "auto",
) -> dict[str, Any]:
    """Perplexity of a text, and how often the top token is the full-precision cache's, by view.

    Args:
      tokens: a text or its token ids.
      context: how many of the tokens to read; None: all. Positions from context/4 on are counted.
      group_size: G of the cache.
      progress: show a bar on standard error for each view.

    Returns:
      perplexity {full, int8, int4}, same_top_token {int8, int4} as shares of the counted tokens,
      and tokens, how many were counted.

    Raises:
      ValueError: an argument is wrong, or the text is shorter or the model's context less.
    """
    ids = read_tokens(model, tokens, context)
    counted = slice(len(ids) // 4, len(ids) - 1)
    scores = {
        view: score(model, ids, view, group_size=group_size, backend=backend, progress=progress)
        for view in VIEWS
    }

    def mean(x: np.ndarray) -> float:
        return float(x[counted].mean(dtype=np.float64))

    return {
        "perplexity": {view: float(np.exp(-mean(scores[view].log_prob))) for view in VIEWS},
        "same_top_token": {
            view: mean(scores[view].top == scores["full"].top) for view in VIEWS if view != "full"
        },
        "tokens": counted.stop - counted.start,
    }


def acceptance(
    model: Model,
    tokens: str | Sequence[int],
    *,
    context: int | None = None,
    first: int | None = None,
    draft_policy: str = "all",
    draft_share: float | None = None,
    draft_view: str | None = None,
    group_size: int = 128,
    progress: bool = False,
    backend: Backend = "auto",
) -> dict[str, Any]:
    """The chance that a round's first proposal is accepted, over the positions of a text.

    Args:
      tokens: a text or its token ids.
      context: how many of the tokens to read; None: all.
      first: the first position that counts; None: context/4.
      draft_policy, draft_share, draft_view: what the draft reads of the cache, as in
        `GenerateConfig`; each position as the first of its round (`evaluate.pages`).
      group_size: G of the cache.
      progress: show a bar on standard error.

    Returns:
      greedy_acceptance: share of the positions where draft and target have the same top token.
      sampled_acceptance: mean of Σ min(p, q) at temperature 1, p the target's distribution and q
        the draft's.
      positions: how many were counted; draft: what the draft is; draft_policy and draft_share: what
        it reads; draft_bits_per_weight: of the linear layers of its blocks, scales and minima
        counted, layers left alone counted at 16.

    Raises:
      ValueError: an argument is wrong, or the text is shorter or the model's context less.
    """
    ids = read_tokens(model, tokens, context)
    first = len(ids) // 4 if first is None else first
    require(0 <= first < len(ids), "first", first, f"a position from 0 to {len(ids) - 1}")
    chosen, read = policy(draft_policy, draft_share), draft_read(draft_view)
    options: dict[str, Any] = {"group_size": group_size, "backend": backend, "progress": progress}
    seen = compare(model, ids, policy=chosen, draft_read=read, first=first, **options)
    return {
        **accepted(seen, first),
        "positions": len(ids) - first,
        "draft": model.draft.describe(),
        "draft_policy": chosen.name,
        "draft_share": chosen.share,
        "draft_view": read.view,
        "draft_bits_per_weight": bits_per_weight(model.config, model.draft),
    }


def draft_read(view: str | None) -> Read:
    """What a draft reads of a page: as the codec says, or another view of it."""
    codec = CODECS["hierarchical"]
    require(view in (None, *codec.views), "draft_view", view, ", ".join(codec.views))
    return codec.draft if view in (None, codec.draft.view) else Read(view)


def accepted(seen: Overlap, first: int) -> dict[str, float]:
    """greedy_acceptance and sampled_acceptance over the positions from `first` on."""
    return {
        "greedy_acceptance": float((seen.top == seen.draft_top)[first:].mean()),
        "sampled_acceptance": float(seen.overlap[first:].mean(dtype=np.float64)),
    }


def read_tokens(model: Model, tokens: str | Sequence[int], context: int | None) -> list[int]:
    """The first `context` token ids, checked."""
    texts = read_prompts(tokens, model.tokenizer, model.config.vocab_size)
    require(len(texts) == 1, "tokens", f"{len(texts)} texts", "one text")
    (ids,) = texts
    context = len(ids) if context is None else context
    limit = model.config.max_context
    allowed = f"{SHORTEST} to {limit} tokens, the model's context"
    require(SHORTEST <= context <= limit, "context", context, allowed)
    require(len(ids) >= context, "tokens", f"{len(ids)} tokens", f"{context} (context) or more")
    return ids[:context]
