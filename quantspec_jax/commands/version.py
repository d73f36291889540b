"""`quantspec --version`: what to put in a bug report."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from quantspec_jax.commands.terminal import describe

PACKAGES = (
    "quantspec-jax",
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
)


class Version(argparse.Action):
    """Prints `versions` and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for name, version in versions().items():
            print(f"{name:<17} {version}")
        parser.exit()


def versions() -> dict[str, str]:
    """What matters in a bug report, by name."""
    from importlib import metadata

    import jax

    try:
        device = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    except RuntimeError as error:  # a backend that does not start
        device = describe(error)
    return {
        **{name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
    }
