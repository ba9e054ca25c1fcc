"""Typed reading of a parsed config.json: every complaint names the file, the field, the value and the bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """A JSON object and where it came from. A field that is null counts as absent, as transformers treats it.

    Every reader takes `default`; without one an absent field raises ValueError.
    """

    values: Mapping[str, Any]
    source: str
    """File name, with the path inside the file where nested."""

    def error(self, message: str) -> ValueError:
        """A ValueError that begins with the source."""
        return ValueError(f"{self.source}: {message}")

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """A field of any type."""
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(f"field {name!r} is missing")
        return default

    def integer(self, name: str, *, minimum: int, default: Any = _REQUIRED) -> int:
        """A whole number, at least `minimum`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{name} must be an integer, got {value!r}")
        if value < minimum:
            raise self.error(f"{name} must be at least {minimum}, got {value}")
        return value

    def number(self, name: str, *, above: float, default: Any = _REQUIRED) -> float:
        """A finite number larger than `above`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{name} must be a number, got {value!r}")
        if not (math.isfinite(value) and value > above):
            raise self.error(f"{name} must be a finite number above {above:g}, got {value}")
        return float(value)

    def boolean(self, name: str, *, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, got {value!r}")
        return value

    def text(self, name: str, *, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.error(f"{name} must be a string, got {value!r}")
        return value

    def nested(self, name: str) -> ConfigFields:
        """The object under `name`, empty if absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.error(f"{name} must be an object, got {value!r}")
        return ConfigFields(value, f"{self.source}: {name}")

    def token_ids(self, name: str, *, vocab_size: int) -> tuple[int, ...]:
        """One id, a list of ids or nothing, as `eos_token_id` is written."""
        value = self.get(name, ())
        ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise self.error(f"{name} must hold ids in [0, {vocab_size}), got {token!r}")
        return ids
