"""`quantspec --version`: what to put in a bug report."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from quantspec_jax.commands.terminal import describe


class Version(argparse.Action):
    """Prints `report` and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for name, version in report().items():
            print(f"{name:<17} {version}")
        parser.exit()


def report() -> dict[str, str]:
    """What matters in a bug report, by name."""
    import jax

    from quantspec_jax.versions import versions

    try:
        device = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    except RuntimeError as error:  # a backend that does not start
        device = describe(error)
    return {
        **versions(),
        "platform": platform.platform(),
        "device": device,
    }
