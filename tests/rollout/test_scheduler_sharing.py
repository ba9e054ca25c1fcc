"""Scheduler: samples of one prompt share its blocks, and weight sets share the steps."""

from __future__ import annotations

import pytest
from scheduling_rig import Rig, assert_as_expected, entries, generate, refusals, table

from zerokl.rollout.request import Request


# -- groups ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [7, 512])
def test_samples_of_a_group_compute_the_prompt_blocks_once(caching, budget):
    rig = Rig(max_num_batched_tokens=budget, enable_prefix_caching=caching)
    group = [generate(f"p{i}", 35, max_tokens=5, group_id="p", seed=3, sample_index=i) for i in range(4)]
    rig.run(group)
    assert rig.num_computed == 35 + 3 * 3 + 4 * 4  # prompt, three last parts of 3 tokens, four outputs less one each
    assert [request.num_cached_tokens for request in group] == [0, 32, 32, 32]
    assert len({tuple(request.output_token_ids.tolist()) for request in group}) == 4
    assert_as_expected(group, rig.weights)


def test_parked_siblings_do_not_stand_in_the_way_and_keep_their_order():
    rig = Rig(max_num_batched_tokens=200, max_num_seqs=8, look_ahead=0)
    for prompt in "pq":
        for i in range(3):
            rig.add(generate(f"{prompt}{i}", 20, group_id=prompt, sample_index=i))
    assert table(rig.step()) == [("p0", 0, 20, 1), ("q0", 0, 20, 1)]
    assert [entry[0] for entry in table(rig.step())] == ["p0", "q0", "p1", "p2", "q1", "q2"]
    assert rig.scheduler.num_waiting == 0


def test_a_short_prompt_has_nothing_to_share_and_parks_nobody():
    rig = Rig()
    for i in range(3):
        rig.add(generate(f"p{i}", 7, group_id="p", sample_index=i))
    assert len(entries(rig.step())) == 3


@pytest.mark.parametrize("caching", [True, False])
def test_samples_of_a_prompt_of_whole_blocks_compute_its_last_token_alone(caching):
    rig = Rig(enable_prefix_caching=caching)
    group = [generate(f"p{i}", 32, max_tokens=5, group_id="p", seed=3, sample_index=i) for i in range(4)]
    rig.run(group)
    assert rig.num_computed == 32 + 3 + 4 * 4
    assert [request.num_cached_tokens for request in group] == [0, 31, 31, 31]
    assert_as_expected(group, rig.weights)


def test_the_next_sibling_leads_when_the_leader_is_aborted():
    rig = Rig(max_num_batched_tokens=10)
    group = [generate(f"p{i}", 40, group_id="p", sample_index=i) for i in range(4)]
    for request in group:
        rig.add(request)
    rig.step()
    rig.scheduler.abort("p2")
    assert rig.scheduler.abort("p0").num_output_tokens == 0
    assert table(rig.step()) == [("p1", 8, 10, 0)]  # the first block had been published
    rig.run()
    assert_as_expected([group[1], group[3]], rig.weights)
    assert group[3].num_cached_tokens == 39


def test_a_preempted_leader_still_leads():
    rig = Rig(max_num_batched_tokens=10, enable_prefix_caching=False)
    for i in range(3):
        rig.add(generate(f"p{i}", 40, group_id="p", sample_index=i))
    rig.step(), rig.step()
    rig.scheduler.preempt("p0")
    rig.step()
    assert rig.scheduler.num_running == 1
    rig.run()
    assert rig.num_computed == 40 + 4 + 2 + 3 * 3  # four tokens of the leader's third block are computed twice
    assert_as_expected(rig.finished.values(), rig.weights)


# -- weight sets -------------------------------------------------------------------------------------
def test_one_step_runs_one_weight_set_and_they_take_turns():
    rig = Rig(weights={"policy": 1, "reference": 2})
    rig.add(generate("a", 10, max_tokens=6))
    rig.step()
    tokens = list(range(30))
    rig.add(Request.score("s", tokens, policy="reference"))
    rig.add(Request.score("t", tokens, policy="policy"))
    plan = rig.step()
    assert (plan.policy, plan.policy_version, plan.weight_epoch) == ("reference", 20, 2) and table(plan) == [
        ("s", 0, 29, 29)
    ]
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
    rig.add(generate("a", 20, max_tokens=6))
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
    rig.add(Request.score("s", [1, 2, 3], policy="reference"))
    with pytest.raises(ValueError, match="'reference' must not be dropped"):
        rig.scheduler.drop_weights("reference")
    rig.run()
    rig.scheduler.drop_weights("reference")
    with pytest.raises(ValueError, match="'reference' is unknown"):
        rig.scheduler.drop_weights("reference")
    with pytest.raises(ValueError, match=r"policy must be one of \['policy'\], got 'reference'"):
        rig.add(Request.score("t", [1, 2, 3], policy="reference"))
