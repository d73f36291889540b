"""Measured configurations: one JSON file a device, kernel → shape → configuration."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pallas_kernels import devices

Config = TypeVar("Config")

FOLDER = pathlib.Path(__file__).parent / "configs"
Name = tuple[str, str]  # a kernel's, and the key of a shape
_TRIED: dict[Name, Mapping[str, Any]] = {}
_ASKED: list[dict[Name, Any]] = []


def path(device: str) -> pathlib.Path:
    """The device's file."""
    return FOLDER / (device.lower().replace(" ", "-") + ".json")


@functools.cache
def _load(device: str) -> dict[str, Any]:
    file = path(device)
    return json.loads(file.read_text()) if file.exists() else {}


def find(device: str, kernel: str, key: str) -> Mapping[str, Any] | None:
    """The configuration measured best, or None."""
    return _TRIED.get((kernel, key)) or _load(device).get(kernel, {}).get(key)


@contextlib.contextmanager
def trying(configs: Mapping[Name, Mapping[str, Any]]) -> Iterator[dict[Name, Any]]:
    """Inside, these count as measured best, on any device. Yields the shapes that configurations
    are chosen for inside."""
    before, asked = dict(_TRIED), dict[Name, Any]()
    _TRIED.update(configs)
    _ASKED.append(asked)
    try:
        yield asked
    finally:
        _ASKED.remove(asked)
        _TRIED.clear()
        _TRIED.update(before)


def nearest(device: str, kernel: str, key: str, shape: Any) -> list[Mapping[str, Any]]:
    """What was measured best for a shape on the device, and on an H200, as far as there is."""
    for asked in _ASKED:
        asked[kernel, key] = shape
    found = [find(name, kernel, key) for name in dict.fromkeys((device, devices.DEFAULT.name))]
    return [config for config in found if config is not None]


def diverse(
    candidates: Iterable[Config], kind: Callable[[Config], Hashable], most: int
) -> list[Config]:
    """A few configurations worth measuring, `most` at most: of candidates, best guess first, the
    first of each kind."""
    found: dict[Hashable, Config] = {}
    for config in candidates:
        found.setdefault(kind(config), config)
    return [*found.values()][:most]


def save(device: str, kernel: str, found: dict[str, dict[str, int]]) -> None:
    """Add configurations to the device's file."""
    file = path(device)
    known = dict(_load(device))
    known[kernel] = {**known.get(kernel, {}), **found}
    FOLDER.mkdir(exist_ok=True)
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    _load.cache_clear()
