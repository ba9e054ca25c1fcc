"""Rows that requests take from whole steps are those that they would have taken one number at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zerokl.kernels.ops import SampleResult
from zerokl.rollout import row_log
from zerokl.rollout.request import Request
from zerokl.rollout.results import ROW, Origin, ResultArrays, cells_of, make_rows
from zerokl.rollout.row_log import RowLog
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


# -- rows that wait in the log ----------------------------------------------------------------------------------------
STOPS: list[tuple[int, ...]] = [(), (3,), (3, 5, 8)]


def decoding(number: int, stops: int, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=STOPS[stops])
    request = Request.generate(f"r{number}", [1] * (1 + number % 3), params, seed=number)
    request.num_matched_tokens = 7 * number
    return request


def seen(request: Request) -> list[Any]:
    columns = [getattr(request, name) for name in COLUMNS]
    return [request.token_ids.tolist(), *(None if column is None else column.tobytes() for column in columns)]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 150)), min_size=1, max_size=6),
    st.lists(st.tuples(st.sampled_from("ssssssrle"), st.integers(0, 5), st.integers(0, 60)), max_size=60),
    st.sampled_from([2, 64]),
)
def test_requests_with_lanes_are_those_that_take_each_token(
    members: list[tuple[int, int]], events: list[tuple[str, int, int]], depth: int
) -> None:
    """Steps of some of them; one reads what it has, takes a token outside of the log, leaves or enters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_log, "DEPTH", depth)
        play(members, events)


def play(members: list[tuple[int, int]], events: list[tuple[str, int, int]]) -> None:
    log, numbers = RowLog(), np.random.default_rng(0)
    pairs = [(decoding(number, *how), decoding(number, *how)) for number, how in enumerate(members)]
    running = dict(enumerate(pairs))
    for logged, _ in pairs:
        log.enter(logged)
    for step, (event, number, size) in enumerate(events):
        if event == "s":
            some = [running[index] for index in sorted(running) if (index + size) % 3 and running[index][0].log]
            if not some:
                continue
            result = drawn(numbers, len(some), raw=False)
            result.tokens[:] %= 50
            cached = np.array([request.num_matched_tokens for request, _ in some], np.int32)
            rows = make_rows(result, Origin(2, step, 1, cached, 4))
            lanes = np.array([request.lane for request, _ in some])
            last = log.write([request for request, _ in some], lanes, result.tokens, rows)
            plain = [
                index
                for index, (_, request) in enumerate(some)
                if request.take_token(int(result.tokens[index]), cells_of(rows)[index])
                and (request.num_tokens == request.max_num_tokens or result.tokens[index] in request.sampling.stop_ids)
            ]
            assert set(plain) <= set(last) and last == sorted(last)
            for index in plain:
                log.leave(some[index][0])
                del running[int(some[index][0].request_id[1:])]
        elif number in running:
            logged, other = running[number]
            if event == "r":
                assert seen(logged) == seen(other)
            elif event == "l" and logged.log is not None:
                log.leave(logged)
            elif event == "e" and logged.log is None and logged.num_tokens < logged.max_num_tokens:
                log.enter(logged)
        assert [(one.num_tokens, one.num_output_tokens) for one, _ in pairs] == [
            (other.num_tokens, other.num_output_tokens) for _, other in pairs
        ]
    assert [seen(one) for one, _ in pairs] == [seen(other) for _, other in pairs]


def test_negative_control_rows_of_the_lane_before_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    members, events = [(0, 90)] * 4, [("s", 0, 0), ("s", 0, 1)] * 20
    play(members, events)
    settle = RowLog.settle

    def late(log: RowLog, request: Request) -> None:
        request.lane ^= 1
        settle(log, request)
        request.lane ^= 1

    monkeypatch.setattr(RowLog, "settle", late)
    with pytest.raises((AssertionError, ValueError)):
        play(members, events)


def test_a_token_outside_of_the_log_takes_the_request_out_of_it() -> None:
    log, request = RowLog(), decoding(0, 1, 9)
    log.enter(request)
    rows = make_rows(drawn(np.random.default_rng(0), 1, raw=False), Origin(1))
    assert log.write([request], np.array([request.lane]), np.array([4], np.int32), rows) == []
    assert not request.take_token(6, cells_of(rows)[0]) and request.log is None
    assert request.output_token_ids.tolist() == [4, 6] and request.policy_versions.tolist() == [1, 1]
    log.enter(request)
    assert log.write([request], np.array([request.lane]), np.array([3], np.int32), rows) == [0]
    log.leave(request)
    assert not log._stop_ids, "nobody is left who stops"
