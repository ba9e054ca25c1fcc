"""Waits are counted once for each admission, under what held the request last, by a clock of the test."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_rig import Rig, generate

from zerokl.rollout.histogram import HistogramData
from zerokl.rollout.request_life import WAIT_REASONS
from zerokl.rollout.sampling_params import SamplingParams


def waits(rig: Rig) -> dict[str, HistogramData]:
    rows = rig.scheduler.meter.histograms()
    return {row.labels["reason"]: row for row in rows if row.name == "queue_wait_seconds"}


def counts(rows: Mapping[str, HistogramData]) -> dict[str, int]:
    return {reason: row.count for reason, row in rows.items() if row.count}


def run_by_seconds(rig: Rig) -> None:
    """A second a step."""
    while rig.step() is not None:
        rig.now += 1.0


@pytest.mark.parametrize(
    ("options", "reason", "seconds"),
    [
        ({}, "none", 0.0),
        ({"max_num_seqs": 1}, "slots", 4.0),
        ({"max_num_batched_tokens": 12}, "tokens", 1.0),
        ({"num_blocks": 3, "enable_prefix_caching": False}, "blocks", 4.0),
    ],
)
def test_a_wait_has_the_reason_that_held_it(options: Mapping[str, Any], reason: str, seconds: float) -> None:
    rig = Rig(**options)
    rig.add(generate("first", 12), generate("second", 12))
    run_by_seconds(rig)
    expected = {"none": 2} if reason == "none" else {"none": 1, reason: 1}
    assert counts(waits(rig)) == expected
    assert waits(rig)[reason].sum == seconds


def test_samples_wait_for_the_first_one_and_preempted_ones_to_run_again() -> None:
    rig = Rig()
    group = [generate(f"s{index}", 24, group_id="g") for index in range(3)]
    rig.add(*group)
    rig.step()
    rig.now = 2.0
    rig.step()
    assert counts(waits(rig)) == {"none": 1, "sibling": 2} and waits(rig)["sibling"].sum == 4.0
    assert rig.scheduler.preempt("s0")
    rig.now = 5.0
    run_by_seconds(rig)
    assert counts(waits(rig)) == {"none": 1, "sibling": 2, "preempted": 1} and waits(rig)["preempted"].sum == 3.0


def test_another_weight_set_holds_only_the_others() -> None:
    rig = Rig(weights={"policy": 1, "reference": 2})
    rig.add(generate("a", 8), generate("b", 8, policy="reference"))
    run_by_seconds(rig)
    assert counts(waits(rig)) == {"none": 1, "policy": 1}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=12),
    st.integers(8, 20),
    st.integers(1, 4),
)
def test_every_station_is_counted_once(sizes: list[tuple[int, int]], num_blocks: int, max_num_seqs: int) -> None:
    """Under pressure, with preemptions and an abort: waits are admissions, ends are ends, first tokens are first."""
    rig = Rig(num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    groups = [
        [generate(f"{index}-{sample}", length, 12, group_id=f"{index}") for sample in range(samples)]
        for index, (length, samples) in enumerate(sizes)
    ]
    requests = [request for group in groups for request in group]
    rig.add(*requests)
    rig.step()
    aborted = rig.scheduler.abort("0-0")
    if aborted is not None:
        rig.keep(aborted)
    run_by_seconds(rig)
    metrics = rig.scheduler.metrics()
    rows = rig.scheduler.meter.histograms()
    by_name = {name: sum(row.count for row in rows if row.name == name) for name in {row.name for row in rows}}
    assert metrics["received"] == len(requests) == by_name["intake_seconds"] == by_name["request_seconds"]
    assert by_name["queue_wait_seconds"] == metrics["admissions"]
    assert counts(waits(rig)).get("preempted", 0) <= metrics["preemptions"]
    assert by_name["time_to_first_token_seconds"] == sum(request.num_output_tokens > 0 for request in requests)
    generated = sum(request.num_output_tokens for request in requests)
    assert metrics["generated_tokens"] == generated == sum(rig.scheduler.meter.version_tokens().values())
    assert set(waits(rig)) == set(WAIT_REASONS)


def test_a_life_is_logged_with_its_id_and_without_its_tokens(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    with caplog.at_level(logging.DEBUG, logger="zerokl.rollout.request_life"):
        rig.add(generate("a", 12, params=SamplingParams(max_tokens=3)), generate("b", 12))
        rig.step()
        rig.keep(rig.scheduler.abort("b"))  # type: ignore[arg-type]
        rig.scheduler.preempt("a")
        run_by_seconds(rig)
    lines = [vars(record) for record in caplog.records]
    life = [line["msg"] for line in lines if line["request_id"] == "a"]
    assert life == [
        "request received",
        "request admitted",
        "first token",
        "request preempted",
        "request admitted",
        "request finished",
    ]
    last = lines[-1]
    assert (last["reason"], last["num_output_tokens"], last["version"]) == ("length", 3, 10)
    assert [line["msg"] for line in lines if line["request_id"] == "b"][-1] == "request aborted"
    known = {"request_id", "kind", "num_prompt_tokens", "policy", "rank", "version", "reason", "waited_for", "seconds"}
    known |= {"num_cached_tokens", "num_output_tokens"}
    plain = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
    assert {name for line in lines for name in line} - plain <= known, "numbers and names, no tokens"
