"""A conversion that is killed: `make kills` in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parents[1] / "fuzz" / "kills.py"


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_conversion_that_is_killed_can_be_done_again():
    command = [sys.executable, str(KILLS), "--kills", "3", "--job", "plain"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "plain: 3 kills" in found.stdout
