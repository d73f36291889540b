"""Draft policies: which pages of the cache a draft pass reads. The target reads all, always.

A page is a tile of the planes. Which view of it a draft reads, and with which weights, is none of a
policy's business.

    policy      the protocol, and what policies have in common
    prompt      what the last queries of a prompt attend to
    all         every page: QuantSpec
    window      sinks and the most recent pages: StreamingLLM
    snapkv      what the prompt's end attends to, chosen once: SnapKV
    top_pages   what the last verification attends to

A new one is a file here and an entry in `POLICIES`.
"""

from __future__ import annotations

from typing import Any

from quantspec_jax.checks import require
from quantspec_jax.generate.policies.all import All
from quantspec_jax.generate.policies.policy import Policy, Sizes
from quantspec_jax.generate.policies.snapkv import SnapKV
from quantspec_jax.generate.policies.top_pages import TopPages
from quantspec_jax.generate.policies.window import Window

ALL = All()
POLICIES: dict[str, type[Policy]] = {each.name: each for each in (All, Window, SnapKV, TopPages)}


def policy(name: str, share: float | None = None, every: int | None = None) -> Policy:
    """A policy by its name, the share of the coded tokens that it reads, and how many rounds read
    the same of them; None: its own."""
    require(name in POLICIES, "draft_policy", name, ", ".join(POLICIES))
    kind = POLICIES[name]
    words = "None with a policy whose pages no round changes"
    require(every is None or kind.votes, "draft_every", every, words)
    given: dict[str, Any] = {"share": share, "every": every}
    return kind(**{option: value for option, value in given.items() if value is not None})


__all__ = ["ALL", "POLICIES", "All", "Policy", "Sizes", "SnapKV", "TopPages", "Window", "policy"]
