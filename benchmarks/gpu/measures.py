"""What few measurements say: medians with intervals that assume nothing of the noise, costs in pairs, errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A median with an interval that holds the true one with at least the chance `coverage`."""

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median of independent `values`, between two of their order statistics.

    The j-th smallest of n is above the true median with the chance that fewer than j of n coins show heads, whatever
    the distribution; the interval is the narrowest of the form [j-th smallest, j-th largest] that is wide enough.
    Raises ValueError for fewer values than `confidence` needs (6 for 0.95).
    """
    ordered, count = sorted(values), len(values)
    below = np.cumsum([math.comb(count, heads) for heads in range(count + 1)]) / 2.0**count
    coverages = [1.0 - 2.0 * float(below[rank]) for rank in range(count // 2)]
    wide = [rank for rank, coverage in enumerate(coverages) if coverage >= confidence]
    if not wide:
        raise ValueError(f"values must be more than {count} for an interval of confidence {confidence}")
    rank = wide[-1]
    middle = float(np.median(ordered))
    return Interval(middle, float(ordered[rank]), float(ordered[count - 1 - rank]), coverages[rank])


def relative_cost(dear: Sequence[float], cheap: Sequence[float], confidence: float = 0.95) -> Interval:
    """By how much the times `dear` exceed `cheap`, measured in pairs, as a part of `cheap`: median and interval."""
    return median_interval([a / b - 1.0 for a, b in zip(dear, cheap, strict=True)], confidence)


@dataclass(frozen=True, slots=True)
class Errors:
    """Absolute differences from exact values."""

    mean: float
    rms: float
    largest: float

    @classmethod
    def of(cls, values: NDArray[np.floating], exact: Floats) -> Errors:
        """Of values [n] against exact ones [n], all finite."""
        off = np.abs(values.astype(np.float64) - exact)
        assert off.size and np.isfinite(off).all(), "errors of values that are missing or not finite"
        return cls(float(off.mean()), float(np.sqrt((off * off).mean())), float(off.max()))

    def over(self, other: Errors) -> Errors:
        """Each as a multiple of another's."""
        return Errors(self.mean / other.mean, self.rms / other.rms, self.largest / other.largest)
