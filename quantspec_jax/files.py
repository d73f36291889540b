"""Files that hold one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantspec_jax.checks import require


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a file; ValueError names the file where there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    require(isinstance(values, dict), str(path), type(values).__name__, "one JSON object")
    return values
