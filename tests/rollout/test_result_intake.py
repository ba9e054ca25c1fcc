"""Rows that requests take from whole steps are those that they would have taken one number at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zerokl.kernels.ops import SampleResult
from zerokl.rollout.request import Request
from zerokl.rollout.results import ROW, Origin, ResultArrays, cells_of, make_rows
from zerokl.rollout.sampling_params import SamplingParams

COLUMNS = {
    "logprobs": np.float32,
    "policy_logprobs": np.float32,
    "entropy": np.float32,
    "raw_logprobs": np.float32,
    "policy_versions": np.int64,
    "steps": np.int64,
    "phases": np.uint8,
    "cached_lens": np.int32,
    "ranks": np.int16,
}


def drawn(numbers: np.random.Generator, rows: int, raw: bool) -> SampleResult:
    figures: NDArray[Any] = numbers.integers(0, 2**32, (4, rows), np.uint32).view(np.float32)  # NaNs and infinities too
    tokens = numbers.integers(0, 2**31 - 1, rows, np.int32)
    last = figures[3] if raw else None
    return SampleResult(
        tokens=tokens, logprobs=figures[0], policy_logprobs=figures[1], entropy=figures[2], raw_logprobs=last
    )


def bits(values: NDArray[Any]) -> list[int]:
    return np.ascontiguousarray(values).view(np.uint32).tolist()


@given(seed=st.integers(0, 99), steps=st.lists(st.integers(0, 5), max_size=90), raw=st.booleans(), score=st.booleans())
def test_columns_are_those_of_each_row_on_its_own(seed: int, steps: list[int], raw: bool, score: bool) -> None:
    numbers = np.random.default_rng(seed)
    params = SamplingParams(max_tokens=500, raw_logprobs=raw)
    tokens = list(range(3 + sum(steps)))
    request = (
        Request.score("s", tokens, score_start=2, sampling_params=params)
        if score
        else Request.generate("g", tokens[:3], params, seed=0)
    )
    expected: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    expected_tokens: list[int] = []
    for number, size in enumerate(steps if score else [1] * len(steps)):
        first = int(numbers.integers(0, 4))
        result = drawn(numbers, first + size + 2, raw)
        phases, cached = numbers.integers(0, 2, len(result.tokens)), numbers.integers(0, 2**31, len(result.tokens))
        origin = Origin(2**40 + number, 2**50 + number, phases, cached, 7)
        rows = make_rows(result, origin)
        if score:
            request.take_rows(rows[first : first + size])
        else:
            request.take_token(int(result.tokens[first]), cells_of(rows)[first])
        for row in range(first, first + size):
            expected_tokens.append(int(result.tokens[row]))
            for name in COLUMNS:
                figure = getattr(result, name, None)
                if figure is not None:
                    expected[name].append(int(figure.view(np.uint32)[row]))
            for name, value in zip(
                ("policy_versions", "steps", "phases", "cached_lens", "ranks"),
                (2**40 + number, 2**50 + number, int(phases[row]), int(cached[row]), 7),
                strict=True,
            ):
                expected[name].append(value)
    assert request.num_output_tokens == len(expected_tokens)
    assert request.output_token_ids.tolist() == (tokens[2 : 2 + sum(steps)] if score else expected_tokens)
    for name, dtype in COLUMNS.items():
        column = getattr(request, name)
        if column is None:
            assert name == "raw_logprobs" and not raw
            continue
        assert column.dtype == dtype and len(column) == request.num_output_tokens
        assert (bits(column) if dtype is np.float32 else column.tolist()) == expected[name], name


def test_every_field_of_a_row_is_a_column() -> None:
    assert set(ROW.names or ()) == set(COLUMNS)
    arrays = ResultArrays(0, want_raw=False)
    arrays.reserve(1)
    assert arrays.capacity == 1 and arrays.column("raw_logprobs") is None
    arrays.cells[0] = cells_of(make_rows(drawn(np.random.default_rng(0), 3, True), Origin(9, 8, 1, 6, 5)))[2]
    last = {name: arrays.column(name) for name in ("policy_versions", "steps", "phases", "cached_lens", "ranks")}
    assert {name: column.tolist() for name, column in last.items() if column is not None} == {
        "policy_versions": [9], "steps": [8], "phases": [1], "cached_lens": [6], "ranks": [5]
    }  # fmt: skip
