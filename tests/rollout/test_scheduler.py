"""Scheduler: tables of plans, refusals, groups, preemption, weight sets, finishing."""

from __future__ import annotations

import numpy as np
import pytest

from scheduling_rig import VOCAB, Rig, assert_as_expected
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.step_inputs import build_step_inputs
from zerokl.rollout.step_plan import StepPlan


def generate(request_id: str, length: int, max_tokens: int = 4, **options) -> Request:
    tokens = np.random.default_rng(sum(map(ord, options.get("group_id") or request_id))).integers(0, VOCAB, length)
    params = options.pop("params", SamplingParams(max_tokens=max_tokens))
    return Request.generate(request_id, tokens, params, seed=options.pop("seed", 1), **options)


def table(plan: StepPlan | None) -> list[tuple[str, int, int, int]]:
    assert plan is not None
    return [(entry.request_id, entry.start, entry.num_tokens, entry.num_rows) for entry in plan.entries]


def refusals(rig: Rig) -> dict[str, int]:
    metrics = rig.scheduler.metrics()
    return {name.removeprefix("refused_"): n for name, n in metrics.items() if name.startswith("refused_") and n}


# -- one budget, decoding first --------------------------------------------------------------------
def test_plans_under_a_small_budget():
    rig = Rig(max_num_batched_tokens=10)
    rig.scheduler.add(generate("a", 6, max_tokens=3))
    rig.scheduler.add(generate("b", 12, max_tokens=2))
    assert table(rig.step()) == [("a", 0, 6, 1), ("b", 0, 4, 0)]
    assert table(rig.step()) == [("a", 6, 1, 1), ("b", 4, 8, 1)]
    assert table(rig.step()) == [("a", 7, 1, 1), ("b", 12, 1, 1)]
    assert rig.step() is None and set(rig.finished) == {"a", "b"}


def test_single_tokens_come_before_chunks_of_older_requests():
    rig = Rig(max_num_batched_tokens=20)
    rig.scheduler.add(generate("a", 17))
    rig.scheduler.add(generate("b", 3))
    rig.step()
    rig.scheduler.requests["a"].num_computed_tokens = 4
    rig.scheduler.add(generate("c", 9))
    assert table(rig.step()) == [("b", 3, 1, 1), ("a", 4, 14, 1), ("c", 0, 5, 0)]
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


def test_a_lone_request_starts_at_once_and_an_empty_scheduler_plans_nothing():
    rig = Rig()
    assert rig.scheduler.plan() is None
    rig.scheduler.add(generate("a", 30))
    assert table(rig.step()) == [("a", 0, 30, 1)]


def test_a_score_request_computes_no_last_token_and_is_chunked_like_a_prompt():
    rig = Rig(max_num_batched_tokens=8)
    rig.scheduler.add(Request.score("s", list(range(20)), score_start=10))
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


# -- refusals --------------------------------------------------------------------------------------
def test_refusals_have_reasons_and_change_nothing_else():
    rig = Rig(max_num_seqs=2, max_num_batched_tokens=16)
    for name in "abc":
        rig.scheduler.add(generate(name, 5))
    rig.step()
    assert refusals(rig) == {"slots": 1}
    waiting = rig.scheduler.requests["c"]
    assert (waiting.num_computed_tokens, waiting.num_blocks, waiting.in_flight_step) == (0, 0, -1)
    rig = Rig(max_num_batched_tokens=10)
    rig.scheduler.add(generate("a", 10))
    rig.scheduler.add(generate("b", 5))
    rig.step()
    assert refusals(rig) == {"tokens": 1} and rig.kv_cache.num_free_blocks == 62


def test_a_small_request_behind_a_head_that_needs_more_blocks_than_are_free():
    rig = Rig(num_blocks=20, max_num_batched_tokens=128)
    rig.scheduler.add(generate("holder", 75, max_tokens=40))
    rig.step()
    assert rig.kv_cache.num_free_blocks == 10
    rig.scheduler.add(generate("head", 17 * 8 - 3))
    rig.scheduler.add(generate("small", 10))
    assert table(rig.step()) == [("holder", 75, 1, 1), ("small", 0, 10, 1)]
    assert refusals(rig) == {"blocks": 1}
    assert set(rig.run()) == {"holder", "head", "small"}
    assert_as_expected(rig.finished.values(), rig.weights)


def test_look_ahead_is_bounded():
    def joined(look_ahead: int) -> bool:
        rig = Rig(num_blocks=20, look_ahead=look_ahead, max_num_batched_tokens=128)
        rig.scheduler.add(generate("holder", 75, max_tokens=40))
        rig.step()
        for index in range(3):
            rig.scheduler.add(generate(f"big{index}", 130))
        rig.scheduler.add(generate("small", 10))
        return "small" in [entry.request_id for entry in rig.step().entries]

    assert joined(3) and not joined(2)


@pytest.mark.parametrize("limit", [1, 5])
def test_a_blocked_request_is_overtaken_up_to_a_limit_and_small_ones_do_run(limit):
    rig = Rig(num_blocks=12, max_overtakes=limit)
    rig.scheduler.add(generate("holder", 10, max_tokens=5))
    rig.step()
    rig.scheduler.add(generate("head", 80, max_tokens=2))
    overtakers = 0
    for number in range(200):
        rig.scheduler.add(generate(f"small{number}", 9, max_tokens=12))
        plan = rig.step()
        names = [entry.request_id for entry in plan.entries if entry.start == 0]
        if "head" in names:
            break
        overtakers += len(names)
    assert overtakers == limit and "turn" in refusals(rig)
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


def test_an_aged_request_comes_next_even_behind_released_siblings():
    rig = Rig(num_blocks=16, max_overtakes=1, look_ahead=1, max_num_seqs=2)
    rig.scheduler.add(generate("holder", 60, max_tokens=10))
    rig.step()
    rig.scheduler.add(generate("head", 100, max_tokens=2))
    group = [generate(f"g{i}", 20, group_id="g", sample_index=i, max_tokens=2) for i in range(6)]
    for request in group:
        rig.scheduler.add(request)
    first_steps: dict[str, int] = {}
    while (plan := rig.step()) is not None:
        for entry in plan.entries:
            first_steps.setdefault(entry.request_id, plan.step)
    # The leader overtook the head and the five siblings then stood before it, more than the window is long.
    assert first_steps["g0"] < first_steps["head"] < min(first_steps[f"g{i}"] for i in range(1, 6))
    assert_as_expected(rig.finished.values(), rig.weights)


# -- preemption ------------------------------------------------------------------------------------
def test_the_most_recently_admitted_is_preempted_and_comes_back_first():
    rig = Rig(num_blocks=6, block_size=8, enable_prefix_caching=False)
    requests = [generate("a", 14, max_tokens=20), generate("b", 14, max_tokens=20), generate("c", 3, max_tokens=20)]
    for request in requests:
        rig.scheduler.add(request)
    preempted: list[str] = []
    while (plan := rig.step()) is not None:
        preempted += plan.preempted
        assert "a" not in plan.preempted
    assert preempted and requests[0].num_preemptions == 0
    assert sum(request.num_preemptions for request in requests) == len(preempted) == rig.scheduler.metrics()["preemptions"]
    assert_as_expected(requests, rig.weights)


def test_forced_preemption_in_flight_drops_the_result_and_changes_no_token():
    rig = Rig()
    for name in "ab":
        rig.scheduler.add(generate(name, 20, max_tokens=8))
    rig.step()
    plan = rig.scheduler.plan()
    inputs = build_step_inputs(plan, rig.scheduler.requests, rig.block_size)
    assert rig.scheduler.preempt("a") and not rig.scheduler.preempt("a")
    rig.scheduler.update(plan, rig.model.execute(inputs))
    assert rig.scheduler.requests["a"].num_output_tokens == 1 and rig.scheduler.requests["b"].num_output_tokens == 2
    rig.run()
    assert rig.finished["a"].num_preemptions == 1
    assert_as_expected(rig.finished.values(), rig.weights)


def test_a_preempted_score_request_keeps_its_results():
    rig = Rig(max_num_batched_tokens=8)
    rig.scheduler.add(Request.score("s", list(range(40))))
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
        rig.scheduler.add(generate(name, 9))
    rig.step()
    lost = rig.scheduler.plan()
    again = rig.scheduler.plan()
    assert table(lost) == table(again) and again.step == lost.step + 1
    inputs = build_step_inputs(again, rig.scheduler.requests, rig.block_size)
    result = rig.model.execute(inputs)
    assert rig.scheduler.update(lost, result) == []
    rig.scheduler.update(again, result)
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


# -- groups ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [7, 512])
def test_samples_of_a_group_compute_the_prompt_blocks_once(caching, budget):
    rig = Rig(max_num_batched_tokens=budget, enable_prefix_caching=caching)
    group = [generate(f"p{i}", 35, max_tokens=5, group_id="p", seed=3, sample_index=i) for i in range(4)]
    rig.run(group)
    assert rig.model.num_computed == 35 + 3 * 3 + 4 * 4  # prompt, three last parts of 3 tokens, four outputs less one each
    assert [request.num_cached_tokens for request in group] == [0, 32, 32, 32]
    assert len({tuple(request.output_token_ids.tolist()) for request in group}) == 4
    assert_as_expected(group, rig.weights)


def test_parked_siblings_do_not_stand_in_the_way_and_keep_their_order():
    rig = Rig(max_num_batched_tokens=200, max_num_seqs=8, look_ahead=0)
    for prompt in "pq":
        for i in range(3):
            rig.scheduler.add(generate(f"{prompt}{i}", 20, group_id=prompt, sample_index=i))
    assert table(rig.step()) == [("p0", 0, 20, 1), ("q0", 0, 20, 1)]
    assert [entry[0] for entry in table(rig.step())] == ["p0", "q0", "p1", "p2", "q1", "q2"]
    assert rig.scheduler.num_waiting == 0


def test_a_short_prompt_has_nothing_to_share_and_parks_nobody():
    rig = Rig()
    for i in range(3):
        rig.scheduler.add(generate(f"p{i}", 8, group_id="p", sample_index=i))
    assert len(rig.step().entries) == 3


def test_the_next_sibling_leads_when_the_leader_is_aborted():
    rig = Rig(max_num_batched_tokens=10)
    group = [generate(f"p{i}", 40, group_id="p", sample_index=i) for i in range(4)]
    for request in group:
        rig.scheduler.add(request)
    rig.step()
    rig.scheduler.abort("p2")
    assert rig.scheduler.abort("p0").num_output_tokens == 0
    assert table(rig.step()) == [("p1", 8, 10, 0)]  # the first block had been published
    rig.run()
    assert_as_expected([group[1], group[3]], rig.weights)
    assert group[3].num_cached_tokens == 32


def test_a_preempted_leader_still_leads():
    rig = Rig(max_num_batched_tokens=10, enable_prefix_caching=False)
    for i in range(3):
        rig.scheduler.add(generate(f"p{i}", 40, group_id="p", sample_index=i))
    rig.step(), rig.step()
    rig.scheduler.preempt("p0")
    rig.step()
    assert rig.scheduler.num_running == 1
    rig.run()
    assert rig.model.num_computed == 40 + 4 + 2 * 8 + 3 * 3  # four tokens of the leader's third block are computed twice
    assert_as_expected(rig.finished.values(), rig.weights)


# -- weight sets -----------------------------------------------------------------------------------
def test_one_step_runs_one_weight_set_and_they_take_turns():
    rig = Rig(weights={"policy": 1, "reference": 2})
    rig.scheduler.add(generate("a", 10, max_tokens=6))
    rig.step()
    tokens = list(range(30))
    rig.scheduler.add(Request.score("s", tokens, policy="reference"))
    rig.scheduler.add(Request.score("t", tokens, policy="policy"))
    plan = rig.step()
    assert (plan.policy, plan.policy_version, plan.weight_epoch) == ("reference", 20, 2) and table(plan) == [("s", 0, 29, 29)]
    assert refusals(rig) == {"policy": 1}
    plan = rig.step()
    assert plan.policy == "policy" and table(plan) == [("a", 10, 1, 1), ("t", 0, 29, 29)]
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)
    assert rig.finished["s"].logprobs.tolist() != rig.finished["t"].logprobs.tolist()
    assert rig.finished["s"].policy_versions.tolist() == [20] * 29


def test_new_weights_never_meet_old_keys_and_versions_are_recorded():
    rig = Rig()
    tokens = list(range(40))
    rig.run([Request.score("old", tokens)])
    rig.weights["policy"] = 5
    rig.scheduler.set_weights("policy", epoch=2, version=77)
    rig.run([Request.score("new", tokens, score_start=20), generate("g", 30)])
    assert rig.finished["new"].num_cached_tokens == 0
    assert_as_expected([rig.finished["new"], rig.finished["g"]], rig.weights)
    assert set(rig.finished["g"].policy_versions.tolist()) == {77}


def test_weights_are_not_replaced_under_running_requests_but_may_be_after_preemption():
    rig = Rig()
    rig.scheduler.add(generate("a", 20, max_tokens=6))
    rig.step(), rig.step()
    with pytest.raises(ValueError, match="weight set 'policy' must not be replaced under 1 running"):
        rig.scheduler.set_weights("policy", epoch=2, version=3)
    rig.scheduler.preempt_all()
    rig.scheduler.set_weights("policy", epoch=2, version=3)
    rig.weights["policy"] = 9
    rig.run()
    assert rig.finished["a"].policy_versions.tolist() == [10, 10, 3, 3, 3, 3]


def test_weight_sets_are_dropped_only_when_idle():
    rig = Rig(weights={"policy": 1, "reference": 2})
    rig.scheduler.add(Request.score("s", [1, 2, 3], policy="reference"))
    with pytest.raises(ValueError, match="'reference' must not be dropped"):
        rig.scheduler.drop_weights("reference")
    rig.run()
    rig.scheduler.drop_weights("reference")
    with pytest.raises(ValueError, match="'reference' is unknown"):
        rig.scheduler.drop_weights("reference")
    with pytest.raises(ValueError, match=r"policy must be one of \['policy'\], got 'reference'"):
        rig.scheduler.add(Request.score("t", [1, 2, 3], policy="reference"))


# -- ends ------------------------------------------------------------------------------------------
def test_stop_tokens_eos_and_min_tokens():
    every = tuple(range(VOCAB - 1))  # all tokens but one stop
    rig = Rig()
    done = rig.run(
        [
            generate("eos", 5, eos_token_ids=every, max_tokens=9),
            generate("ignored", 5, eos_token_ids=every, params=SamplingParams(max_tokens=9, ignore_eos=True)),
            generate("explicit", 5, params=SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=every)),
            generate("late", 5, params=SamplingParams(max_tokens=9, min_tokens=6, stop_token_ids=every)),
        ]
    )
    assert done["eos"].finish_reason == "stop" and done["eos"].stop_reason == done["eos"].output_token_ids[-1]
    assert done["ignored"].finish_reason == "length" and done["ignored"].num_output_tokens == 9
    assert done["explicit"].finish_reason == "stop" and done["explicit"].num_output_tokens < 9
    assert done["late"].output_token_ids[:6].tolist() == [VOCAB - 1] * 6 and done["late"].num_output_tokens >= 7
    assert done["late"].stop_reason in (None, done["late"].output_token_ids[-1])


def test_stop_strings_are_left_to_the_checker_from_min_tokens_on():
    calls: list[tuple[str, int]] = []

    class EveryThird:
        def check(self, request: Request) -> str | None:
            calls.append((request.request_id, request.num_output_tokens))
            return "THIRD" if request.num_output_tokens % 3 == 0 else None

    rig = Rig()
    rig.scheduler._stop_checker = EveryThird()
    done = rig.run(
        [
            generate("a", 5, params=SamplingParams(max_tokens=9, stop="x")),
            generate("b", 5, params=SamplingParams(max_tokens=9, stop="x", min_tokens=5)),
            generate("c", 5, params=SamplingParams(max_tokens=9)),
        ]
    )
    assert [(done[name].num_output_tokens, done[name].stop_reason) for name in "abc"] == [(3, "THIRD"), (6, "THIRD"), (9, None)]
    assert sorted(calls) == [("a", 1), ("a", 2), ("a", 3), ("b", 5), ("b", 6)]


def test_abort_everywhere():
    rig = Rig(max_num_seqs=1)
    requests = [generate("run", 9), generate("wait", 9), generate("lead", 20, group_id="g"), generate("parked", 20, group_id="g")]
    for request in requests:
        rig.scheduler.add(request)
    rig.step()
    assert rig.scheduler.abort("unknown") is None
    assert rig.scheduler.abort("wait") is requests[1] and rig.scheduler.abort("wait") is None
    assert rig.scheduler.abort_all() == [requests[0], requests[2], requests[3]]
    assert [request.finish_reason for request in requests] == ["abort"] * 4 and requests[0].num_output_tokens == 1
    assert rig.step() is None and rig.kv_cache.num_free_blocks == 64
    rig.kv_cache.check_integrity([])


def test_an_id_aborted_in_flight_may_be_used_again():
    rig = Rig()
    rig.scheduler.add(generate("a", 9, max_tokens=3))
    plan = rig.scheduler.plan()
    inputs = build_step_inputs(plan, rig.scheduler.requests, rig.block_size)
    rig.scheduler.abort("a")
    rig.scheduler.add(again := generate("a", 12, max_tokens=3))
    assert rig.scheduler.update(plan, rig.model.execute(inputs)) == [] and again.num_computed_tokens == 0
    with pytest.raises(ValueError, match="request_id must be new, got 'a'"):
        rig.scheduler.add(generate("a", 9))
    rig.run()
    assert_as_expected([again], rig.weights)


def test_metrics_add_up():
    rig = Rig(max_num_batched_tokens=20)
    rig.run([generate(f"p{i}", 30, group_id="p", sample_index=i) for i in range(3)])
    metrics = rig.scheduler.metrics()
    assert metrics["steps"] == len(rig.plans)
    assert metrics["computed_tokens"] == rig.model.num_computed and metrics["result_rows"] == 12
    assert metrics["cached_tokens"] == 2 * 24 and metrics["admissions"] == metrics["finished_length"] == 3
    assert metrics["running"] == metrics["waiting"] == 0 and metrics["free_blocks"] == metrics["total_blocks"] == 64
