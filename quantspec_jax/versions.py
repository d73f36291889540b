"""Versions of what results depend on: recorded with runs, and shown by `quantspec --version`."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = (
    "quantspec-jax",
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
    "torch",
    "flashinfer-python",
)


def versions() -> dict[str, str]:
    """By name, Python's too; packages that are not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}
