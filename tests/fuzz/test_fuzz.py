"""A short run of the fuzzer with a fixed seed; `make fuzz` runs it for longer."""

from __future__ import annotations

import fuzz
import seeds

CASES = 54


def test_damaged_checkpoints_load_or_are_refused_in_one_line():
    record = fuzz.run(CASES, seed=16)
    assert record["failures"] == []
    assert record["loaded"] + record["refused"] == CASES
    # No format is refused for another reason than its damage, or loads whatever is done to it.
    assert set(record["formats"]) == {*seeds.SEEDS, seeds.CONVERTED}
    assert all(found["refused"] > 0 for found in record["formats"].values())
    assert record["loaded"] > CASES // 20
