"""Float types. A caller's word for one becomes a NumPy dtype where it comes in and stays one: as a
string it equals no type that it is compared with, and nothing says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)

COMPUTED = (FLOAT32, BFLOAT16)  # what models compute in
STORED = (*COMPUTED, FLOAT16)  # what checkpoints may hold


def float_type(
    given: Any, argument: str = "dtype", allowed: Sequence[np.dtype] = COMPUTED
) -> np.dtype:
    """The dtype that a name, a dtype or a scalar type stands for.

    Raises:
      ValueError: it is none of `allowed`; names `argument`.
    """
    for dtype in allowed:
        if given is not None and dtype == given:  # a NumPy dtype compares with all three
            return dtype
    names = ", ".join(dtype.name for dtype in allowed)
    raise ValueError(f"{argument} is {given!r}; allowed: {names}")
