"""The one reader of values that somebody else wrote: config.json, GGUF metadata, tokenizer files.

Each value is asked for by key and by type. What is missing, of another type, not finite or out of
bounds is a ValueError that names file and key, and says what was given and what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from quantspec_jax.checks import LARGEST_INT, is_int, is_number, require

_REQUIRED: Any = object()


class Settings:
    """Values by key; remembers which were asked for.

    Args:
      values: by key, the prefix included. None counts as missing.
      where: the file, for messages; empty: not known.
      prefix: what goes before every key that is asked for.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        self.values, self.where, self.prefix = values, where, prefix
        self._asked: set[str] = set()

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """Of any type."""
        self._asked.add(self.prefix + key)
        value = self.values.get(self.prefix + key)
        if value is None and default is _REQUIRED:
            raise ValueError(f"{self.where or 'the metadata'} has no {self.prefix}{key}")
        return default if value is None else value

    def require(self, key: str, condition: bool, given: Any, allowed: str) -> None:
        where = f" in {self.where}" if self.where else ""
        require(condition, f"{self.prefix}{key}{where}", given, allowed)

    def not_asked(self) -> list[str]:
        """Keys that are there and that nobody asked for, prefix included."""
        return sorted(key for key in self.values if key not in self._asked)

    def integer(
        self, key: str, default: Any = _REQUIRED, least: int = 1, most: int = LARGEST_INT
    ) -> Any:
        value = self.get(key, default)
        allowed = f"an integer from {least} to {most}"
        self.require(
            key, value is default or (is_int(value) and least <= value <= most), value, allowed
        )
        return value

    def number(
        self, key: str, default: Any = _REQUIRED, least: float = 1e-30, most: float = 1e30
    ) -> Any:
        """As a float; `default` as it is."""
        value = self.get(key, default)
        if value is default:
            return default
        inside = is_number(value) and least <= value <= most  # neither NaN nor 10**400
        self.require(key, inside, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        self.require(key, isinstance(value, bool), value, "true, false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.get(key, default)
        self.require(key, value is default or isinstance(value, str), value, "a text")
        return value

    def choice(self, key: str, allowed: Iterable[str], default: Any = _REQUIRED) -> Any:
        """One of some texts. `default` None: a value that is missing is no choice."""
        value, allowed = self.get(key, default), tuple(allowed)
        known = isinstance(value, str) and value in allowed
        self.require(key, known or (value is default is not None), value, ", ".join(allowed))
        return value

    def entries(self, key: str, default: Any = _REQUIRED) -> Any:
        """An object of JSON, by key."""
        value = self.get(key, default)
        self.require(key, value is default or isinstance(value, Mapping), value, "an object")
        return value

    def texts(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of texts."""
        return self._list(key, default, lambda v: isinstance(v, str), "a list of texts")

    def integers(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of integers."""
        return self._list(key, default, is_int, "a list of integers")

    def numbers(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of finite numbers."""

        def finite(value: Any) -> bool:
            return is_number(value) and -1e300 <= value <= 1e300

        return self._list(key, default, finite, "a list of finite numbers")

    def _list(self, key: str, default: Any, holds: Callable[[Any], bool], allowed: str) -> Any:
        value = self.get(key, default)
        whole = isinstance(value, list) and all(map(holds, value))
        self.require(key, value is default or whole, value, allowed)
        return value
