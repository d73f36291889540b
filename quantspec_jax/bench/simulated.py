"""Acceptance without a model that means anything: for measurements with random weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from quantspec_jax.generate.couplings import Rejection, Verdict
from quantspec_jax.generate.sampling import Role, draw_keys

MOST = 32  # proposals a round


@dataclasses.dataclass(frozen=True)
class Simulated(Rejection):
    """Accepts each proposal with a probability, up to the first rejection, whatever it is, in place
    of what the rest of the round found. The text then means nothing.

    Args:
      alphas: of the places of a round, given that those before were accepted; the last one is that
        of all places beyond, too.
    """

    alphas: tuple[float, ...] = (1.0,)

    def greedy(self, best, proposals, proposed, keys, position) -> Verdict:
        """See `Coupling.greedy`."""
        verdict = super().greedy(best, proposals, proposed, keys, position)
        return Verdict(_accepted(self.alphas, proposed, keys, position), verdict.token)

    def verdict(self, p, q, proposals, proposed, keys, position) -> Verdict:
        """See `Coupling.verdict`."""
        verdict = super().verdict(p, q, proposals, proposed, keys, position)
        return Verdict(_accepted(self.alphas, proposed, keys, position), verdict.token)


def _accepted(
    alphas: tuple[float, ...], proposed: jax.Array, keys: jax.Array, position: jax.Array
) -> jax.Array:
    """[B] how many of `proposed` [B], by draws that depend on key and position alone."""
    draws = jax.vmap(lambda key: jax.random.uniform(key, (MOST,)))(
        draw_keys(keys, position - 1, Role.ACCEPT)
    )
    places = jnp.minimum(jnp.arange(MOST), len(alphas) - 1)
    hits = draws < jnp.asarray(alphas)[places][None]
    run = jnp.sum(jnp.cumprod(hits, 1, dtype=jnp.int32), 1, dtype=jnp.int32)
    return jnp.minimum(run, proposed)
