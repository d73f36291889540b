"""Couplings: how the draft's draws and the target's are tied together in a round.

With p the target's and q the draft's distribution at a position, both warped alike, and x the
proposals, x ~ q one after the other, each coupling keeps some of them and one more token so that
every token follows p, whatever q is. They differ in what is shared and in how much is kept:

    rejection   a proposal is kept with probability min(1, p(x)/q(x)), up to the first that is not
    block       the whole run of proposals is judged at once: keeps as many or more, on average
    invariant   draft and target share their noise: the text is that of plain sampling, to the token

At temperature 0, p and q are one-hot and each of them is the greedy rule: accept while the draft's
token is the target's argmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from quantspec_jax.checks import require
from quantspec_jax.generate.sampling import Role, draw, draw_keys

ROUND = len(Role)  # a stream of its own beside the roles: it leads to the keys of one round


class Verdict(NamedTuple):
    """What a round keeps: `accepted` proposals and one token of the target's own after them."""

    accepted: jax.Array  # [B] int32
    token: jax.Array  # [B] int32


class Coupling(Protocol):
    """What a round needs to know of a coupling. `position` [B] int32 is in all of it the sequence
    position of the round's first proposal."""

    @property
    def draft_role(self) -> Role:
        """The stream that the draft draws its proposals from."""

    def draft_keys(self, keys: jax.Array, position: jax.Array) -> jax.Array:
        """[B] typed keys of the sequences → [B] keys that the draft draws with in this round."""

    def greedy(
        self,
        best: jax.Array,
        proposals: jax.Array,
        proposed: jax.Array,
        keys: jax.Array,
        position: jax.Array,
    ) -> Verdict:
        """`verdict` where no sequence samples: best [B, γ+1] are the target's tokens."""

    def verdict(
        self,
        p: jax.Array,
        q: jax.Array,
        proposals: jax.Array,
        proposed: jax.Array,
        keys: jax.Array,
        position: jax.Array,
    ) -> Verdict:
        """Judge a round's proposals.

        Args:
          p: [B, γ+1, N] float32 probabilities; row i is the target's after proposals 0..i−1.
          q: [B, γ, N] float32, what each proposal was drawn from. γ may be 0: then the token is
            drawn from p alone, as in autoregressive decoding.
          proposals: [B, γ] int32.
          proposed: [B] int32, 0..γ: only the first so many proposals count.
          keys: [B] typed keys, one a sequence (not the draft's).
          position: [B] int32.
        """


def leading(holds: jax.Array, proposed: jax.Array) -> jax.Array:
    """[B] int32: how many of the first `proposed` of [B, γ] hold without a gap."""
    number, goes_on = jnp.zeros_like(proposed), jnp.ones_like(proposed, bool)
    for i in range(holds.shape[1]):  # in place of a sum over them: that would be a launch
        goes_on &= holds[:, i] & (i < proposed)
        number += goes_on.astype(jnp.int32)
    return number


def _last(holds: jax.Array, proposed: jax.Array) -> jax.Array:
    """[B] int32: the number, from 1, of the last of the first `proposed` of [B, γ] that holds."""
    number = jnp.arange(1, holds.shape[1] + 1)[None]
    holding = jnp.where(holds & (number <= proposed[:, None]), number, 0)
    return jnp.max(holding, 1, initial=0).astype(jnp.int32)


def row(x: jax.Array, i: jax.Array) -> jax.Array:
    """[B, S, ...] → [B, ...], row i of each sequence."""
    index = i.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, 1)[:, 0]


def _at(probabilities: jax.Array, tokens: jax.Array) -> jax.Array:
    """[B, γ, N] at tokens [B, γ] → [B, γ]."""
    return jnp.take_along_axis(probabilities, tokens[..., None], -1)[..., 0]


def _uniforms(keys: jax.Array, position: jax.Array, gamma: int) -> jax.Array:
    """[B, γ] in [0, 1), one for each proposal."""
    positions = position[:, None] + jnp.arange(gamma)[None]
    each = jax.vmap(lambda at: draw_keys(keys, at, Role.ACCEPT), 1, 1)(positions)
    return jax.vmap(jax.vmap(jax.random.uniform))(each)


def _accepts(u: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    """u < p/q, for u uniform in [0, 1), without the division."""
    return u * q < p


def _residual(p: jax.Array, q: jax.Array) -> jax.Array:
    """[B, N] max(p − q, 0), unnormalized; p where rounding left nothing of it."""
    rest = jnp.maximum(p - q, 0.0)
    return jnp.where(jnp.sum(rest, -1, keepdims=True) > 0, rest, p)


class Greedy:
    """What all couplings are at temperature 0."""

    def greedy(
        self,
        best: jax.Array,
        proposals: jax.Array,
        proposed: jax.Array,
        keys: jax.Array,
        position: jax.Array,
    ) -> Verdict:
        """Accept while the draft's token is the target's."""
        accepted = leading(best[:, :-1] == proposals, proposed)
        return Verdict(accepted, row(best, accepted))


@dataclasses.dataclass(frozen=True)
class Rejection(Greedy):
    """Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1).

    A proposal x is accepted with probability min(1, p(x)/q(x)), the first one rejected is replaced
    by a draw from norm(max(p − q, 0)), and where all are accepted one more token comes from p.

    What a round keeps up to a position is decided by draws for positions up to it: so draws may
    depend on the position alone, although a position is drawn again in the next round.
    """

    draft_role = Role.DRAFT

    def draft_keys(self, keys: jax.Array, position: jax.Array) -> jax.Array:
        """The sequences' own."""
        return keys

    def verdict(
        self,
        p: jax.Array,
        q: jax.Array,
        proposals: jax.Array,
        proposed: jax.Array,
        keys: jax.Array,
        position: jax.Array,
    ) -> Verdict:
        """See `Coupling.verdict`."""
        gamma = proposals.shape[1]
        u = _uniforms(keys, position, gamma)
        accepts = _accepts(u, _at(p[:, :gamma], proposals), _at(q, proposals))
        accepted = leading(accepts, proposed)
        # No draft stands at the row after the last proposal: there all of p is residual.
        beside = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
        rejected = (accepted < proposed)[:, None]
        weights = _residual(row(p, accepted), jnp.where(rejected, row(beside, accepted), 0.0))
        return Verdict(accepted, draw(weights, keys, position + accepted, Role.TARGET))


def _carried(p: jax.Array, q: jax.Array) -> jax.Array:
    """[B, γ+1] w from p and q [B, γ] at the proposals: w₀ = 1, wᵢ = min(wᵢ₋₁ p/q, 1)."""
    rows = [jnp.ones(p.shape[0], jnp.float32)]
    for i in range(p.shape[1]):
        share = rows[-1] * p[:, i]
        # Where q is the smaller, 1; but never for a token that the target cannot produce.
        most = (share > 0).astype(jnp.float32)
        small = share < q[:, i]
        rows.append(jnp.where(small, share / jnp.where(small, q[:, i], 1.0), most))
    return jnp.stack(rows, 1)


def _excess(w: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    """[B, S] a = Σ max(w p − q, 0), from w [B, S], p and q [B, S, N]."""
    return jnp.sum(jnp.maximum(w[..., None] * p - q, 0.0), -1)


def _chances(w: jax.Array, excess: jax.Array, proposed: jax.Array) -> jax.Array:
    """[B, γ] h₁ … h_γ from w₁ … w_γ [B, γ] and a₁ … [B, γ−1], of which `proposed` [B] count."""
    after = jnp.pad(excess, ((0, 0), (0, w.shape[1] - excess.shape[1])))
    parts = after + (1 - w)
    # w = 1 and a = 0: the next proposal is kept for certain, and h does not matter. Where rounding
    # makes that untrue, 1 keeps this one.
    between = jnp.where(parts > 0, after / jnp.where(parts > 0, parts, 1.0), 1.0)
    final = jnp.arange(1, w.shape[1] + 1)[None] == proposed[:, None]
    return jnp.where(final, w, between)


@dataclasses.dataclass(frozen=True)
class Block(Greedy):
    """Block verification (Sun et al., arXiv 2403.10444, algorithm 2).

    With γ proposals that count, pᵢ and qᵢ the distributions after i of them, and all sums over N:

        w₀ = 1,  wᵢ = min(wᵢ₋₁ pᵢ₋₁(xᵢ) / qᵢ₋₁(xᵢ), 1)
        aᵢ = Σ max(wᵢ pᵢ − qᵢ, 0)                    i < γ
        hᵢ = aᵢ / (aᵢ + 1 − wᵢ),  h_γ = w_γ
        τ  = the last i with uᵢ < hᵢ, or 0           u₁ … u_γ uniform, independent
        token ~ norm(max(w_τ p_τ − q_τ, 0)), or p_γ where τ = γ

    Why every token follows p. First, P(τ ≥ i | x₁ … xᵢ) = wᵢ: it is h_γ for i = γ; and if it holds
    for i + 1, then Σ qᵢ min(wᵢ pᵢ/qᵢ, 1) = Σ min(wᵢ pᵢ, qᵢ) = wᵢ − aᵢ is the chance of τ > i, and
    hᵢ + (1 − hᵢ)(wᵢ − aᵢ) = wᵢ is what defines hᵢ. So τ = i has the chance aᵢ, and given x₁ … xᵢ
    the token after them is y, a kept proposal or the round's own, with

        min(wᵢ pᵢ(y), qᵢ(y)) + aᵢ max(wᵢ pᵢ(y) − qᵢ(y), 0) / aᵢ = wᵢ pᵢ(y):

    of the texts that begin with x₁ … xᵢ the share Q(x₁ … xᵢ) wᵢ comes from rounds that reach
    position i and goes on with pᵢ, the others were ended before and go on with pᵢ in later rounds.

    Rejection sampling keeps i proposals with Π min(p/q, 1), which is never more than wᵢ. Here a
    large ratio makes up for a small one after it, as far as 1.

    A proposal is kept for the sake of later ones. So what a round keeps depends on all its draws,
    those for positions that are drawn again in the next round too: draws that depended on the
    position alone would then be biased by the rejection. Proposals and `u` are drawn with keys of
    the round, which its first position gives; the token at the end, kept always, as ever.
    """

    draft_role = Role.DRAFT

    def draft_keys(self, keys: jax.Array, position: jax.Array) -> jax.Array:
        """Keys of the round."""

        def one(key: jax.Array, at: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(key, at), ROUND)

        return jax.vmap(one)(keys, position)

    def verdict(
        self,
        p: jax.Array,
        q: jax.Array,
        proposals: jax.Array,
        proposed: jax.Array,
        keys: jax.Array,
        position: jax.Array,
    ) -> Verdict:
        """See `Coupling.verdict`."""
        gamma = proposals.shape[1]
        w = _carried(_at(p[:, :gamma], proposals), _at(q, proposals))
        excess = _excess(w[:, 1:gamma], p[:, 1:gamma], q[:, 1:])
        chances = _chances(w[:, 1:], excess, proposed)
        u = _uniforms(self.draft_keys(keys, position), position, gamma)
        accepted = _last(u < chances, proposed)
        beside = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
        rejected = accepted < proposed
        share = jnp.where(rejected, row(w, accepted), 1.0)[:, None]
        weights = _residual(
            share * row(p, accepted), jnp.where(rejected[:, None], row(beside, accepted), 0.0)
        )
        return Verdict(accepted, draw(weights, keys, position + accepted, Role.TARGET))


@dataclasses.dataclass(frozen=True)
class Invariant(Greedy):
    """Shared Gumbel noise (Daliri, Musco, Suresh, arXiv 2408.07978).

    With noise g_t that depends on the sequence's key and the position t alone,

        the draft proposes         argmax(log q + g_t)
        the target's token is      argmax(log p + g_t)

    and proposals are accepted while both are the same. What is kept is the target's token at each
    position, with the noise that autoregressive decoding has there: the text is the one that plain
    sampling makes with the same key, whatever γ, draft, policy or batch. Both agree with a chance
    of Σᵢ 1 / Σⱼ max(pⱼ/pᵢ, qⱼ/qᵢ), which is at least (1 − d)/(1 + d) where rejection sampling
    accepts with 1 − d, d being the total variation distance of p and q.
    """

    draft_role = Role.TARGET

    def draft_keys(self, keys: jax.Array, position: jax.Array) -> jax.Array:
        """The sequences' own."""
        return keys

    def verdict(
        self,
        p: jax.Array,
        q: jax.Array,
        proposals: jax.Array,
        proposed: jax.Array,
        keys: jax.Array,
        position: jax.Array,
    ) -> Verdict:
        """See `Coupling.verdict`."""
        gamma = proposals.shape[1]
        positions = position[:, None] + jnp.arange(gamma + 1)[None]
        tokens = jax.vmap(lambda p, at: draw(p, keys, at, Role.TARGET), 1, 1)(p, positions)
        accepted = leading(tokens[:, :gamma] == proposals, proposed)
        return Verdict(accepted, row(tokens, accepted))


REJECTION = Rejection()
_BY_NAME: Mapping[str, Coupling] = MappingProxyType(
    {"rejection": REJECTION, "block": Block(), "invariant": Invariant()}
)
COUPLINGS = tuple(_BY_NAME)


def coupling(name: str) -> Coupling:
    """A coupling by its name."""
    require(name in COUPLINGS, "coupling", name, ", ".join(COUPLINGS))
    return _BY_NAME[name]
