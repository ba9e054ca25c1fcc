"""Statistics of the GPU's benchmarks: intervals of medians, costs in pairs, errors, tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import Errors, median_interval, relative_cost
from pairs import FIGURES, costs, take_turns
from row_table import table

finite = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.mark.parametrize(("count", "rank", "coverage"), [(6, 1, 0.96875), (15, 4, 0.96484375), (21, 6, 0.9733963)])
def test_intervals_are_those_of_the_tables_of_the_sign_test(count: int, rank: int, coverage: float) -> None:
    values = list(np.random.default_rng(1).permutation(count).astype(float))
    interval = median_interval(values)
    assert (interval.low, interval.high) == (rank - 1, count - rank)
    assert interval.coverage == pytest.approx(coverage)
    assert interval.median == (count - 1) / 2


@given(st.lists(finite, min_size=6, max_size=60), finite)
@settings(deadline=None)
def test_intervals_hold_their_median_and_move_with_the_values(values: list[float], shift: float) -> None:
    interval = median_interval(values)
    assert interval.low <= interval.median <= interval.high and interval.coverage >= 0.95
    doubled = median_interval([2.0 * value for value in values])
    assert (doubled.low, doubled.high) == (2.0 * interval.low, 2.0 * interval.high)


def test_intervals_hold_the_true_median_as_often_as_they_say() -> None:
    """Over skewed noise, where an interval from a variance would not."""
    random = np.random.default_rng(2)
    held = 0
    for _ in range(2000):
        interval = median_interval(list(random.exponential(1.0, 15)))
        held += interval.low <= math.log(2.0) <= interval.high
    assert 0.95 < held / 2000 < 0.98


def test_too_few_values_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 5"):
        median_interval([1.0] * 5)


def test_costs_come_from_pairs() -> None:
    """The control: the machine drifts by a half, which a comparison of the two medians alone would not bear."""
    drift = np.linspace(1.0, 1.5, 15)
    noise = np.random.default_rng(3).normal(0.0, 0.001, 15)
    cost = relative_cost(list(1.02 * drift + noise), list(drift))
    assert cost.low <= 0.02 <= cost.high and cost.high - cost.low < 0.005
    with pytest.raises(ValueError, match=r"shorter|longer"):
        relative_cost([1.0] * 15, [1.0] * 14)


class Timed:
    """A side whose calls take `factor` of what the machine's drift makes of a second; `log` is of all sides."""

    def __init__(self, name: str, factor: float, log: list[tuple[str, int]]) -> None:
        self._name, self._factor, self._log = name, factor, log

    def take_turn(self, sequences: int, seed: int) -> dict[str, float]:
        self._log.append((self._name, seed))
        return dict.fromkeys(FIGURES, self._factor * (1.0 + 0.03 * len(self._log)))


def test_sides_take_turns_with_the_same_prompts() -> None:
    log: list[tuple[str, int]] = []
    pairs = take_turns(Timed("ours", 1.05, log), Timed("variant", 1.0, log), 256, 16)
    assert len(pairs) == 16 and len(log) == 34
    assert [{name for name, _ in log[at : at + 2]} for at in range(0, 34, 2)] == [{"ours", "variant"}] * 17
    assert all(log[at][1] == log[at + 1][1] for at in range(0, 34, 2)) and len({seed for _, seed in log}) == 17
    assert [log[at][0] for at in (0, 2, 4)] == ["variant", "ours", "variant"]
    for row in costs("exactness", pairs):
        assert row["low_pct"] < 5.0 < row["high_pct"] and row["cost_pct"] == pytest.approx(5.0, abs=1.0)
        assert row["pairs"] == 16 and not row["within_bound"]


def test_errors_and_their_ratios() -> None:
    exact = np.array([1.0, 2.0, 3.0])
    errors = Errors.of(np.array([1.0, 2.3, 2.6], np.float64), exact)
    assert errors.mean == pytest.approx(0.7 / 3) and errors.largest == pytest.approx(0.4)
    assert errors.rms == pytest.approx(math.sqrt((0.09 + 0.16) / 3))
    assert errors.over(Errors(errors.mean / 2, errors.rms, errors.largest * 2)).mean == pytest.approx(2.0)
    with pytest.raises(AssertionError):
        Errors.of(np.array([1.0, np.nan, 3.0]), exact)


def test_tables_have_a_column_for_every_name() -> None:
    lines = table([{"a": 1, "b": 2.345678}, {"a": 10, "long name": None}]).splitlines()
    assert lines[0].split() == ["a", "b", "long", "name"]
    assert lines[1].split() == ["1", "2.346", "-"] and lines[2].split() == ["10", "-", "-"]
    assert len({len(line) for line in lines}) == 1
