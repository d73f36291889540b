"""Log-probabilities of tokens under the target.

They are those of its raw distribution, log softmax of its logits in float32: before temperature,
top-k, top-p, min-p and the repetition penalty. So they say what the model thinks of a text however
it was drawn, greedily too, and speculation does not change them: the verification computes the same
logits that plain decoding does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MOST = 20  # alternatives a token


class Logprobs(NamedTuple):
    """Of M tokens a sequence, the N most likely ones at each place beside the one that is there.

    own  [B, M] float32          of the token itself
    ids  [B, M, N] int32         the most likely tokens, the likeliest first
    top  [B, M, N] float32       theirs
    """

    own: jax.Array
    ids: jax.Array
    top: jax.Array


def nothing(batch: int, tokens: int, number: int) -> Logprobs:
    """Room for so many tokens."""
    shape = (batch, tokens, number)
    return Logprobs(
        jnp.zeros((batch, tokens)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    )


def score(logits: jax.Array, tokens: jax.Array, number: int) -> Logprobs:
    """What the target's logits [B, S, N] say of `tokens` [B, S], and its `number` first choices."""
    total = jax.nn.logsumexp(logits, -1, keepdims=True)
    own = jnp.take_along_axis(logits, tokens[..., None], -1) - total
    top, ids = jax.lax.top_k(logits, number)
    return Logprobs(own[..., 0], ids.astype(jnp.int32), top - total)
