"""Scheduler: stop tokens, stop strings, abort, and what the metrics add up to."""

from __future__ import annotations

import pytest
from scheduling_rig import VOCAB, Rig, assert_as_expected, generate

from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams


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
    rig.scheduler._intake._stop_checker = EveryThird()
    done = rig.run(
        [
            generate("a", 5, params=SamplingParams(max_tokens=9, stop="x")),
            generate("b", 5, params=SamplingParams(max_tokens=9, stop="x", min_tokens=5)),
            generate("c", 5, params=SamplingParams(max_tokens=9)),
        ]
    )
    assert [(done[name].num_output_tokens, done[name].stop_reason) for name in "abc"] == [
        (3, "THIRD"),
        (6, "THIRD"),
        (9, None),
    ]
    assert sorted(calls) == [("a", 1), ("a", 2), ("a", 3), ("b", 5), ("b", 6)]


def test_abort_everywhere():
    rig = Rig(max_num_seqs=1)
    requests = [
        generate("run", 9),
        generate("wait", 9),
        generate("lead", 20, group_id="g"),
        generate("parked", 20, group_id="g"),
    ]
    for request in requests:
        rig.add(request)
    rig.step()
    assert rig.scheduler.abort("unknown") is None
    assert rig.scheduler.abort("wait") is requests[1] and rig.scheduler.abort("wait") is None
    assert rig.scheduler.abort_all() == [requests[0], requests[2], requests[3]]
    assert [request.finish_reason for request in requests] == ["abort"] * 4 and requests[0].num_output_tokens == 1
    assert rig.step() is None and rig.kv_cache.num_free_blocks == 64
    rig.scheduler.check_integrity()


def test_an_id_aborted_in_flight_may_be_used_again():
    rig = Rig()
    rig.add(generate("a", 9, max_tokens=3))
    plan = rig.plan()
    orders = rig.orders(plan)
    rig.scheduler.abort("a")
    rig.add(again := generate("a", 12, max_tokens=3))
    assert rig.scheduler.update(plan, rig.execute(orders)) == [] and again.num_computed_tokens == 0
    with pytest.raises(ValueError, match="request_id must be new, got 'a'"):
        rig.add(generate("a", 9))
    rig.run()
    assert_as_expected([again], rig.weights)


def test_metrics_add_up():
    rig = Rig(max_num_batched_tokens=20)
    rig.run([generate(f"p{i}", 30, group_id="p", sample_index=i) for i in range(3)])
    metrics = rig.scheduler.metrics()
    assert metrics["steps"] == len(rig.plans)
    assert metrics["computed_tokens"] == rig.num_computed and metrics["result_rows"] == 12
    assert metrics["cached_tokens"] == 2 * 24 and metrics["admissions"] == metrics["finished_length"] == 3
    assert metrics["running"] == metrics["waiting"] == 0 and metrics["free_blocks"] == metrics["total_blocks"] == 64
