"""Steps that are launched before the results of the last one: the same output, and no trace of what is thrown away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from late_device import LateDevice, begin_on
from scheduling_rig import VOCAB, FakeModel, Rig, assert_as_expected, generate
from scheduling_workloads import DISTURBANCES, EXAMPLES, RIGS, disturb, workloads

from zerokl.kernels.ops import StepInputs
from zerokl.rollout import run_ahead, step_inputs
from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.request import Request
from zerokl.rollout.residents import Residents
from zerokl.rollout.results import DECODE, PREFILL
from zerokl.rollout.routing_store import NO_ROUTING
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.step_pipeline import DoneStep, StepPipeline
from zerokl.rollout.step_plan import StepPlan


def execute_on(model: FakeModel, order: StepOrder) -> StepResult:
    return StepResult(sampled=model.execute(order.inputs))


class OverlappedRig:
    """A rig whose steps overlap, with a device for each rank."""

    def __init__(self, rig: Rig, **options: bool) -> None:
        self.rig = rig
        self.devices = [LateDevice(partial(execute_on, model), **options) for model in rig.models]
        self.device = self.devices[0]
        begin = begin_on(self.devices)
        self.steps = StepPipeline(rig.scheduler, None, rig.block_size, NO_ROUTING, self.take, begin)
        self.done: list[int] = []

    def take(self, step: DoneStep, ahead: StepPlan | None) -> None:
        self.done.append(step.plan.step)
        if ahead is not None:
            self.check_ahead(ahead)
        for request in self.rig.scheduler.update(step.plan, step.results, ahead):
            self.rig.keep(request)
        self.rig.scheduler.check_integrity()

    def check_ahead(self, plan: StepPlan) -> None:
        """The budgets hold as if all requests went on."""
        requests = self.rig.scheduler.requests
        entries = [entry for part in plan.ranks for entry in part.entries]
        assert len({entry.request_id for entry in entries}) == len(entries) > 0 == len(plan.preempted)
        for part in plan.ranks:
            assert sum(entry.num_tokens for entry in part.entries) == part.num_tokens <= self.rig.max_num_batched_tokens
            assert sum(entry.num_rows for entry in part.entries) == part.num_rows
        assert all(running.size <= self.rig.max_num_seqs for running in self.rig.scheduler._residents.running)
        for entry in entries:
            request = requests[entry.request_id]
            assert request.policy == plan.policy and entry.start == request.num_computed_tokens
            assert entry.start + entry.num_tokens <= request.num_blocks * self.rig.block_size

    def step(self) -> bool:
        if not self.steps.is_empty:
            self.rig.now += 0.01  # for windows, which close while steps run
            self.steps.run_ahead(self.rig.now)
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

    def check_done(self, requests: list[Request]) -> None:
        """Each has its own output, and nothing is held any more."""
        assert sorted(self.done) == self.done
        assert self.rig.finished.keys() >= {request.request_id for request in requests}
        assert_as_expected(requests, self.rig.weights)
        self.rig.scheduler.check_integrity()
        assert all(not request.num_blocks for request in requests)
        assert all(kv_cache.num_free_blocks == self.rig.num_blocks for kv_cache in self.rig.kv_caches)


@EXAMPLES
@given(RIGS, workloads(), DISTURBANCES, st.booleans(), st.booleans())
def test_overlapped_steps_give_every_request_its_own_output(rig, workload, disturbances, late, drains):
    """Requests arrive at any step, so do aborts and preemptions; with `drains` these find no step under way."""
    play_overlapped(rig, workload, disturbances, late, drains)


def play_overlapped(rig, workload, disturbances, late, drains):
    limits = AdmissionLimits(max_model_len=1000, num_blocks=rig.num_blocks, block_size=rig.block_size, vocab_size=VOCAB)
    overlapped, added, events = OverlappedRig(rig, late=late), [], sorted(disturbances)
    for wait, requests in workload:
        for request in requests:
            limits.check(request)
        rig.add(*requests)
        added += requests
        for _ in range(wait):
            while events and events[0][0] <= len(overlapped.done):
                if drains:
                    overlapped.steps.finish()
                disturb(rig, *events.pop(0)[1:])
            overlapped.step()
    overlapped.run()
    overlapped.check_done(added)


def made_anew(
    before_plan: StepPlan, plan: StepPlan, requests: Mapping[str, Request], block_size: int, rank: int
) -> StepInputs:
    """The plain definition of an order whose tokens are partly under way: all of it is made of the requests."""
    entries, rows, row = plan.ranks[rank].entries, {}, 0
    for entry in before_plan.ranks[rank].entries:
        rows[entry.request_id] = row
        row += entry.num_rows
    sources = [
        rows[entry.request_id] if step_inputs.is_under_way(entry, requests[entry.request_id]) else -1
        for entry in entries
    ]
    inputs = step_inputs.rank_inputs(plan, plan.ranks[rank], requests, block_size)
    return run_ahead._with_sources(inputs, entries, sources)


def checked_order(
    before: StepOrder, before_plan: StepPlan, plan: StepPlan, requests: Any, block_size: int, rank: int = 0
) -> StepOrder:
    """`order_ahead`, held to its plain definition; what it was given has not changed."""
    given = deepcopy(before.inputs)
    order = _ORDER_AHEAD(before, before_plan, plan, requests, block_size, rank)
    pairs = ((order.inputs, made_anew(before_plan, plan, requests, block_size, rank)), (before.inputs, given))
    for got, expected in pairs:
        for one, other in ((got, expected), (got.sampling, expected.sampling)):
            for field in fields(one):
                value, wanted = getattr(one, field.name), getattr(other, field.name)
                if isinstance(wanted, np.ndarray):
                    assert value.dtype == wanted.dtype, field.name
                    np.testing.assert_array_equal(value, wanted, field.name)
                elif field.name != "sampling":
                    assert value == wanted, field.name
    return order


@EXAMPLES
@given(RIGS, workloads(), DISTURBANCES)
def test_orders_made_of_the_orders_before_are_those_made_anew(rig, workload, disturbances):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zerokl.rollout.step_pipeline.order_ahead", checked_order)
        play_overlapped(rig, workload, disturbances, late=True, drains=False)


def test_orders_of_a_long_decode_are_those_made_anew(monkeypatch):
    """Sequences begin blocks at different steps, and end one by one."""
    monkeypatch.setattr("zerokl.rollout.step_pipeline.order_ahead", checked_order)
    overlapped = OverlappedRig(Rig(num_blocks=256, max_num_seqs=12), late=True)
    options = SamplingParams(max_tokens=90, stop_token_ids=(3,), temperature=0.7, top_p=0.9)
    requests = [generate(f"{i}", 5 + 3 * i, params=options, group_id=None) for i in range(12)]
    overlapped.run(*requests)
    overlapped.check_done(requests)
    assert len({request.num_output_tokens for request in requests}) > 3


def on_ranks(rig: Rig, num_ranks: int, timeout: float, imbalance: float) -> Rig:
    return replace(rig, num_ranks=num_ranks, batched_token_timeout=timeout, max_group_imbalance=imbalance)


SEVERAL = st.builds(
    on_ranks, RIGS, st.sampled_from([2, 3]), st.sampled_from([0.0, 0.015, 0.1]), st.sampled_from([0.0, 0.25, 2.0])
)


@EXAMPLES
@given(SEVERAL, workloads(), DISTURBANCES, st.booleans(), st.booleans())
def test_overlapped_steps_of_several_ranks_do_too(rig, workload, disturbances, late, drains):
    """Ranks without requests, windows that close while steps run, samples that part from their prompt."""
    play_overlapped(rig, workload, disturbances, late, drains)


@pytest.mark.parametrize("timeout", [0.0, 0.05])
def test_ranks_run_a_step_ahead_all_the_way(timeout):
    """Two prompts on three ranks: one has nothing to do. More come while they run, and wait for the window."""
    rig = Rig(num_blocks=128, max_num_seqs=4, num_ranks=3, batched_token_timeout=timeout)
    overlapped = OverlappedRig(rig, late=True)
    requests = plain(1, 2)
    rig.add(*requests)
    for _ in range(10):
        overlapped.step()
    assert sum(running.size > 0 for running in rig.scheduler._residents.running) == 2
    requests += [*plain(2, 3), generate("score", 40, 1, group_id=None)]
    overlapped.run(*requests[2:])
    overlapped.check_done(requests)
    for device in overlapped.devices:
        assert device.num_ahead == device.num_steps - 1 > 40
    assert all(model.num_computed for model in rig.models)
    origin_ranks = {int(rank) for request in requests for rank in request.ranks}
    assert origin_ranks == {0, 1, 2}


def test_ranks_that_hand_requests_over_await_each_step():
    rig = Rig(num_blocks=64, num_ranks=2, roles=("prefill", "decode"))
    rig.add(*plain(5, 2))
    plan = rig.next_plan()
    assert plan is not None and rig.scheduler.plan_ahead(plan, 0.0) is None


def plain(number: int, size: int, **params: object) -> list[Request]:
    options = SamplingParams(**({"max_tokens": 40} | params))
    return [generate(f"{number}.{i}", 20 + i, params=options, group_id=None) for i in range(size)]


@pytest.mark.parametrize("late", [False, True])
def test_decoding_runs_a_step_ahead_all_the_way(late):
    overlapped = OverlappedRig(Rig(num_blocks=128, max_num_seqs=8), late=late)
    requests = plain(1, 6)
    overlapped.run(*requests)
    overlapped.check_done(requests)
    assert overlapped.device.num_ahead == overlapped.device.num_steps - 1


def test_arrivals_chunks_and_full_slots_never_make_a_step_wait():
    """A request arrives at every second step; prompts take several steps; two of three wait for a slot."""
    overlapped = OverlappedRig(Rig(num_blocks=256, max_num_seqs=6, max_num_batched_tokens=16), late=True)
    requests = [generate(f"a{i}", 20 + 7 * (i % 5), 8 + i % 9, group_id=None) for i in range(40)]
    for request in requests:
        overlapped.rig.add(request)
        overlapped.step()
        overlapped.step()
    overlapped.run()
    overlapped.check_done(requests)
    assert overlapped.device.num_ahead == overlapped.device.num_steps - 1


def test_samples_share_a_prompt_whose_last_chunk_is_under_way():
    overlapped = OverlappedRig(Rig(num_blocks=128, max_num_batched_tokens=32), late=True)
    group = [generate(f"g.{i}", 41, 12, group_id="g", sample_index=i) for i in range(5)]
    overlapped.run(*group)
    overlapped.check_done(group)
    assert [request.num_cached_tokens for request in group] == [0] + [40] * 4
    assert overlapped.device.num_ahead == overlapped.device.num_steps - 1


def test_scores_and_two_weight_sets_run_ahead():
    rig = Rig(num_blocks=128, max_num_batched_tokens=16, weights={"policy": 1, "reference": 2})
    overlapped = OverlappedRig(rig, late=True)
    params = SamplingParams(frequency_penalty=0.5, logit_bias={7: -np.inf}, min_tokens=3, max_tokens=9)
    requests = [
        Request.score(f"s{i}", np.arange(50) % VOCAB, score_start=3, sampling_params=params, policy=policy)
        for i, policy in enumerate(["policy", "reference"])
    ]
    requests += [generate(f"g{i}", 30, 20, group_id=None, policy=policy) for i, policy in enumerate(rig.weights)]
    overlapped.run(*requests)
    overlapped.check_done(requests)
    assert overlapped.device.num_ahead == overlapped.device.num_steps - 1


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


OPTIONS = [
    {"min_tokens": 5, "stop_token_ids": (3,)},
    {"logit_bias": {7: -np.inf}},
    {"frequency_penalty": 0.5},
    {"repetition_penalty": 1.1, "logit_bias": {7: -np.inf}},
]


@pytest.mark.parametrize("params", OPTIONS)
def test_bias_and_penalties_run_ahead(params):
    overlapped = OverlappedRig(Rig(num_blocks=128), late=True)
    requests = plain(3, 3, **params) + plain(4, 3, max_tokens=21)
    overlapped.run(*requests)
    overlapped.check_done(requests)
    assert overlapped.device.num_ahead == overlapped.device.num_steps - 1


def test_a_pool_without_room_for_the_next_step_waits_for_the_results():
    rig = Rig(num_blocks=9, block_size=8, max_num_seqs=4)
    overlapped = OverlappedRig(rig, late=True)
    requests = plain(7, 3, max_tokens=30)
    overlapped.run(*requests)
    assert_as_expected(requests, {"policy": 1})
    assert sum(request.num_preemptions for request in requests) > 0 < overlapped.device.num_ahead


def test_a_preempted_request_computes_its_tokens_in_chunks_without_rows():
    """Beside others that decode: its rows are told apart from theirs, and their phases."""
    rig = Rig(num_blocks=128, max_num_batched_tokens=12)
    overlapped = OverlappedRig(rig, late=True)
    requests = plain(6, 4)
    rig.add(*requests)
    while requests[1].num_output_tokens < 9:
        overlapped.step()
    overlapped.steps.finish()
    rig.scheduler.reset_prefix_cache()
    assert rig.scheduler.preempt(requests[1].request_id)
    overlapped.run()
    overlapped.check_done(requests)
    assert requests[1].num_preemptions == 1 and PREFILL in requests[1].phases[1:]
    assert all(request.phases[1:].tolist() == [DECODE] * 39 for request in requests if not request.num_preemptions)


# -- planted faults ---------------------------------------------------------------------------------------------------
Patch = pytest.MonkeyPatch


def who_left_is_forgotten_by_the_next_plan(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Residents, "note_planned", lambda self: setattr(self, "left", set()))


def tokens_are_taken_from_other_rows(monkeypatch: Patch) -> None:
    def order_ahead(*args: Any) -> Any:
        order = _ORDER_AHEAD(*args)
        rows: Any = order.inputs.token_rows
        rows[rows > 0] -= 1
        return order

    monkeypatch.setattr("zerokl.rollout.step_pipeline.order_ahead", order_ahead)


def histories_lack_the_token_under_way(monkeypatch: Patch) -> None:
    monkeypatch.setattr(LateDevice, "_with_histories", lambda self, batch: batch)


def the_bias_is_that_of_the_row_before(monkeypatch: Patch) -> None:
    monkeypatch.setattr(step_inputs, "_first_output", lambda entry, request: request.num_output_tokens)


_ORDER_AHEAD = run_ahead.order_ahead


@pytest.mark.parametrize(
    "plant",
    [
        who_left_is_forgotten_by_the_next_plan,
        tokens_are_taken_from_other_rows,
        histories_lack_the_token_under_way,
        the_bias_is_that_of_the_row_before,
    ],
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_negative_control_a_planted_fault_is_found_out(
    plant: Callable[[Patch], None], num_ranks: int, monkeypatch: Patch
) -> None:
    def play() -> None:
        rig = Rig(num_blocks=128, max_num_batched_tokens=48, max_num_seqs=6 // num_ranks, num_ranks=num_ranks)
        overlapped = OverlappedRig(rig, late=True)
        stops = tuple(range(12))
        params = [
            SamplingParams(max_tokens=30, min_tokens=9, stop_token_ids=stops, presence_penalty=0.5 * (i % 2))
            for i in range(12)
        ]
        requests = [generate(f"c{i}", 24 + i, params=params[i], group_id=None) for i in range(12)]
        for request in requests:
            overlapped.rig.add(request)
            overlapped.step()
        overlapped.run()
        overlapped.check_done(requests)

    play()
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        play()


def test_a_device_that_does_not_take_the_drawn_tokens_is_found_out():
    """The control of the device."""
    overlapped = OverlappedRig(Rig(num_blocks=128), late=True, takes_drawn_tokens=False)
    requests = plain(8, 3)
    overlapped.run(*requests)
    with pytest.raises(AssertionError):
        assert_as_expected(requests, {"policy": 1})
