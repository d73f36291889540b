"""Every page: QuantSpec as published."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from quantspec_jax.checks import require
from quantspec_jax.generate.policies.policy import Policy


@dataclasses.dataclass(frozen=True)
class All(Policy):
    """Every page (QuantSpec, Tiwari et al., arXiv 2502.10424); `share` is 1."""

    name: ClassVar[str] = "all"

    def __post_init__(self) -> None:
        require(self.share == 1, "draft_share", self.share, "1 (draft_policy all reads all)")

    @property
    def every(self) -> int:
        """There is nothing to choose, for however many rounds."""
        return 1
