"""Histograms keep every value, in the right bucket, and versions' tokens are bounded without losing any."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerokl.rollout.histogram import SECONDS, Histogram
from zerokl.rollout.version_tokens import KEPT_VERSIONS, VersionTokens

values = st.lists(st.floats(0.0, 1e4))


@given(values, st.floats(0.0, 1.0))
def test_values_are_conserved_and_quantiles_bound_them(seen: list[float], part: float) -> None:
    histogram = Histogram()
    for value in seen:
        histogram.observe(value)
    data = histogram.data("x", reason="y")
    assert (data.count, data.name, data.labels) == (len(seen), "x", {"reason": "y"})
    assert data.sum == pytest.approx(math.fsum(seen))
    for bound, count in zip((*SECONDS, math.inf), data.cumulative(), strict=True):
        assert count == sum(value <= bound for value in seen)
    quantile = data.quantile(part)
    if not seen:
        assert quantile is None
    else:
        assert quantile is not None
        below = sum(value <= quantile for value in seen)
        assert below >= part * len(seen)
        smaller = [bound for bound in SECONDS if bound < quantile]
        if smaller and part > 0:  # no smaller bound would do
            assert sum(value <= smaller[-1] for value in seen) < max(1.0, part * len(seen))


def test_bounds_rise_by_three_to_a_decade() -> None:
    assert list(SECONDS) == sorted(set(SECONDS))
    assert SECONDS[0] == 1e-4 and SECONDS[-1] == 1000.0 and len(SECONDS) == 22


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9))))
def test_no_tokens_of_old_versions_are_lost(counts: list[tuple[int, int]]) -> None:
    versions = VersionTokens()
    for version, num_tokens in counts:
        versions.count(version, num_tokens)
        tokens = versions.tokens()
        assert list(tokens)[-1] == "older" and len(tokens) <= KEPT_VERSIONS + 1
    assert sum(versions.tokens().values()) == sum(num_tokens for _, num_tokens in counts)
