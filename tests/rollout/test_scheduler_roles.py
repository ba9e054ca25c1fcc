"""Prefill and decode ranks: handovers of KV blocks, failed steps, full targets, and where each token came from."""

from __future__ import annotations

import pytest
from scheduling_rig import Rig, assert_as_expected, entries, generate, placement, refusals

from zerokl.rollout.outputs import Rollout
from zerokl.rollout.request import Request
from zerokl.rollout.results import DECODE, PREFILL
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.scheduler_config import SchedulerConfig

SPLIT = ("prefill", "decode")


def split(**options) -> Rig:
    return Rig(**{"num_ranks": 2, "roles": SPLIT, **options})


def test_a_request_is_handed_over_once_its_prompt_is_computed():
    rig = split(max_num_batched_tokens=16)
    rig.add(request := generate("a", 20, 5))
    assert placement(rig.step()) == placement(rig.step()) == [["a"], []] and request.num_output_tokens == 1
    plan = rig.plan()
    (handover,) = plan.handovers
    assert placement(plan) == [[], ["a"]] and handover[:3] == ("a", 0, 1) and len(handover.source_blocks) == 3
    orders = rig.orders(plan)
    assert [len(order.sends) for order in orders] == [1, 0] and [len(order.receives) for order in orders] == [0, 1]
    assert rig.kv_caches[0].num_free_blocks == 61, "the source keeps its blocks until the step has succeeded"
    rig.scheduler.update(plan, rig.execute(orders))
    assert rig.kv_caches[0].num_free_blocks == 64 and rig.kv_caches[1].num_free_blocks == 61
    rig.run()
    assert_as_expected([request], rig.weights)
    assert request.ranks.tolist() == [0, 1, 1, 1, 1] and request.phases.tolist() == [PREFILL] + 4 * [DECODE]
    assert rig.scheduler.metrics()["handovers"] == 1


def test_a_failed_step_lists_the_same_handover_again():
    rig = split()
    rig.add(generate("a", 20, 5))
    rig.step()
    lost, again = rig.plan(), rig.plan()
    assert lost.handovers == again.handovers and len(lost.handovers) == 1 and lost.ranks == again.ranks
    rig.scheduler.check_integrity()
    results = rig.execute(rig.orders(again))
    assert rig.scheduler.update(lost, results) == [] and rig.kv_caches[0].num_free_blocks == 61
    rig.scheduler.update(again, results)
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_a_request_on_its_way_lets_go_of_both_ranks(end):
    rig = split()
    rig.add(generate("a", 20, 5))
    rig.step()
    plan = rig.plan()
    orders = rig.orders(plan)
    getattr(rig.scheduler, end)("a")
    assert [kv_cache.num_free_blocks for kv_cache in rig.kv_caches] == [64, 64]
    rig.scheduler.check_integrity()
    assert rig.scheduler.update(plan, rig.execute(orders)) == []
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


def test_blocks_that_the_target_has_cached_are_not_moved():
    rig = split()
    rig.run([generate("a", 40, 6)])
    first = next(plan for plan in rig.plans if plan.handovers)
    tokens = rig.finished["a"].prompt_token_ids
    rig.run([Request.generate("b", tokens, rig.finished["a"].sampling_params, seed=9)])
    second = [plan for plan in rig.plans if plan.handovers][1]
    assert len(first.handovers[0].source_blocks) == 5 and second.handovers[0].source_blocks == ()
    assert rig.finished["b"].cached_lens.tolist() == [39, 40, 40, 40, 40, 40]
    assert_as_expected(rig.finished.values(), rig.weights)


def test_a_request_goes_on_where_it_is_while_the_decode_ranks_are_full():
    rig = split(num_blocks=12, max_num_seqs=2)
    requests = [generate(name, 14, max_tokens) for name, max_tokens in zip("abcde", (30, 30, 6, 6, 6), strict=True)]
    rig.run(requests)
    assert refusals(rig)["handover"] > 0
    assert any(set(request.ranks.tolist()) == {0} and set(request.phases.tolist()) == {0, 1} for request in requests)
    assert any(1 in request.ranks for request in requests)
    assert_as_expected(requests, rig.weights)


def test_what_a_decode_rank_preempts_is_computed_again_on_a_prefill_rank():
    rig = split(num_blocks=9, max_num_seqs=4, enable_prefix_caching=False)
    requests = [generate(name, 10, 40) for name in "abc"]
    rig.run(requests)  # the rig checks that rank 1 never computes a prompt
    again = [request for request in requests if request.num_preemptions]
    assert again
    for request in again:
        phases, ranks = request.phases.tolist(), request.ranks.tolist()
        assert phases.count(PREFILL) >= 2
        assert all(rank == 0 for rank, phase in zip(ranks, phases, strict=True) if phase == PREFILL)
    assert_as_expected(requests, rig.weights)


def test_scores_stay_on_prefill_ranks():
    rig = Rig(num_ranks=3, roles=("decode", "prefill", "prefill"))
    rig.run([Request.score(f"s{i}", list(range(30 + i))) for i in range(6)])
    assert {rank for request in rig.finished.values() for rank in request.ranks.tolist()} == {1, 2}
    assert not any(plan.handovers for plan in rig.plans) and {
        phase for request in rig.finished.values() for phase in request.phases.tolist()
    } == {PREFILL}
    assert_as_expected(rig.finished.values(), rig.weights)


def test_handovers_keep_to_the_slots_and_tokens_of_the_target():
    rig = Rig(num_ranks=3, roles=("prefill", "prefill", "decode"), max_num_seqs=3, max_num_batched_tokens=30)
    rig.run([generate(str(number), 9, 12) for number in range(14)])  # the rig checks the caps
    assert max(len(plan.ranks[2].entries) for plan in rig.plans) == 3
    assert_as_expected(rig.finished.values(), rig.weights)


def test_negative_control_blocks_that_are_not_moved_change_the_output():
    with pytest.raises(AssertionError):
        rig = split(moves_blocks=False)
        rig.run([generate("a", 20, 8)])
        assert_as_expected(rig.finished.values(), rig.weights)


def test_roles_are_checked():
    def scheduler(*roles: str) -> Scheduler:
        config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=1, roles=roles)
        return Scheduler(config, split().kv_caches)

    with pytest.raises(ValueError, match=r"roles must have a rank that can decode \('mixed' or 'decode'\)"):
        scheduler("prefill", "prefill")
    with pytest.raises(ValueError, match="roles must have a rank that can prefill"):
        scheduler("decode", "decode")
    with pytest.raises(ValueError, match=r"roles must be a sequence of .* got .'mixed', 'both'."):
        scheduler("mixed", "both")
    with pytest.raises(ValueError, match="roles must name each of the 2 ranks once"):
        scheduler("mixed")


# -- where tokens come from --------------------------------------------------------------------------
def test_each_token_tells_step_phase_cached_length_and_rank_after_a_preemption_too():
    rig = Rig(num_ranks=2)
    rig.run([generate("warm", 30, 1)])
    tokens = rig.finished["warm"].prompt_token_ids
    rig.add(request := Request.generate("a", tokens, SamplingParams(max_tokens=6), seed=1))
    rig.step(), rig.step()
    rig.scheduler.preempt("a")
    rig.run()
    steps = {plan.step: plan for plan in rig.plans}
    assert request.phases.tolist() == [PREFILL, DECODE, PREFILL, DECODE, DECODE, DECODE]
    assert request.cached_lens.tolist() == [24, 24, 24, 24, 24, 24] and request.steps.tolist() == [2, 3, 4, 5, 6, 7]
    for position, (step, rank) in enumerate(zip(request.steps.tolist(), request.ranks.tolist(), strict=True)):
        (entry,) = [entry for entry in steps[step].ranks[rank].entries if entry.request_id == "a"]
        assert entry.start + entry.num_tokens == 30 + position
    assert request.steps.dtype == "int64" and request.phases.dtype == "uint8"
    assert request.cached_lens.dtype == "int32" and request.ranks.dtype == "int16"
    record = Rollout.from_request(request)
    for name in ("steps", "phases", "cached_lens", "ranks"):
        assert getattr(record, name).tolist() == getattr(request, name).tolist()


def test_the_last_token_of_a_prompt_computed_alone_is_prefill():
    rig = Rig(max_num_batched_tokens=9)
    rig.add(request := generate("a", 10, 3))
    rig.run()
    assert request.phases.tolist() == [PREFILL, DECODE, DECODE]
    assert [len(entries(plan)) for plan in rig.plans] == [1, 1, 1, 1]
