"""Scheduler: tables of plans, refusals and ageing, preemption, failed steps."""

from __future__ import annotations

import pytest
from scheduling_rig import Rig, assert_as_expected, entries, generate, refusals, table

from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams


# -- one budget, decoding first ----------------------------------------------------------------------
def test_plans_under_a_small_budget():
    rig = Rig(max_num_batched_tokens=10)
    rig.add(generate("a", 6, max_tokens=3))
    rig.add(generate("b", 12, max_tokens=2))
    assert table(rig.step()) == [("a", 0, 6, 1), ("b", 0, 4, 0)]
    assert table(rig.step()) == [("a", 6, 1, 1), ("b", 4, 8, 1)]
    assert table(rig.step()) == [("a", 7, 1, 1), ("b", 12, 1, 1)]
    assert rig.step() is None and set(rig.finished) == {"a", "b"}


def test_single_tokens_come_before_chunks_of_older_requests():
    rig = Rig(max_num_batched_tokens=20)
    rig.add(generate("a", 17))
    rig.add(generate("b", 3))
    rig.step()
    rig.scheduler.requests["a"].num_computed_tokens = 4
    rig.scheduler._residents.running[0].advance(rig.scheduler.requests["a"])
    rig.add(generate("c", 9))
    assert table(rig.step()) == [("b", 3, 1, 1), ("a", 4, 14, 1), ("c", 0, 5, 0)]
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


def test_a_lone_request_starts_at_once_and_an_empty_scheduler_plans_nothing():
    rig = Rig()
    assert rig.plan() is None
    rig.add(generate("a", 30))
    assert table(rig.step()) == [("a", 0, 30, 1)]


def test_a_score_request_computes_no_last_token_and_is_chunked_like_a_prompt():
    rig = Rig(max_num_batched_tokens=8)
    rig.add(Request.score("s", list(range(20)), score_start=10))
    assert table(rig.step()) == [("s", 0, 8, 0)]
    assert table(rig.step()) == [("s", 8, 8, 7)]
    assert table(rig.step()) == [("s", 16, 3, 3)]
    assert rig.step() is None and rig.finished["s"].finish_reason == "length"
    assert_as_expected(rig.finished.values(), rig.weights)


def test_what_is_scored_equals_what_was_sampled():
    rig = Rig()
    params = SamplingParams(max_tokens=12, min_tokens=4, frequency_penalty=0.5, raw_logprobs=True, stop_token_ids=(1,))
    done = rig.run([generate("a", 11, params=params)])["a"]
    scores = Rig(max_num_batched_tokens=5)
    rated = scores.run([Request.score("s", done.token_ids.copy(), score_start=11, sampling_params=params)])["s"]
    assert rated.logprobs.tolist() == done.logprobs.tolist() and len(rated.logprobs) >= 4
    assert rated.raw_logprobs.tolist() == done.raw_logprobs.tolist()
    assert rated.entropy.tolist() == done.entropy.tolist()


# -- refusals ----------------------------------------------------------------------------------------
def test_refusals_have_reasons_and_change_nothing_else():
    rig = Rig(max_num_seqs=2, max_num_batched_tokens=16)
    for name in "abc":
        rig.add(generate(name, 5))
    rig.step()
    assert refusals(rig) == {"slots": 1}
    waiting = rig.scheduler.requests["c"]
    assert (waiting.num_computed_tokens, waiting.num_blocks, waiting.rank) == (0, 0, -1)
    rig = Rig(max_num_batched_tokens=10)
    rig.add(generate("a", 10))
    rig.add(generate("b", 5))
    rig.step()
    assert refusals(rig) == {"tokens": 1} and rig.kv_cache.num_free_blocks == 62


def test_a_small_request_behind_a_head_that_needs_more_blocks_than_are_free():
    rig = Rig(num_blocks=20, max_num_batched_tokens=128)
    rig.add(generate("holder", 75, max_tokens=40))
    rig.step()
    assert rig.kv_cache.num_free_blocks == 10
    rig.add(generate("head", 17 * 8 - 3))
    rig.add(generate("small", 10))
    assert table(rig.step()) == [("holder", 75, 1, 1), ("small", 0, 10, 1)]
    assert refusals(rig) == {"blocks": 1}
    assert set(rig.run()) == {"holder", "head", "small"}
    assert_as_expected(rig.finished.values(), rig.weights)


def test_look_ahead_is_bounded():
    def joined(look_ahead: int) -> bool:
        rig = Rig(num_blocks=20, look_ahead=look_ahead, max_num_batched_tokens=128)
        rig.add(generate("holder", 75, max_tokens=40))
        rig.step()
        for index in range(3):
            rig.add(generate(f"big{index}", 130))
        rig.add(generate("small", 10))
        return "small" in [entry.request_id for entry in entries(rig.step())]

    assert joined(3) and not joined(2)


@pytest.mark.parametrize("limit", [1, 5])
def test_a_blocked_request_is_overtaken_up_to_a_limit_and_small_ones_do_run(limit):
    rig = Rig(num_blocks=12, max_overtakes=limit)
    rig.add(generate("holder", 10, max_tokens=5))
    rig.step()
    rig.add(generate("head", 80, max_tokens=2))
    overtakers = 0
    for number in range(200):
        rig.add(generate(f"small{number}", 9, max_tokens=12))
        plan = rig.step()
        names = [entry.request_id for entry in entries(plan) if entry.start == 0]
        if "head" in names:
            break
        overtakers += len(names)
    assert overtakers == limit and "turn" in refusals(rig)
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


def test_an_aged_request_comes_next_even_behind_released_siblings():
    rig = Rig(num_blocks=16, max_overtakes=1, look_ahead=1, max_num_seqs=2)
    rig.add(generate("holder", 60, max_tokens=10))
    rig.step()
    rig.add(generate("head", 100, max_tokens=2))
    group = [generate(f"g{i}", 20, group_id="g", sample_index=i, max_tokens=2) for i in range(6)]
    for request in group:
        rig.add(request)
    first_steps: dict[str, int] = {}
    while (plan := rig.step()) is not None:
        for entry in entries(plan):
            first_steps.setdefault(entry.request_id, plan.step)
    # The leader overtook the head and the five siblings then stood before it, more than the window is long.
    assert first_steps["g0"] < first_steps["head"] < min(first_steps[f"g{i}"] for i in range(1, 6))
    assert_as_expected(rig.finished.values(), rig.weights)


# -- preemption --------------------------------------------------------------------------------------
def test_the_most_recently_admitted_is_preempted_and_comes_back_first():
    rig = Rig(num_blocks=6, block_size=8, enable_prefix_caching=False)
    requests = [generate("a", 14, max_tokens=20), generate("b", 14, max_tokens=20), generate("c", 3, max_tokens=20)]
    for request in requests:
        rig.add(request)
    preempted: list[str] = []
    while (plan := rig.step()) is not None:
        preempted += plan.preempted
        assert "a" not in plan.preempted
    assert preempted and requests[0].num_preemptions == 0
    assert (
        sum(request.num_preemptions for request in requests) == len(preempted) == rig.scheduler.metrics()["preemptions"]
    )
    assert_as_expected(requests, rig.weights)


def test_forced_preemption_in_flight_drops_the_result_and_changes_no_token():
    rig = Rig()
    for name in "ab":
        rig.add(generate(name, 20, max_tokens=8))
    rig.step()
    plan = rig.plan()
    orders = rig.orders(plan)
    assert rig.scheduler.preempt("a") and not rig.scheduler.preempt("a")
    rig.scheduler.update(plan, rig.execute(orders))
    assert rig.scheduler.requests["a"].num_output_tokens == 1 and rig.scheduler.requests["b"].num_output_tokens == 2
    rig.run()
    assert rig.finished["a"].num_preemptions == 1
    assert_as_expected(rig.finished.values(), rig.weights)


def test_a_preempted_score_request_keeps_its_results():
    rig = Rig(max_num_batched_tokens=8)
    rig.add(Request.score("s", list(range(40))))
    rig.step(), rig.step()
    rig.scheduler.preempt("s")
    request = rig.scheduler.requests["s"]
    assert request.num_output_tokens == 16 and request.num_computed_tokens == 0
    assert table(rig.step()) == [("s", 16, 8, 8)]  # two published blocks are taken from the cache
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


def test_a_failed_step_is_planned_again():
    rig = Rig(max_num_batched_tokens=16)
    for name in "abc":
        rig.add(generate(name, 9))
    rig.step()
    lost = rig.plan()
    again = rig.plan()
    assert table(lost) == table(again) and again.step == lost.step + 1
    orders = rig.orders(again)
    result = rig.execute(orders)
    assert rig.scheduler.update(lost, result) == []
    rig.scheduler.update(again, result)
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)
