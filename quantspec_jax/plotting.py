"""What the plots of `quantspec eval` and `quantspec bench` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantspec_jax.checks import require
from quantspec_jax.files import whole

SUFFIXES = (".png", ".svg", ".pdf")


def short(context: int) -> str:
    """8192 → 8K."""
    return f"{context // 1024}K" if context % 1024 == 0 else str(context)


def check_plot(path: str) -> Path:
    """The path of a plot that can be made; raised before anything is measured.

    Raises:
      ValueError: another kind of file, a directory that does not exist, or no matplotlib.
    """
    plot_path = Path(path)
    require(plot_path.suffix in SUFFIXES, "--plot", path, f"a file {', '.join(SUFFIXES)}")
    require(plot_path.parent.is_dir(), "--plot", path, "a file in a directory that exists")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: pip install 'quantspec-jax[demo]'"
        ) from None
    return plot_path


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure, whole or not at all."""
    with whole(path) as partial:
        figure.savefig(partial, dpi=120)
