"""EleutherAI's harness reads the same numbers from this package as from transformers."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import pytest

CHOICES = [("The cat sat on the", [" mat", " moon"]), ("Two and two are", [" four", " five"])]
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: 0
metric_list:
  - metric: acc
"""


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "quantspec_jax.evaluate.harness", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'quantspec-jax\[lm-eval\]'"):
        importlib.import_module("quantspec_jax.evaluate.harness")


@pytest.fixture(scope="module")
def both(tiny_llama_dir):
    """transformers' model and this package's, in full precision."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from quantspec_jax.evaluate.harness import QuantSpecLM

    theirs = HFLM(str(tiny_llama_dir), device="cpu", dtype="float32")
    ours = QuantSpecLM(str(tiny_llama_dir), mode="autoregressive", kv="full", max_gen_toks=12)
    return theirs, ours


def asked(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def write_task(directory) -> None:
    """A task of two questions, `tiny`, for `--include_path`."""
    rows = [{"question": question, "choices": choices} for question, choices in CHOICES]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "tiny.yaml").write_text(TASK.format(path=directory / "rows.jsonl"))


@pytest.mark.filterwarnings("default")
def test_numbers_and_texts_are_those_of_transformers(both, tmp_path):
    theirs, ours = both
    pairs = [(context, choice) for context, choices in CHOICES for choice in choices]
    requests = asked("loglikelihood", *pairs, ("", "From nothing."))
    expected, found = (lm.loglikelihood(requests) for lm in both)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-3)
    assert [x for _, x in found] == [x for _, x in expected]
    requests = asked("loglikelihood_rolling", (TEXT * 3,))
    expected, found = (lm.loglikelihood_rolling(requests) for lm in both)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = asked(
        "generate_until", (TEXT, options), ("What", options), (TEXT, {**options, "max_gen_toks": 5})
    )
    assert ours.generate_until(requests) == theirs.generate_until(requests)

    import lm_eval
    from lm_eval.tasks import TaskManager

    write_task(tmp_path)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    expected, found = (
        lm_eval.simple_evaluate(lm, tasks=["tiny"], task_manager=tasks, bootstrap_iters=0)
        for lm in (theirs, ours)
    )
    assert found["results"]["tiny"]["acc,none"] == expected["results"]["tiny"]["acc,none"]


@pytest.mark.filterwarnings("default")
def test_drafts_have_numbers_of_their_own_and_targets_the_text(both):
    from quantspec_jax.evaluate.harness import QuantSpecLM

    _, full = both
    options = {"pretrained": full.model, "group_size": 8}
    target, draft = (QuantSpecLM(**options, of=of) for of in ("target", "draft"))
    requests = asked("loglikelihood", (TEXT, " Winston Smith slipped quickly through the doors."))
    near, far = (abs(lm.loglikelihood(requests)[0][0] - full.loglikelihood(requests)[0][0])
                 for lm in (target, draft))  # fmt: skip
    assert 0 < near < far
    requests = asked("generate_until", (TEXT, {"until": [], "max_gen_toks": 12}))
    plain = QuantSpecLM(full.model, group_size=8, mode="autoregressive", kv="int8")
    assert target.generate_until(requests) == plain.generate_until(requests)
    with pytest.raises(ValueError, match="of is 'draft'"):
        draft.generate_until(requests)
    for wrong, words in (
        ({"of": "nobody"}, "of is 'nobody'"),
        ({"of": "draft", "mode": "autoregressive"}, "autoregressive: no draft"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"kv": "int5"}, "kv is 'int5'"),
        ({"gama": 4}, "model_args is 'gama'"),
    ):
        with pytest.raises(ValueError, match=words):
            QuantSpecLM(full.model, **wrong)
    with pytest.raises(ValueError, match="generation options"):
        target.generate_until(asked("generate_until", (TEXT, {"until": [], "beams": 4})))


def test_an_entry_point_names_the_model():
    """What an lm-eval that reads entry points needs to know."""
    pytest.importorskip("lm_eval")
    from quantspec_jax.evaluate.harness import QuantSpecLM

    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name="quantspec")
    assert entry.load() is QuantSpecLM


@pytest.mark.parametrize("program", ["quantspec_jax.evaluate.harness", "lm_eval"])
def test_the_command_line_knows_the_model(program, tiny_llama_dir, tmp_path):
    """Log-likelihoods of the draft too, and the answers are those of transformers' model."""
    pytest.importorskip("lm_eval")
    from lm_eval.api import registry

    if program == "lm_eval" and not hasattr(registry, "load_plugins"):
        pytest.skip(f"lm-eval {importlib.metadata.version('lm-eval')} reads no entry points")
    write_task(tmp_path)
    found = {}
    for model, options in (
        ("hf", "dtype=float32"),
        ("quantspec", "mode=autoregressive,kv=full"),
        ("quantspec", "of=draft,group_size=8"),
    ):
        call = [sys.executable, "-m", program, "run", "--model", model, "--device", "cpu"]
        call += ["--model_args", f"pretrained={tiny_llama_dir},{options}", "--tasks", "tiny"]
        call += ["--include_path", str(tmp_path), "--log_samples"]
        call += ["--output_path", str(tmp_path / options)]
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (samples,) = (tmp_path / options).rglob("samples_tiny_*.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda x: x["doc_id"])
        found[options] = np.asarray([[float(x) for x, _ in row["filtered_resps"]] for row in rows])
    theirs, ours, draft = found.values()
    assert ours.shape == (2, 2)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert not np.allclose(draft, theirs, atol=1e-3)
