"""Pauses of generation: what becomes of the requests in flight, what waits, and that no bit changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import GatedWorker, gated_engine, in_thread, tiny_options, tiny_tensors, wait_until

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import AbortedError, EngineAsleepError, EngineClosedError, PauseLiftedError
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

LONG = SamplingParams(max_tokens=40, ignore_eos=True, seed=1, n=2)


@pytest.fixture
def gated(tiny_model: Path) -> Iterator[tuple[RolloutEngine, GatedWorker]]:
    engine, worker = gated_engine(tiny_model)
    with engine:
        yield engine, worker
        worker.open()


def steps(worker: GatedWorker, count: int) -> None:
    """Let `count` steps pass; the next one then waits at the gate."""
    for _ in range(count):
        worker.began.acquire()
        worker.gate.release()
    worker.began.acquire()


def paused(engine: RolloutEngine, worker: GatedWorker, mode: str) -> None:
    """Pause while a step waits at the gate, and let that step pass."""
    pause = in_thread(lambda: engine.pause_generation(mode))
    wait_until(lambda: engine._loop._inbox.num_urgent > 0)
    worker.gate.release()
    pause()


def same(first: Rollout, second: Rollout) -> None:
    for name in ("token_ids", "logprobs", "policy_logprobs", "entropy", "policy_versions"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    assert (first.text, first.finish_reason, first.seed) == (second.text, second.finish_reason, second.seed)


def test_keep_stops_after_the_step_and_goes_on_with_the_same_bits(tiny_model: Path) -> None:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        undisturbed = engine.generate("abc", LONG)
    engine, worker = gated_engine(tiny_model)
    with engine:
        call = in_thread(lambda: engine.generate("abc", LONG))
        steps(worker, 5)
        paused(engine, worker, "keep")
        assert engine.health()["state"] == "paused" and engine.health()["num_running"] == 2
        later = in_thread(lambda: engine.generate("x", LONG))
        wait_until(lambda: engine.health()["num_held"] == 1)
        assert engine.metrics()["steps"] == 6
        with pytest.raises(ValueError, match="paused with mode='keep'"):
            engine.update_weights(tiny_tensors(1))
        with pytest.raises(ValueError, match="paused with mode='keep'"):
            engine.pin_weights()
        engine.reset_prefix_cache()
        assert engine.get_weight_version() == 0
        worker.open()
        engine.resume_generation()
        for one, other in zip(call(), undisturbed, strict=True):
            same(one, other)
        assert len(later()[0].token_ids) == 40
        assert engine.health()["state"] == "running"
        assert engine.metrics()["generation_pause_seconds"] > 0.0


def test_weights_change_under_requests_that_stand_still(gated: tuple[RolloutEngine, GatedWorker]) -> None:
    engine, worker = gated
    call = in_thread(lambda: engine.generate("abc", LONG))
    steps(worker, 5)
    paused(engine, worker, "keep")
    assert engine.update_weights(tiny_tensors(1), mode="keep") == 1
    worker.open()
    engine.resume_generation()
    for rollout in call():
        assert rollout.version_spans == [(0, 6, 0), (6, 40, 1)]  # the sixth was at the gate


def test_wait_lets_requests_finish_and_holds_later_ones(gated: tuple[RolloutEngine, GatedWorker]) -> None:
    engine, worker = gated
    call = in_thread(lambda: engine.generate("abc", LONG))
    steps(worker, 2)
    pause = in_thread(engine.pause_generation)
    wait_until(lambda: engine._loop._inbox.num_urgent > 0)
    worker.gate.release()
    worker.began.acquire()
    assert engine.health()["state"] == "draining"
    later = in_thread(lambda: engine.generate("x", LONG))
    worker.open()
    pause()
    assert [len(rollout.token_ids) for rollout in call()] == [40, 40]
    wait_until(lambda: engine.health()["num_held"] == 1)
    assert engine.health()["state"] == "paused"
    assert engine.update_weights(tiny_tensors(1)) == 1, "nothing is in flight: it need not wait"
    engine.pause_generation("keep")
    engine.resume_generation()
    assert later()[0].policy_versions.tolist() == [1] * 40


def test_abort_ends_requests_in_flight_and_held_ones_but_not_scores(gated: tuple[RolloutEngine, GatedWorker]) -> None:
    engine, worker = gated
    call = in_thread(lambda: engine.generate("abc", LONG))
    worker.began.acquire()
    score = in_thread(lambda: engine.score([[1, 2, 3]]))
    wait_until(lambda: engine.health()["num_held"] == 1)
    pause = in_thread(lambda: engine.pause_generation("abort"))
    wait_until(lambda: engine._loop._inbox.num_urgent > 0)
    worker.open()
    pause()
    assert [rollout.finish_reason for rollout in call()] == ["abort", "abort"]
    wait_until(lambda: engine.health()["num_held"] == 1)  # it came after the pause did
    engine.resume_generation()
    assert len(score()[0]) == 2


def test_who_waits_for_a_pause_hears_of_its_end(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    with engine:
        call = in_thread(lambda: engine.generate("abc", LONG))
        worker.began.acquire()
        pauses = [in_thread(engine.pause_generation) for _ in range(2)]
        wait_until(lambda: engine._loop._inbox.num_urgent == 2)
        worker.gate.release()
        worker.began.acquire()
        resumed = in_thread(engine.resume_generation)
        wait_until(lambda: engine._loop._inbox.num_urgent > 0)
        worker.open()
        resumed()
        for pause in pauses:
            with pytest.raises(PauseLiftedError):
                pause()
        assert len(call()) == 2
        engine.pause_generation()
        held = in_thread(lambda: engine.generate("abc", LONG))
        wait_until(lambda: engine.health()["num_held"] == 1)
    with pytest.raises(EngineClosedError):
        held()


def test_calls_that_a_pause_holds_can_be_aborted(engine: RolloutEngine) -> None:
    engine.pause_generation("keep")
    held = in_thread(lambda: engine.generate("abc", LONG, request_ids=["held"]))
    wait_until(lambda: engine.health()["num_held"] == 1)
    assert engine.abort("held") == 2
    assert [(len(rollout.token_ids), rollout.finish_reason) for rollout in held()] == [(0, "abort")] * 2
    engine.resume_generation()
    engine.resume_generation()
    with pytest.raises(ValueError, match="mode must be one of"):
        engine.pause_generation("now")


@pytest.fixture(scope="module")
def controlled(tiny_model: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(tiny_options(tiny_model, num_blocks=16, max_num_seqs=3)) as engine:
        yield engine


COMMANDS: dict[str, Callable[[RolloutEngine], Any]] = {
    "generate": lambda engine: engine.generate(["ab", "c"], LONG),
    "score": lambda engine: engine.score([[1, 2, 3, 4]]),
    "wait": lambda engine: engine.pause_generation("wait"),
    "keep": lambda engine: engine.pause_generation("keep"),
    "abort": lambda engine: engine.pause_generation("abort"),
    "resume": lambda engine: engine.resume_generation(),
    "abort_all": lambda engine: engine.abort_all(),
    "update": lambda engine: engine.update_weights(tiny_tensors(1)),
    "update keep": lambda engine: engine.update_weights(tiny_tensors(1), mode="keep"),
    "update abort": lambda engine: engine.update_weights(tiny_tensors(1), mode="abort"),
    "sleep": lambda engine: engine.sleep("kv_cache"),
    "wake": lambda engine: engine.wake_up(),
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*COMMANDS, "generate", "generate", "resume"]), max_size=14))
def test_every_call_ends_once_whatever_is_commanded(controlled: RolloutEngine, names: list[str]) -> None:
    """Commands at once, each in a thread: none hangs, and once all is resumed and awake the engine is as new."""
    pending = [(name, in_thread(lambda name=name: COMMANDS[name](controlled))) for name in names]
    lifting = threading.Event()

    def lift() -> None:
        while not lifting.wait(0.005):
            controlled.resume_generation()
            controlled.wake_up()

    lifter = in_thread(lift)
    for name, join in pending:
        try:
            result = join()
        except (PauseLiftedError, EngineAsleepError) as error:
            assert name not in ("resume", "wake"), error
            continue
        except ValueError as error:
            assert "paused with mode='keep'" in str(error) or "version must be" in str(error), error
            continue
        except AbortedError as error:
            assert name == "score", error
            continue
        if name == "generate":
            assert {rollout.finish_reason for rollout in result} <= {"abort", "length"} and len(result) == 4
            for rollout in result:
                assert len(rollout.token_ids) == len(rollout.policy_versions) == len(rollout.logprobs)
    lifting.set()
    lifter()
    controlled.resume_generation()
    assert controlled.wake_up() == []
    assert controlled.health()["state"] == "running" and controlled.health()["num_held"] == 0
    assert [len(rollout.token_ids) for rollout in controlled.generate("x", LONG)] == [40, 40]
    metrics = controlled.metrics()
    assert metrics["running"] == metrics["waiting"] == 0
