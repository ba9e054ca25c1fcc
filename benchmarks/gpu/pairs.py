"""Two engines that take turns, and what one costs over the other: drifts of the machine meet both sides of a pair."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from measures import relative_cost

Row = dict[str, Any]

BOUNDS = {"exactness": 0.03, "logprobs": 0.02}
"""Most that ours may cost over a variant, as a part of the variant's."""
FIGURES = ("gpu_span_ms", "period_ms", "seconds")


class Side(Protocol):
    """One of the two."""

    def take_turn(self, sequences: int, seed: int) -> Row:
        """Figures of one call of that many sequences: FIGURES at least."""
        ...


def take_turns(ours: Side, variant: Side, sequences: int, pairs: int) -> list[tuple[Row, Row]]:
    """Figures of both, pair by pair, after a pair that does not count. Who is first changes from pair to pair."""
    taken = []
    for number in range(pairs + 1):
        seed = 4000 + number
        if number % 2:
            first = ours.take_turn(sequences, seed)
            taken.append((first, variant.take_turn(sequences, seed)))
        else:
            first = variant.take_turn(sequences, seed)
            taken.append((ours.take_turn(sequences, seed), first))
    return taken[1:]


def costs(what: str, pairs: Sequence[tuple[Row, Row]]) -> Iterator[Row]:
    """A row for each figure: medians of both sides, and the cost with its interval, in percent. 6 pairs at least."""
    for figure in FIGURES:
        ours, variants = ([side[figure] for side in sides] for sides in zip(*pairs, strict=True))
        cost = relative_cost(ours, variants)
        yield {
            "cost_of": what, "figure": figure, "pairs": len(pairs), "ours": round(statistics.median(ours), 4),
            "variant": round(statistics.median(variants), 4), "cost_pct": round(100 * cost.median, 2),
            "low_pct": round(100 * cost.low, 2), "high_pct": round(100 * cost.high, 2),
            "coverage": round(cost.coverage, 3), "within_bound": cost.median <= BOUNDS[what],
        }  # fmt: skip
