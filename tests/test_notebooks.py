"""The notebooks run from top to bottom in a kernel of their own."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# To compile takes time by the layer, and nobody reads the text.
FIRST_LAYERS = """
import dataclasses

first = {str(i): model.params["layers"][str(i)] for i in range(NUMBER)}
config = dataclasses.replace(model.config, num_layers=len(first))
model = qs.Model(config, {**model.params, "layers": first}, model.tokenizer, model.draft)
"""


def executed(name: str, layers: int = 0) -> tuple[list, str]:
    """Pictures and text that a notebook shows, run from top to bottom, with the first layers of
    the model alone, if a number is given, after the cell that loads it."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    # Where users run there is no torch; to import it takes seconds.
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import sys\nsys.modules['torch'] = None"))
    if layers:
        (loads,) = (i for i, c in enumerate(notebook.cells) if "model = qs.load(" in c.source)
        cut = nbformat.v4.new_code_cell(FIRST_LAYERS.replace("NUMBER", str(layers)))
        notebook.cells.insert(loads + 1, cut)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    text = "".join(out.get("text", "") for out in outputs if out.get("name") == "stdout")
    return pictures, text


def test_quickstart_runs(smollm2_gguf, monkeypatch):
    monkeypatch.setenv("QUANTSPEC_NEW_TOKENS", "24")
    monkeypatch.setenv("QUANTSPEC_GAMMAS", "2 4")
    pictures, text = executed("quickstart.ipynb", layers=1)
    assert len(pictures) == 2
    assert "bits a value: int4 4.38, int8 8.38" in text
    for gamma in (2, 4):
        assert f"gamma {gamma}: acceptance" in text


def test_a_long_document_runs(one_layer_llama_dir, monkeypatch):
    """On whatever is there, with a tiny model: a few seconds show that it runs."""
    sizes = {
        "MODEL": str(one_layer_llama_dir), "CONTEXTS": "200", "NEW_TOKENS": "4", "GAMMA": "2",
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setenv(f"QUANTSPEC_{name}", value)
    pictures, text = executed("long_context_gpu.ipynb")
    assert len(pictures) == 1
    assert "in XLA: add_rms_norm" in text or "kernels: add_rms_norm" in text
    for mode in ("plain", "QuantSpec"):
        assert f"    200 tokens, {mode:10}" in text


def test_cache_methods_runs(smollm2_gguf, monkeypatch):
    monkeypatch.setenv("QUANTSPEC_TOKENS", "384")
    monkeypatch.setenv("QUANTSPEC_LAYERS", "4")
    monkeypatch.setenv("QUANTSPEC_METHODS", "int4")
    pictures, text = executed("cache_methods.ipynb", layers=4)
    assert len(pictures) == 4
    said = re.findall(r"(\S+) +[\d.]+ bits a value .* keys ([\d.]+)", text)
    lost = {name: float(keys) for name, keys in said}
    assert lost["AQUA-KV-2"] < lost["HIGGS-2"] < 0.12
    assert "the best tokens    reads 25%, of the best quarter 100%" in text


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_outputs_are_stored(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
