"""The notebooks run from top to bottom in a kernel of their own."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def executed(name: str) -> tuple[int, str]:
    """How many pictures a notebook drew, and what it printed."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    text = "".join(out.get("text", "") for out in outputs if out.get("name") == "stdout")
    return len(pictures), text


def test_quickstart_runs(smollm2_gguf, monkeypatch):
    monkeypatch.setenv("QUANTSPEC_NEW_TOKENS", "24")
    monkeypatch.setenv("QUANTSPEC_GAMMAS", "2 4")
    pictures, text = executed("quickstart.ipynb")
    assert pictures == 2
    assert "bits a value: int4 4.38, int8 8.38" in text
    for gamma in (2, 4):
        assert f"gamma {gamma}: acceptance" in text


def test_cache_methods_runs(smollm2_gguf, monkeypatch):
    monkeypatch.setenv("QUANTSPEC_TOKENS", "384")
    monkeypatch.setenv("QUANTSPEC_LAYERS", "4")
    monkeypatch.setenv("QUANTSPEC_METHODS", "int4")
    pictures, text = executed("cache_methods.ipynb")
    assert pictures == 4
    said = re.findall(r"(\S+) +[\d.]+ bits a value .* keys ([\d.]+)", text)
    lost = {name: float(keys) for name, keys in said}
    assert lost["AQUA-KV-2"] < lost["HIGGS-2"] < 0.12
    assert "the best tokens    reads 25%, of the best quarter 100%" in text


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_outputs_are_stored(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
