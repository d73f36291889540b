"""How many launches a round is, as XLA compiles it for a GPU. `pytest -m assemble`, no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.assemble


@pytest.fixture(scope="module")
def counted() -> dict[tuple[str, int, int, str, int, bool], dict[str, Any]]:
    """What is counted, by policy, number of layers, γ, how a token is chosen, copies, and whether
    the call may end early."""
    assert importlib.util.find_spec("jax_plugins.xla_cuda12"), "pip install .[assemble]"
    script = Path(__file__).with_name("compiled_loop.py")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    # What is chosen by running it cannot be chosen here.
    environment["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    paths = [
        str(script.parents[1] / "pallas_kernels"),
        *environment.get("PYTHONPATH", "").split(":"),
    ]
    environment["PYTHONPATH"] = ":".join(filter(None, paths))
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-3000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return {tuple(row["case"].values()): row for row in rows}


@pytest.fixture(scope="module")
def every(counted) -> dict[tuple[str, int, int, str, int, bool], float]:
    """Launches of a round."""
    return {case: row["round"] for case, row in counted.items()}


@pytest.fixture(scope="module")
def launches(every) -> dict[tuple[str, int, int], float]:
    """Those of greedy decoding without copies."""
    return {case[:3]: number for case, number in every.items() if case[3:] == ("greedy", 0, False)}


def test_top_pages_adds_four_launches_to_a_round(launches):
    """Votes, the choice, how many pages there are, and which rows vote: however many layers."""
    for layers in (2, 3):
        added = launches["top-pages", layers, 4] - launches["all", layers, 4]
        assert 2 <= added <= 4


def test_a_layer_is_six_launches_of_each_pass(launches):
    """Whichever pages a draft reads: q, k and v; attention and its merge; o; gate and up; down."""
    for policy in ("all", "window", "top-pages"):
        assert launches[policy, 3, 4] - launches[policy, 2, 4] == 6 * 5


def test_what_a_draft_step_pays_outside_of_its_layers(launches):
    """The token's row of the embedding, the last norm, lm_head, and where its logits are largest in
    each part of the vocabulary."""
    for policy in ("all", "top-pages"):
        for layers in (2, 3):
            step = launches[policy, layers, 4] - launches[policy, layers, 3]
            assert step - 6 * layers <= 4


def test_what_a_round_pays_outside_of_its_layers(launches):
    """Of 82 that there were."""
    for policy, most in (("all", 31), ("window", 34), ("top-pages", 35)):
        assert launches[policy, 2, 4] - 2 * 6 * 5 <= most


def test_what_draws_add_to_a_round(every):
    """In its five choices, whatever is filtered; of 552 that there were."""
    greedy = every["all", 2, 4, "greedy", 0, False]
    for chosen in ("draws", "top-p"):
        assert every["all", 2, 4, chosen, 0, False] - greedy <= 30


def test_what_copies_add(every, launches):
    """A round that copies is a verification; each of both kinds looks for what comes next."""
    one, other = (every["all", layers, 4, "greedy", 7, False] for layers in (2, 3))
    assert other - one == 6 * 5 + 6
    assert one - launches["all", 2, 4] - 2 * 6 <= 28


def test_a_call_that_may_end_early_has_as_many(every):
    """As γ auto's: shares of accepted proposals are a part of each loop's condition."""
    for copies in (0, 7):
        may, may_not = (every["all", 2, 4, "greedy", copies, early] for early in (True, False))
        assert may == may_not


def test_what_layers_read_ahead_is_there(counted):
    """From the second layer of a pass on: lengths, angles and biases; planes, where no list says
    which are read."""
    for case, row in counted.items():
        (angles, late), (planes, later) = row["ahead"]["heads"], row["ahead"]["attention"]
        assert angles > 0
        assert late == 0
        if case[0] == "all":
            assert planes > 0
            assert later == 0
