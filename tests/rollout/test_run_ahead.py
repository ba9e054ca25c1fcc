"""Steps that are launched before the results of the last one: the same output, and no trace of what is thrown away."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling_rig import VOCAB, Rig, assert_as_expected, generate
from scheduling_workloads import DISTURBANCES, EXAMPLES, RIGS, disturb, workloads

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.request import Request
from zerokl.rollout.routing_store import NO_ROUTING
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.step_pipeline import DoneStep, StepPipeline
from zerokl.rollout.step_plan import StepPlan


class Device:
    """The fake model as a device that runs behind its host: a step is run when it is begun, or as late as can be."""

    def __init__(self, rig: Rig, late: bool, takes_drawn_tokens: bool = True) -> None:
        self.rig = rig
        self.late = late
        self.takes_drawn_tokens = takes_drawn_tokens
        self.waiting: deque[tuple[StepOrder, Pending]] = deque()
        self.drawn = np.zeros(0, np.int32)
        self.num_ahead = 0
        self.most_waiting = 0

    def begin(self, order: StepOrder) -> Pending:
        pending = Pending(self)
        self.waiting.append((order, pending))
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        if not self.late:
            self.run()
        return pending

    def run(self) -> None:
        order, pending = self.waiting.popleft()
        inputs = order.inputs
        if inputs.token_rows is not None:
            self.num_ahead += 1
            if self.takes_drawn_tokens:
                inputs = replace(inputs, token_ids=self.drawn[inputs.token_rows])
        (pending.value,) = self.rig.execute([StepOrder(inputs=inputs)])
        self.drawn = pending.value.sampled.tokens


class Pending:
    value: StepResult | None = None

    def __init__(self, device: Device) -> None:
        self.device = device

    def result(self) -> StepResult:
        while self.value is None:
            self.device.run()
        return self.value


class OverlappedRig:
    """A rig whose steps overlap."""

    def __init__(self, rig: Rig, **options: bool) -> None:
        self.rig = rig
        self.device = Device(rig, **options)
        self.steps = StepPipeline(rig.scheduler, None, rig.block_size, NO_ROUTING, self.take, self.device.begin)
        self.done: list[int] = []

    def take(self, step: DoneStep, ahead: StepPlan | None) -> None:
        self.done.append(step.plan.step)
        for request in self.rig.scheduler.update(step.plan, step.results, ahead):
            self.rig.keep(request)
        self.rig.scheduler.check_integrity()

    def step(self) -> bool:
        if not self.steps.is_empty:
            self.steps.run_ahead()
            return True
        plan = self.rig.next_plan()
        if plan is None:
            return False
        self.rig.plans.append(plan)
        self.rig.check_plan(plan)
        self.steps.begin(plan, 0.0)
        return True

    def run(self, *requests: Request) -> None:
        self.rig.add(*requests)
        while self.step():
            pass


@EXAMPLES
@given(RIGS, workloads(), DISTURBANCES, st.booleans())
def test_overlapped_steps_give_every_request_its_own_output(rig, workload, disturbances, late):
    limits = AdmissionLimits(max_model_len=1000, num_blocks=rig.num_blocks, block_size=rig.block_size, vocab_size=VOCAB)
    overlapped, added, events = OverlappedRig(rig, late=late), [], sorted(disturbances)
    for wait, requests in workload:
        for request in requests:
            limits.check(request)
        overlapped.steps.finish()
        rig.add(*requests)
        added += requests
        for _ in range(wait):
            while events and events[0][0] <= len(overlapped.done):
                overlapped.steps.finish()
                disturb(rig, *events.pop(0)[1:])
            overlapped.step()
    overlapped.run()
    assert sorted(overlapped.done) == overlapped.done
    assert rig.finished.keys() == {request.request_id for request in added}
    assert_as_expected(added, rig.weights)
    rig.scheduler.check_integrity()
    assert all(not request.num_blocks for request in added)


def plain(number: int, size: int, **params: object) -> list[Request]:
    options = SamplingParams(**({"max_tokens": 40} | params))
    return [generate(f"{number}.{i}", 20 + i, params=options, group_id=None) for i in range(size)]


@pytest.mark.parametrize("late", [False, True])
def test_decoding_runs_a_step_ahead_all_the_way(late):
    overlapped = OverlappedRig(Rig(num_blocks=128, max_num_seqs=8), late=late)
    requests = plain(1, 6)
    overlapped.run(*requests)
    assert_as_expected(requests, {"policy": 1})
    assert overlapped.device.num_ahead >= 39
    assert overlapped.device.most_waiting == (2 if late else 1)


def test_a_request_that_stops_is_computed_once_more_and_leaves_no_trace():
    rig = Rig(num_blocks=64, max_num_seqs=4)
    overlapped = OverlappedRig(rig, late=True)
    requests = plain(2, 4, stop_token_ids=tuple(range(25)))
    overlapped.run(*requests)
    assert_as_expected(requests, {"policy": 1})
    assert any(request.finish_reason == "stop" and request.num_output_tokens < 40 for request in requests)
    computed = sum(request.num_tokens - 1 for request in requests)
    assert rig.num_computed > computed, "nothing was thrown away: the test shows nothing"
    assert rig.kv_cache.num_free_blocks == 64
    again = plain(2, 4, stop_token_ids=tuple(range(25)))
    for request in again:
        request.request_id += "again"
    overlapped.run(*again)
    assert_as_expected(again, {"policy": 1})
    assert any(request.num_cached_tokens for request in again)


@pytest.mark.parametrize(
    "params", [{"frequency_penalty": 0.5}, {"min_tokens": 5, "stop_token_ids": (3,)}, {"logit_bias": {7: -1.0}}]
)
def test_rows_that_depend_on_the_tokens_wait_for_them(params):
    overlapped = OverlappedRig(Rig(num_blocks=128), late=True)
    requests = plain(3, 3, **params)
    overlapped.run(*requests)
    assert_as_expected(requests, {"policy": 1})
    assert overlapped.device.num_ahead == 0


def test_those_that_wait_for_room_join_before_another_step_runs_ahead():
    overlapped = OverlappedRig(Rig(num_blocks=128, max_num_seqs=2), late=True)
    requests = plain(4, 5, max_tokens=10)
    overlapped.run(*requests)
    assert_as_expected(requests, {"policy": 1})
    assert 0 < overlapped.device.num_ahead <= 9 * 3


def test_a_pool_without_room_for_the_next_step_waits_for_the_results():
    rig = Rig(num_blocks=9, block_size=8, max_num_seqs=4)
    overlapped = OverlappedRig(rig, late=True)
    requests = plain(5, 3, max_tokens=30)
    overlapped.run(*requests)
    assert_as_expected(requests, {"policy": 1})
    assert sum(request.num_preemptions for request in requests) > 0 < overlapped.device.num_ahead


def test_a_device_that_does_not_take_the_drawn_tokens_is_found_out():
    """The control."""
    overlapped = OverlappedRig(Rig(num_blocks=128), late=True, takes_drawn_tokens=False)
    requests = plain(6, 3)
    overlapped.run(*requests)
    with pytest.raises(AssertionError):
        assert_as_expected(requests, {"policy": 1})
