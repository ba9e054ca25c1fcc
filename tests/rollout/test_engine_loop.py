"""The loop thread and the collection window: it sleeps until the deadline, and what comes wakes it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from scheduling_rig import FakeModel, assert_as_expected, generate

from zerokl.rollout.control import Call, Exclusive, WeightSets
from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.errors import EngineClosedError
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.scheduler_config import SchedulerConfig
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.stop import StopStrings

RANKS, BLOCKS, BLOCK = 2, 64, 8
TIMEOUT = 100.0
"""Seconds of a clock that stands still unless a test moves it."""


class FakeRanks:
    """A fake model per rank."""

    def __init__(self) -> None:
        self.models = [FakeModel(BLOCKS, BLOCK, {"policy": 1}) for _ in range(RANKS)]
        self.steps: list[list[int]] = []
        self.closed = threading.Event()

    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        self.steps.append([len(order.inputs.token_ids) for order in orders])
        return [
            StepResult(sampled=model.execute(order.inputs)) for model, order in zip(self.models, orders, strict=True)
        ]

    def kill(self) -> None: ...

    def close(self) -> None:
        self.closed.set()


class Fixture:
    def __init__(self) -> None:
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, batched_token_timeout=TIMEOUT)
        self.now = 1000.0
        self.clock_reads = 0
        self.scheduler = Scheduler(config, [KVCacheManager(BLOCKS, BLOCK) for _ in range(RANKS)])
        self.scheduler.set_weights("policy", epoch=1, version=0)
        self.ranks: Any = FakeRanks()
        weights = WeightSets(self.ranks, self.scheduler)
        self.loop = EngineLoop(
            self.scheduler, self.ranks, weights, StopStrings(None), BLOCK, lambda: None, clock=self.clock
        )
        self.loop.start()

    def clock(self) -> float:
        self.clock_reads += 1
        return self.now

    def submit(self, *names: str, length: int = 10) -> Call:
        call = Call({name: [generate(name, length, 3)] for name in names})
        self.loop.submit(call)
        return call

    def settle(self) -> None:
        """Returns once the loop has taken up all that was submitted before."""
        while self.loop.num_held:
            self.loop.at_boundary(lambda: None).result(5)
        self.loop.at_boundary(lambda: None).result(5)


@pytest.fixture
def fixture():
    made = Fixture()
    yield made
    made.loop.close()
    assert made.ranks.closed.is_set()


def test_new_requests_are_held_until_the_deadline_then_run(fixture):
    call = fixture.submit("a")
    fixture.settle()
    fixture.now += TIMEOUT / 2
    other = fixture.submit("b")
    fixture.settle()
    assert fixture.ranks.steps == [] and not call.future.done()
    fixture.now += TIMEOUT / 2
    fixture.settle()  # any wake-up looks at the clock
    call.future.result(5), other.future.result(5)
    assert fixture.ranks.steps[0] == [10, 10]
    assert_as_expected([*call.requests, *other.requests], {"policy": 1})


def test_a_held_loop_sleeps(fixture):
    fixture.submit("a")
    fixture.settle()
    fixture.settle()
    reads = fixture.clock_reads
    assert not threading.Event().wait(0.05)
    assert fixture.clock_reads - reads <= 2 and fixture.ranks.steps == []


def test_full_ranks_leave_at_once(fixture):
    calls = [fixture.submit(name, length=64) for name in "ab"]
    for call in calls:
        call.future.result(5)
    assert fixture.ranks.steps[0] == [64, 64] and fixture.now == 1000.0


def test_an_abort_wakes_the_loop(fixture):
    call = fixture.submit("a")
    fixture.settle()
    assert fixture.loop.abort(["a"]).result(5) == 1
    call.future.result(5)
    assert call.requests[0].finish_reason == "abort" and fixture.ranks.steps == []


def test_a_change_that_waits_for_requests_lets_them_go_at_once(fixture):
    call = fixture.submit("a")
    fixture.settle()
    applied: list[bool] = []
    change = Exclusive(lambda: applied.append(call.future.done()))
    fixture.loop.submit(change)
    change.future.result(5)
    assert applied == [True] and fixture.now == 1000.0


def test_close_wakes_the_loop_and_fails_what_is_held(fixture):
    call = fixture.submit("a")
    fixture.settle()
    fixture.loop.close()
    with pytest.raises(EngineClosedError):
        call.future.result(5)


def test_one_clock_measures_arrivals_and_deadlines(fixture):
    call = fixture.submit("a")
    assert call.arrival_time == 1000.0
    fixture.settle()
    assert fixture.scheduler.requests["a"].arrival_time == 1000.0
