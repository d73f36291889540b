"""The verification: the target on the pending token and the proposals, all at once."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.kv_attention.read import ByPage
from pallas_kernels.shapes import Ids, Judged, shaped
from quantspec_jax.cache import KVCache
from quantspec_jax.generate.cache_pass import Rope, observed_pass
from quantspec_jax.generate.state import DecodeState, Program
from quantspec_jax.models.parameters import Params


@shaped
def verify(
    params: Params, state: DecodeState, proposals: Ids, rope: Rope, program: Program
) -> tuple[Judged, KVCache, list[ByPage] | None]:
    """Args:
      state: before the round, its cache after the draft; proposals: [B, γ] int32.
      rope: cos and sin of the round's positions.

    Returns:
      [B, γ + 1, N] float32 logits, row i for the position i + 1 after the pending token's; the
      cache with the rows' own keys and values; and, where the next draft's policy looks at it, the
      rows' attention by page (`observed_pass`).
    """
    b, gamma = proposals.shape
    padding = jnp.zeros((b, program.cache.pass_width - gamma - 1), jnp.int32)
    tokens = jnp.concatenate([state.pending[:, None], proposals, padding], 1)
    masses = program.policy.votes and gamma > 0
    call = (params, program, state.cache, tokens, state.cache.length, program.read)
    logits, cache, seen = observed_pass(*call, rope=rope, masses=masses)
    return logits[:, : gamma + 1], cache, seen
