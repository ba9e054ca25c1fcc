"""Faults that schedulers of this kind have had, each as a case that must not come back."""

from __future__ import annotations

import logging

import pytest
from scheduling_rig import Rig, assert_as_expected, bits, entries, generate, refusals, table

from zerokl.rollout.admission import AdmissionLimits
from zerokl.rollout.request import Request
from zerokl.rollout.step_plan import Hold, Refusal, StepPlan


def ep(**options) -> Rig:
    """Two ranks with the usual window of 100 ms."""
    return Rig(**{"num_ranks": 2, "batched_token_timeout": 0.1, **options})


def ids(plan: StepPlan | Hold | None) -> list[str]:
    assert isinstance(plan, StepPlan)
    return [entry.request_id for entry in entries(plan)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_head_that_needs_17_of_10_blocks_lets_the_10_token_request_behind_it_run(num_ranks):
    rig = Rig(num_ranks=num_ranks, batched_token_timeout=0.1, num_blocks=20, max_num_batched_tokens=512)
    rig.add(*(generate(f"holder{rank}", 75, 60) for rank in range(num_ranks)))
    rig.step()
    assert {kv_cache.num_free_blocks for kv_cache in rig.kv_caches} == {10}
    now = rig.now
    rig.add(generate("head", 17 * 8), generate("small", 10))
    assert "small" in ids(rig.step()) and rig.now == now, "it must neither stand still nor wait"
    assert refusals(rig)["blocks"] == 1
    rig.run()
    assert_as_expected(rig.finished.values(), rig.weights)


def test_a_refused_head_is_not_counted_again_and_again():
    """Tokens and blocks of a refused request must not eat the budget of those behind it, however often it is tried."""
    rig = Rig(num_blocks=20, max_num_batched_tokens=140, look_ahead=1, max_overtakes=100)
    rig.add(generate("holder", 75, 60))
    rig.step()
    rig.add(generate("head", 136))
    for number in range(8):
        rig.add(generate(f"small{number}", 10, 1))
        plan = rig.step()
        assert table(plan)[1:] == [(f"small{number}", 0, 10, 1)]
        assert rig.kv_cache.num_free_blocks == rig.num_blocks - rig.scheduler.requests["holder"].num_blocks
    assert refusals(rig) == {"blocks": 8}


def test_a_refused_request_changes_no_counter_but_its_reason_and_its_age():
    rig = Rig(num_blocks=20, max_num_batched_tokens=512)
    rig.add(generate("holder", 75, 60))
    rig.step()
    rig.add(head := generate("head", 136))
    memos = {"key_root", "block_keys"}
    fields = {name: bits(getattr(head, name)) for name in Request.__slots__ if name not in memos}
    before = rig.scheduler.metrics()
    rig.step()
    after = rig.scheduler.metrics()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"steps", "computed_tokens", "generated_tokens", "result_rows", "refused_blocks"}
    assert {name: bits(getattr(head, name)) for name in fields} == fields


def test_the_reason_in_the_log_and_the_metrics_is_the_reason(caplog):
    cases = {
        Refusal.TOKENS: {"max_num_batched_tokens": 12},
        Refusal.SLOTS: {"max_num_seqs": 1},
        Refusal.BLOCKS: {"num_blocks": 3},
    }
    for refusal, options in cases.items():
        rig = Rig(**options)
        rig.add(generate("first", 12, 8), generate("second", 12, 8))
        with caplog.at_level(logging.DEBUG, logger="zerokl.rollout.scheduler_meter"):
            caplog.clear()
            rig.step()
        assert refusals(rig) == {refusal.value: 1}
        lines = [vars(record) for record in caplog.records if record.getMessage() == "refused"]
        assert [(line["reason"], line["step"], line["request_id"]) for line in lines] == [(refusal.value, 1, "second")]
    assert set(rig.scheduler.metrics()) >= {f"refused_{refusal.value}" for refusal in Refusal}


def test_a_lone_request_does_not_cost_100_ms():
    """On one rank never; on several only what may still fill the ranks, and not a moment once they are full."""
    alone = Rig(batched_token_timeout=0.1)
    alone.add(generate("a", 10))
    assert ids(alone.plan()) == ["a"]
    full = ep(max_num_seqs=1)
    full.add(generate("a", 10), generate("b", 10))
    assert ids(full.plan()) == ["a", "b"]


def test_an_empty_queue_costs_no_wait_and_no_empty_batch_is_made():
    rig = ep()
    assert rig.plan() is None
    rig.add(generate("a", 10))
    assert rig.plan() == Hold(0.1) == rig.plan(), "a hold makes no plan"
    assert rig.scheduler.metrics()["steps"] == 0
    rig.run()
    assert rig.plan() is None and all(entries(plan) for plan in rig.plans)


def test_a_trickle_does_not_extend_the_window():
    rig = ep()
    for number in range(3):
        rig.add(generate(str(number), 10))
        assert rig.plan() == Hold(0.1)
        rig.now += 0.045
    rig.now = 0.1
    assert set(ids(rig.step())) == {"0", "1", "2"}
    assert max(request.arrival_time for request in rig.scheduler.requests.values()) < 0.1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_token_cap_is_hard(num_ranks):
    rig = Rig(num_ranks=num_ranks, num_blocks=64, block_size=64, max_num_batched_tokens=819)
    rig.add(generate("8000", 800), generate("30000", 3000), generate("3", 3))
    while (plan := rig.step()) is not None:  # the rig checks each rank's cap
        assert max(rank.num_tokens for rank in plan.ranks) <= 819
    assert len(rig.finished) == 3


def test_a_prompt_above_the_token_cap_is_chunked_and_what_never_fits_is_refused_at_submit():
    rig = Rig(num_ranks=2, max_num_batched_tokens=16)
    rig.run([generate("long", 100)])
    assert_as_expected(rig.finished.values(), rig.weights)
    limits = AdmissionLimits(max_model_len=10_000, num_blocks=10, block_size=8, vocab_size=50)
    with pytest.raises(ValueError, match="need 17 KV blocks of 8, over num_blocks"):
        limits.check(generate("never", 133))


def test_ending_the_first_three_of_six_ends_those_three_in_any_order():
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        rig = ep()
        rig.add(*(generate(str(number), 10 + number) for number in range(6)))
        for number in order:
            assert rig.scheduler.abort(str(number)) is not None
        rig.run()
        assert set(rig.finished) == {"3", "4", "5"} and rig.scheduler.num_waiting == 0
        assert_as_expected(rig.finished.values(), rig.weights)


def test_ending_one_that_was_never_tried_skips_nobody():
    rig = Rig(max_num_seqs=1)
    rig.add(*(generate(name, 5, 1) for name in "abcd"))
    rig.step()
    rig.scheduler.abort("d")
    assert ids(rig.step()) == ["b"] and ids(rig.step()) == ["c"] and rig.step() is None


def test_no_request_is_skipped_when_batches_vary_in_size():
    rig = ep(max_num_batched_tokens=17)
    rig.add(*(generate(str(number), 1 + number % 9, 2) for number in range(30)))
    rig.run()
    assert len(rig.finished) == 30
    assert_as_expected(rig.finished.values(), rig.weights)


def test_waiting_and_unfinished_are_two_counts_with_one_meaning_each():
    rig = Rig(max_num_seqs=1)
    rig.add(*(generate(name, 5) for name in "abc"))
    assert (rig.scheduler.num_unfinished, rig.scheduler.num_waiting, rig.scheduler.num_running) == (3, 3, 0)
    rig.step()
    assert (rig.scheduler.num_unfinished, rig.scheduler.num_waiting, rig.scheduler.num_running) == (3, 2, 1)
    metrics = rig.scheduler.metrics()
    assert (metrics["running"], metrics["waiting"]) == (1, 2)


def test_a_result_of_before_everything_was_aborted_reaches_nobody():
    rig = ep()
    rig.add(generate("a", 10), generate("b", 10))
    rig.now = 0.1
    plan = rig.plan()
    orders = rig.orders(plan)
    assert len(rig.scheduler.abort_all()) == 2
    rig.add(again := generate("a", 10))
    assert rig.scheduler.update(plan, rig.execute(orders)) == [] and again.num_output_tokens == 0
    rig.run()
    assert_as_expected([again], rig.weights)


def test_when_a_request_is_computed_changes_none_of_its_bits():
    """A window, more ranks, other budgets: the same tokens and figures."""
    outputs = []
    window = {"num_ranks": 4, "batched_token_timeout": 0.1}
    for options in ({}, {"num_ranks": 2}, window, {"max_num_batched_tokens": 5}):
        rig = Rig(**options)
        rig.run([generate(str(number), 20 + number, 10) for number in range(9)])
        outputs.append({name: (r.output_token_ids.tolist(), r.logprobs.tolist()) for name, r in rig.finished.items()})
    assert all(output == outputs[0] for output in outputs)
