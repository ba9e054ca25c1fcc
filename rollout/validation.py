"""Range checks for user-facing options: each error names the field, the value and the bound."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

UINT64_LIMIT = 1 << 64

Options = TypeVar("Options")


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]; booleans and floats are refused even when their value is whole."""
    bound = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be {bound}, got {value!r}") from None
    if isinstance(value, bool) or number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {bound}, got {value!r}")
    return number


def check_float(
    name: str, value: Any, bound: str, low: float, high: float = math.inf, *, open_low: bool = False
) -> float:
    """`value` as a finite float in [low, high], or (low, high] with `open_low`; `bound` is the wording of the error."""
    if isinstance(value, bool) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise ValueError(f"{name} must be {bound}, got {value!r}")
    try:
        number = float(value)
    except (TypeError, OverflowError):  # an array; a whole number beyond every float
        raise ValueError(f"{name} must be {bound}, got {value!r}") from None
    inside = math.isfinite(number) and low <= number <= high and not (open_low and number == low)
    if not inside:
        raise ValueError(f"{name} must be {bound}, got {value!r}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """`value`, which must be True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def build_options(cls: type[Options], known: Collection[str], options: Mapping[str, Any]) -> Options:
    """cls(**options), with a ValueError that lists the known options where one is unknown or missing."""
    for name in options:
        if name not in known:
            names = sorted(known)
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{cls.__name__} has no option {name!r}{hint}; known options: {', '.join(names)}")
    try:
        return cls(**options)
    except TypeError as error:  # a required option is missing
        raise ValueError(f"{cls.__name__}: {error}") from error
