"""What a pass of attention reads of a cache."""

from __future__ import annotations

import dataclasses

VIEWS = ("full", "int8", "int4", "float8")


@dataclasses.dataclass(frozen=True)
class Read:
    """What a pass reads: handed through whole, and a constant of the program.

    view   of the planes: `int8` both, `int4` the upper one alone; a cache without planes is read in
           full precision whatever is asked for (`full`: it has none), or in the 8-bit floats that
           its buffer holds (`float8`)
    """

    view: str = "int8"

    def __post_init__(self) -> None:
        if self.view not in VIEWS:
            raise ValueError(f"view is {self.view!r}; allowed: {', '.join(VIEWS)}")
