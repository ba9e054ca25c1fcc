"""What a field of a message may hold. Each check says of a wrong value which field, what it must be and what it was."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_TEXT = 65_536
"""Characters of a text field; prompts travel as arrays."""
MAX_ITEMS = 262_144
"""Entries of a list field."""
_SCALARS = frozenset((type(None), bool, int, float, str, bytes))


class ProtocolError(ValueError):
    """Frames that are no message of the protocol; `code` is what a peer is told."""

    def __init__(self, text: str, code: str = "malformed") -> None:
        super().__init__(text)
        self.code = code
        self.call = 0
        """Number of the call whose message it was, where that could be read."""


class Field(ABC):
    """One kind of value; `describe` is its name in the documentation."""

    describe = "anything"

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Whether the value is one."""


@dataclass(frozen=True)
class Integer(Field):
    """An integer in [low, high]."""

    low: int = 0
    high: int = 2**63 - 1

    @property
    def describe(self) -> str:  # type: ignore[override]
        """As in the documentation."""
        high = "2^63)" if self.high == 2**63 - 1 else f"{self.high}]"
        return f"integer in [{self.low}, {high}"

    def accepts(self, value: Any) -> bool:
        """See Field."""
        return type(value) is int and self.low <= value <= self.high


@dataclass(frozen=True)
class Number(Field):
    """A finite number in [0, high]."""

    high: float

    @property
    def describe(self) -> str:  # type: ignore[override]
        """As in the documentation."""
        return f"number in [0, {self.high:g}]"

    def accepts(self, value: Any) -> bool:
        """See Field."""
        return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= self.high


class Flag(Field):
    """True or false."""

    describe = "true or false"

    def accepts(self, value: Any) -> bool:
        """See Field."""
        return type(value) is bool


class Text(Field):
    """UTF-8 text of bounded length."""

    describe = f"text of at most {MAX_TEXT} characters"

    def accepts(self, value: Any) -> bool:
        """See Field."""
        return type(value) is str and len(value) <= MAX_TEXT


@dataclass(frozen=True)
class OneOf(Field):
    """One of some texts."""

    values: tuple[str, ...]

    @property
    def describe(self) -> str:  # type: ignore[override]
        """As in the documentation."""
        return " or ".join(f'"{value}"' for value in self.values)

    def accepts(self, value: Any) -> bool:
        """See Field."""
        return type(value) is str and value in self.values


@dataclass(frozen=True)
class Bytes(Field):
    """Bytes, of exactly `size` where that is given."""

    size: int | None = None

    @property
    def describe(self) -> str:  # type: ignore[override]
        """As in the documentation."""
        return "bytes" if self.size is None else f"{self.size} bytes"

    def accepts(self, value: Any) -> bool:
        """See Field."""
        return type(value) is bytes and self.size in (None, len(value))


@dataclass(frozen=True)
class ListOf(Field):
    """A list of one kind of value."""

    item: Field

    @property
    def describe(self) -> str:  # type: ignore[override]
        """As in the documentation."""
        return f"list of {self.item.describe}"

    def accepts(self, value: Any) -> bool:
        """See Field."""
        return type(value) is list and len(value) <= MAX_ITEMS and all(map(self.item.accepts, value))


class Map(Field):
    """A map with text keys and plain values, at most 4 levels deep."""

    describe = "map"

    def accepts(self, value: Any) -> bool:
        """See Field."""
        return type(value) is dict and _is_plain(value, 4)


class Plain(Field):
    """Nil, true, false, a number, text, bytes, or lists and maps of these, at most 6 levels deep."""

    describe = "nil, true, false, number, text, bytes, or lists and maps of these"

    def accepts(self, value: Any) -> bool:
        """See Field."""
        return _is_plain(value, 6)


def _is_plain(value: Any, levels: int) -> bool:
    if type(value) in _SCALARS:
        return True
    if not levels or type(value) not in (list, dict) or len(value) > MAX_ITEMS:
        return False
    items = value
    if type(value) is dict:
        if not all(type(key) is str for key in value):
            return False
        items = value.values()
    return all(type(item) in _SCALARS or _is_plain(item, levels - 1) for item in items)


@dataclass(frozen=True)
class Optional(Field):
    """A field that may be left out."""

    field: Field

    @property
    def describe(self) -> str:  # type: ignore[override]
        """As in the documentation."""
        return self.field.describe

    def accepts(self, value: Any) -> bool:
        """See Field."""
        return self.field.accepts(value)


def check_fields(what: str, fields: Mapping[str, Field], body: Any) -> None:
    """Raise ProtocolError unless `body` is a map with these fields and no others."""
    if type(body) is not dict:
        raise ProtocolError(f"{what}: the body must be a map")
    for name in body:
        if name not in fields:
            raise ProtocolError(f"{what} has no field {name!r:.40}")
    for name, field in fields.items():
        if name in body:
            if not field.accepts(body[name]):
                raise ProtocolError(f"{what}.{name} must be {field.describe}, got {body[name]!r:.80}")
        elif not isinstance(field, Optional):
            raise ProtocolError(f"{what}.{name} is missing")
