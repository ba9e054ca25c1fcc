"""plan(): changes nothing; balance over ranks, groups, reserves, and the collection window."""

from __future__ import annotations

from typing import Any

import pytest
from scheduling_rig import Rig, assert_as_expected, bits, entries, generate, placement, refusals, table

from zerokl.rollout.planning import plan
from zerokl.rollout.request import Request
from zerokl.rollout.snapshot import Decision, Snapshot
from zerokl.rollout.step_plan import Hold


def snapshot_of(rig: Rig) -> Snapshot:
    scheduler = rig.scheduler
    return Snapshot(
        running=scheduler._residents.running,
        kv_caches=scheduler._residents.kv_caches,
        queue=scheduler._queue,
        weights=scheduler._weights.sets,
        turns=sorted({request.policy for request in scheduler.requests.values()}),
    )


def decide(rig: Rig) -> Decision:
    return plan(snapshot_of(rig), rig.config, rig.now)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_ranks": 3, "batched_token_timeout": 0.1},
        {"num_ranks": 3, "roles": ("prefill", "decode", "mixed")},
        {"num_ranks": 2, "reserved_output_blocks": 2, "enable_prefix_caching": False},
    ],
)
def test_a_decision_that_is_not_committed_leaves_every_bit_as_it_was(options):
    rig = Rig(num_blocks=10, max_num_seqs=4, max_num_batched_tokens=40, look_ahead=2, max_overtakes=2, **options)
    preempted = moved = joined = 0
    for number in range(60):
        if number < 14:
            rig.add(*(generate(f"{number}.{i}", 6 + number * 2, 30, group_id=str(number)) for i in range(2)))
        if not rig.scheduler.requests:
            break
        before = bits(rig.scheduler), bits(rig.models)
        first, second = decide(rig), decide(rig)
        assert (bits(rig.scheduler), bits(rig.models)) == before
        assert bits(first) == bits(second)
        preempted += sum(len(rank.preempted) for rank in first.ranks)
        moved, joined = moved + len(first.moves), joined + len(first.outcomes)
        rig.step()
        assert bits(rig.scheduler) != before[0]  # the comparison sees what a commit changes
        rig.now += 0.03
    assert joined and bool(moved) == ("roles" in options)
    assert preempted or "reserved_output_blocks" in options


# -- ranks -----------------------------------------------------------------------------------------
def test_ranks_are_balanced_by_the_tokens_of_the_step_and_idle_ones_get_a_dummy():
    rig = Rig(num_ranks=3)
    rig.add(generate("a", 40))
    first = rig.step()
    assert placement(first) == [["a"], [], []] and [rank.is_dummy for rank in first.ranks] == [False, True, True]
    orders = rig.orders(first)
    assert [len(order.inputs.token_ids) for order in orders] == [40, 0, 0] and not orders[1].has_moves
    rig.add(generate("b", 30), generate("c", 20), generate("d", 8), generate("e", 9))
    assert placement(rig.step()) == [["a", "d", "e"], ["b"], ["c"]]
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


def test_equal_tokens_go_where_fewer_are_expected_then_to_the_lowest_rank():
    rig = Rig(num_ranks=3)
    rig.add(generate("a", 10, 30), generate("b", 10, 5), generate("c", 10, 5))
    assert placement(rig.step()) == [["a"], ["b"], ["c"]]
    rig.add(generate("d", 10), generate("e", 10))
    assert placement(rig.step()) == [["a"], ["b", "d"], ["c", "e"]]


def test_budgets_are_each_ranks_own():
    rig = Rig(num_ranks=2, max_num_batched_tokens=10, max_num_seqs=1)
    rig.add(*(generate(name, 12) for name in "abc"))
    assert table(rig.step()) == [("a", 0, 10, 0), ("b", 0, 10, 0)] and refusals(rig) == {"tokens": 1}
    assert table(rig.step()) == [("a", 10, 2, 1), ("b", 10, 2, 1)] and refusals(rig) == {"tokens": 1, "slots": 1}


def test_a_cached_prefix_draws_a_request_to_its_rank():
    rig = Rig(num_ranks=2)
    rig.add(generate("x", 9), generate("long", 40, group_id="p"))
    assert placement(rig.step()) == [["x"], ["long"]]
    rig.run()
    tokens = rig.finished["long"].prompt_token_ids
    rig.add(Request.generate("again", tokens, rig.finished["long"].sampling_params, seed=5))
    assert placement(rig.step()) == [[], ["again"]] and rig.scheduler.requests["again"].num_cached_tokens == 39


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("imbalance", "num_homes"), [(1.0, 1), (0.25, 3), (0.0, 3)])
def test_samples_stay_with_their_leader_up_to_the_stated_imbalance(caching, imbalance, num_homes):
    rig = Rig(num_ranks=3, enable_prefix_caching=caching, max_group_imbalance=imbalance)
    group = [generate(f"p{i}", 40, 8, group_id="p", sample_index=i) for i in range(6)]
    rig.run(group)
    homes = [{int(rank) for rank in request.ranks} for request in group]
    assert all(len(home) == 1 for home in homes) and len(set.union(*homes)) == num_homes
    assert (rig.num_computed == 40 + 5 * 1 + 6 * 7) == (num_homes == 1)
    assert_as_expected(group, rig.weights)


def test_reserved_output_blocks_leave_room_to_grow_and_never_keep_out_what_fits_alone():
    def num_preemptions(reserved: int) -> int:
        rig = Rig(num_blocks=12, reserved_output_blocks=reserved)
        rig.run([generate(name, 14, 30) for name in "abcd"] + [generate("whole", 60, 36)])
        assert_as_expected(rig.finished.values(), rig.weights)
        return rig.scheduler.metrics()["preemptions"]

    assert num_preemptions(0) > 0 == num_preemptions(4) == num_preemptions(1000)


def test_preemption_is_of_the_rank_that_lacks_blocks():
    rig = Rig(num_ranks=2, num_blocks=6, max_num_batched_tokens=64, enable_prefix_caching=False)
    rig.add(generate("a", 14, 30), generate("c", 6, 8), generate("b", 14, 20), generate("d", 6, 8))
    rig.step()
    home = {request.request_id: request.rank for request in rig.scheduler.requests.values()}
    while (step := rig.step()) is not None:
        for name in step.preempted:
            assert home[name] == home["a"] or home[name] == home["b"]
            assert not any(entry.start == 0 for entry in step.ranks[home[name]].entries), "joined where blocks lack"
    assert_as_expected(rig.finished.values(), rig.weights)


# -- the window ------------------------------------------------------------------------------------
def window(**options: Any) -> Rig:
    return Rig(**{"num_ranks": 2, "batched_token_timeout": 0.1, **options})


def test_a_lone_request_on_one_rank_starts_at_once():
    rig = Rig(num_ranks=1, batched_token_timeout=0.1)
    rig.add(generate("a", 10))
    assert table(rig.plan()) == [("a", 0, 10, 1)]


def test_new_requests_wait_for_others_until_an_absolute_deadline():
    rig = window()
    rig.now = 5.0
    rig.add(generate("a", 10))
    assert rig.plan() == Hold(5.1)
    rig.now = 5.09
    rig.add(generate("b", 10))
    assert rig.plan() == Hold(5.1), "a later arrival must not move the deadline"
    rig.now = 5.1
    assert placement(rig.plan()) == [["a"], ["b"]]


def test_an_empty_queue_costs_no_wait_and_decoding_goes_on():
    rig = window()
    rig.add(generate("a", 10, 30))
    rig.step()
    assert isinstance(rig.plan(), type(rig.plans[0]))
    rig.add(generate("b", 10))
    held = rig.plan()
    assert table(held) == [("a", 10, 1, 1)] and refusals(rig)["window"] >= 1
    rig.scheduler.update(held, rig.execute(rig.orders(held)))
    rig.now += 0.1
    assert placement(rig.step()) == [["a"], ["b"]]


@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 10}, {"max_num_seqs": 1}], ids=["tokens", "slots"])
def test_it_leaves_at_once_when_every_rank_is_full(options):
    rig = window(**options)
    rig.add(generate("a", 12))
    assert isinstance(rig.plan(), Hold)
    rig.add(generate("b", 12))
    assert placement(rig.plan()) == [["a"], ["b"]] and rig.now == 0.0


def test_it_leaves_at_once_when_the_head_lacks_blocks():
    rig = window(num_blocks=8)
    rig.add(generate("a", 40, 8), generate("b", 40, 8))
    rig.step()
    rig.add(generate("head", 50), generate("small", 3))
    assert "small" in [entry.request_id for entry in entries(rig.plan())]


def test_those_that_were_tried_before_never_wait():
    rig = window(max_num_seqs=1)
    rig.add(*(generate(name, 10, 2) for name in "abc"))
    rig.step()  # full: leaves at once, "c" stays behind
    rig.step()
    assert rig.now == 0.0 and len(rig.finished) == 2
    assert placement(rig.plan()) == [["c"], []]


def test_preempted_requests_and_released_siblings_never_wait():
    rig = window()
    rig.add(*(generate(f"p{i}", 20, 6, group_id="p", sample_index=i) for i in range(2)))
    rig.step()
    start = rig.now
    assert "p1" in [entry.request_id for entry in entries(rig.step())] and rig.now == start
    rig.scheduler.preempt_all()
    assert len(entries(rig.step())) == 2 and rig.now == start


def test_the_deadline_moves_on_when_the_first_is_aborted_and_infinity_waits_for_nobody():
    rig = window()
    rig.add(generate("a", 10))
    rig.now = 0.05
    rig.add(generate("b", 10))
    rig.scheduler.abort("a")
    assert rig.plan() == Hold(0.05 + 0.1)
    rig.now = float("inf")
    assert table(rig.plan()) == [("b", 0, 10, 1)]


def test_each_weight_set_has_its_own_window():
    rig = window(weights={"policy": 1, "reference": 2})
    rig.add(generate("a", 10))
    rig.now = 0.04
    rig.add(Request.score("s", [1, 2, 3], policy="reference"))
    assert rig.plan() == Hold(0.1)
    rig.now = 0.1
    first = rig.plan()
    assert first.policy == "policy"
    rig.scheduler.update(first, rig.execute(rig.orders(first)))
    rig.run()
    assert rig.now == pytest.approx(0.14)
    assert_as_expected(rig.finished.values(), rig.weights)
