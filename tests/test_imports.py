"""Imports point one way: convert → quantspec_jax → pallas_kernels."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "quantspec_jax", "convert")  # each imports those before it
OPENS_SOURCES = ("quantspec_jax/loading.py", "quantspec_jax/commands/")  # and may import convert


def imported(path: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_imports_point_one_way():
    against, loads = [], []
    for i, package in enumerate(PACKAGES):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            later = imported(path) & set(PACKAGES[i + 1 :])
            if later == {"convert"} and name.startswith(OPENS_SOURCES):
                loads.append(name)
            elif later:
                against.append((name, later))
    assert against == []
    assert "quantspec_jax/loading.py" in loads
