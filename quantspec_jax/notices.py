"""What is said beside results and errors."""

from __future__ import annotations

import sys


def notice(message: str) -> None:
    """A line on standard error that is no result."""
    print(f"quantspec: {message}", file=sys.stderr, flush=True)
