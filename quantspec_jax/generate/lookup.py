"""Prompt lookup: proposals copied from the text, where its last tokens stood before (Yang et al.,
LLMA, arXiv 2304.04487; `prompt_lookup_num_tokens` of transformers).

    ... the white whale that | had taken his leg ... of the white whale that | ?
        ───────────────────                             ─────────────────── the last tokens
                              ────────────────  proposed

Texts repeat names, code, quotations. A place is taken where `LEAST` tokens or more are the same,
the longest such run of up to `LONGEST`, the latest of equal ones. Where it overlaps the end, the
text goes round and round, and so do the proposals. A round that copies is a verification alone: it
comes in place of drafts, which are a pass each.

A coupling takes copies as it takes drafts, each as drawn from the distribution that has it alone:
tokens follow the target's distribution as ever. In a batch a round copies where every sequence that
has not finished has something to copy; else all of them draft. So the company of a batch may change
what is drawn, not its law; greedy text, and text of the coupling "invariant", stay the same.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LEAST = 4  # fewer are often the same by chance
LONGEST = 8
CHUNK = 1024  # positions that a block of a GPU's threads goes through


class Lookup(NamedTuple):
    """What a sequence needs for it.

    text    [B, T] int32, its tokens by position, up to the pending one; beyond, anything
    tokens  [B, k] int32, what came after the place that was found
    found   [B] bool, whether there was one
    """

    text: jax.Array
    tokens: jax.Array
    found: jax.Array


def unseen(batch: int, length: int, number: int) -> Lookup | None:
    """Room for texts of `length` tokens and `number` copies of each, none found; None where none
    are wanted."""
    if not number:
        return None
    text, tokens = (jnp.zeros((batch, width), jnp.int32) for width in (length, number))
    return Lookup(text, tokens, jnp.zeros(batch, bool))


def look(text: jax.Array, last: jax.Array, number: int) -> Lookup:
    """Look for the end of each text in what is before it.

    Args:
      text: [B, T] int32; last: [B] int32, position of its last token.
      number: k, how many tokens to copy.
    """
    length = text.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    back = last[:, None] - jnp.arange(LONGEST)[None]
    ending = jnp.where(back >= 0, jnp.take_along_axis(text, jnp.maximum(back, 0), 1), -1)
    ending = jax.lax.optimization_barrier(ending)  # else each position would gather it
    same, run = positions < last[:, None], jnp.zeros_like(text)
    for i in range(LONGEST):
        shifted = jnp.pad(text, ((0, 0), (i, 0)), constant_values=-2)[:, :length]
        same &= shifted == ending[:, i, None]
        run += same.astype(jnp.int32)
    # The longest run, then the latest: one number, found in two steps.
    chunks = -(-length // CHUNK)
    ranked = jnp.pad(run * length + positions, ((0, 0), (0, chunks * CHUNK - length)))
    best = jnp.max(jnp.max(ranked.reshape(-1, chunks, CHUNK), 2), 1)
    place, longest = best % length, best // length
    index = place[:, None] + 1 + jnp.arange(number)[None] % jnp.maximum(last - place, 1)[:, None]
    tokens = jnp.take_along_axis(text, jnp.minimum(index, length - 1), 1)
    return Lookup(text, tokens, longest >= LEAST)
