"""Histograms with fixed bounds: what the engine's meters keep, for whoever exports it. Knows no exporter."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

_STEPS = (1.0, 2.5, 5.0)
SECONDS = (*(round(step * 10.0**power, 5) for power in range(-4, 2) for step in _STEPS), 100.0, 250.0, 500.0, 1000.0)
"""Upper bounds for durations: 0.1 ms to 1000 s, three to a decade."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramData:
    """A histogram at one moment. Plain data."""

    name: str
    labels: Mapping[str, str]
    bounds: Sequence[float]
    """Upper bounds, rising; a value lies in the first bucket whose bound is not below it."""
    counts: Sequence[int]
    """Values in each bucket; the last one has those above all bounds."""
    sum: float

    @property
    def count(self) -> int:
        """Values seen."""
        return sum(self.counts)

    def cumulative(self) -> list[int]:
        """Values up to each bound, and all of them."""
        return list(accumulate(self.counts))

    def quantile(self, part: float) -> float | None:
        """The bound below which `part` (in [0, 1]) of the values lie; infinity above the last, None without values."""
        total = self.count
        if not total:
            return None
        place = next(index for index, count in enumerate(self.cumulative()) if count >= part * total and count)
        return self.bounds[place] if place < len(self.bounds) else float("inf")

    def to_wire(self) -> dict[str, Any]:
        """Fields as plain lists and numbers."""
        return {**asdict(self), "bounds": list(self.bounds), "counts": list(self.counts)}


class Histogram:
    """Counts values by bucket. One thread observes at a time; any thread may read, an observation apart."""

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        """`bounds`: upper bounds, rising."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0
        """Of all values."""

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def data(self, name: str, **labels: str) -> HistogramData:
        """What it holds now, under a name."""
        counts = tuple(self._counts)
        return HistogramData(name=name, labels=labels, bounds=self._bounds, counts=counts, sum=self.sum)
