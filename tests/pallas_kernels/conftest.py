"""Lets the tests of this folder import its `cases`, and run as on another device (`pretend`)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("PRETEND_DEVICE"):
    import pretend

    pretend.by_environment()
