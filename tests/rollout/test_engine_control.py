"""Aborts, failures, interrupts and closing: nothing hangs, nothing leaks, and the engine says what became of it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_engine import (
    FailingWorker,
    ctrl_c_after,
    gated_engine,
    in_thread,
    step_into_drain,
    tiny_options,
    tiny_tensors,
    wait_until,
)

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import AbortedError, EngineClosedError, EngineFailedError, WorkerError
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.worker import LocalWorker

LONG = SamplingParams(max_tokens=60, ignore_eos=True, seed=1)


def loop_threads() -> int:
    return sum(thread.name == "zerokl-engine-loop" for thread in threading.enumerate())


def test_abort_returns_the_tokens_so_far_and_spares_the_others(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    with engine:
        params = [LONG, SamplingParams(max_tokens=60, ignore_eos=True, seed=1, n=2)]
        call = in_thread(lambda: engine.generate(["a", "b"], params, request_ids=["keep", "drop"]))
        for _ in range(4):  # submitted, and three steps done
            worker.began.acquire()
            worker.gate.release()
        aborted = in_thread(lambda: engine.abort(["drop", "unknown"]))
        worker.open()
        num_aborted = aborted()
        kept, *dropped = call()
        assert num_aborted == 2
        assert kept.finish_reason == "length" and len(kept.token_ids) == 60
        for rollout in dropped:
            assert rollout.finish_reason == "abort" and rollout.stop_reason is None
            assert 1 <= len(rollout.token_ids) < 60
            assert len(rollout.logprobs) == len(rollout.policy_versions) == len(rollout.token_ids)
            np.testing.assert_array_equal(engine.score(rollout)[0], rollout.policy_logprobs)
        assert engine.abort("keep") == 0
        assert engine.abort_all() == 0


def test_a_score_that_is_aborted_raises_whether_it_has_begun_or_not(tiny_model: Path) -> None:
    """A shorter array would be taken for a whole one."""
    engine, worker = gated_engine(tiny_model, max_num_batched_tokens=8)
    tokens = [[1], [1, 2], list(range(40))]
    with engine:
        score = in_thread(lambda: engine.score(tokens))
        for _ in range(3):  # the second sequence and a part of the third are rated
            worker.began.acquire()
            worker.gate.release()
        worker.began.acquire()
        late = in_thread(lambda: asyncio.run(engine.ascore(tokens)))
        wait_until(lambda: engine.health()["num_held"] == 1)
        aborted = in_thread(engine.abort_all)
        wait_until(lambda: engine._loop._inbox.num_urgent > 0)
        worker.open()
        assert aborted() == 3
        with pytest.raises(AbortedError, match=r"token_ids\[2\] was aborted"):
            score()
        with pytest.raises(AbortedError, match=r"token_ids\[1\] was aborted"):
            late()
        assert [len(one) for one in engine.score(tokens)] == [0, 1, 39]


def test_request_ids_are_checked(engine: RolloutEngine) -> None:
    for ids in (["a", "a"], ["a"], "ab", ["", "b"], [1, 2], 5, {"x", "y"}):
        with pytest.raises(ValueError, match="request_ids"):
            engine.generate(["x", "y"], request_ids=ids)


def test_an_id_in_flight_is_taken(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    with engine:
        call = in_thread(lambda: engine.generate("a", LONG, request_ids=["one"]))
        worker.began.acquire()
        with pytest.raises(ValueError, match="'one'"):
            engine.generate("a", LONG, request_ids=["one"])
        worker.open()
        first = call()
        again = engine.generate("a", LONG, request_ids=["one"])
        np.testing.assert_array_equal(first[0].token_ids, again[0].token_ids)


def test_a_cancelled_task_aborts_its_requests(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)

    async def cancel_one_of_two() -> int:
        tasks = [asyncio.create_task(engine.agenerate("a", LONG)) for _ in range(2)]
        await asyncio.to_thread(worker.began.acquire)
        tasks[0].cancel()
        worker.open()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        return len((await tasks[1])[0].token_ids)

    with engine:
        assert asyncio.run(cancel_one_of_two()) == 60
        assert engine.metrics()["finished_abort"] == 1


def test_ctrl_c_aborts_the_call_and_leaves_the_engine_usable(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    with engine:
        with ctrl_c_after(worker.began.acquire), pytest.raises(KeyboardInterrupt):
            engine.generate("a", LONG)
        worker.open()
        assert len(engine.generate("a", LONG)[0].token_ids) == 60
        assert engine.metrics()["finished_abort"] == 1


def test_ctrl_c_gives_up_an_update_that_waits(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    with engine:
        call = in_thread(lambda: engine.generate("a", LONG))
        worker.began.acquire()
        with ctrl_c_after(lambda: step_into_drain(engine, worker)), pytest.raises(KeyboardInterrupt):
            engine.update_weights(tiny_tensors(1))
        worker.open()
        assert call()[0].policy_versions.tolist() == [0] * 60
        assert engine.get_weight_version() == 0
        assert engine.update_weights(tiny_tensors(2)) == 1


def test_ctrl_c_within_a_commit_waits_for_its_end(tiny_model: Path) -> None:
    """Nobody may stage the next weights before."""
    began, gate, left = threading.Event(), threading.Event(), threading.Event()

    class Committing(LocalWorker):
        def commit_weights(self) -> None:
            if self.describe()["versions"]:
                began.set()
                gate.wait()
            super().commit_weights()

    with RolloutEngine(tiny_options(tiny_model), make_worker=Committing) as engine:
        with ctrl_c_after(began.wait) as raised:

            def let_go() -> None:
                raised.wait()
                left.wait(0.2)
                gate.set()

            join = in_thread(let_go)
            with pytest.raises(KeyboardInterrupt):
                engine.update_weights(tiny_tensors(1))
            left.set()
            assert engine.get_weight_version() == 1
        join()
        assert engine.update_weights(tiny_tensors(2)) == 2


@pytest.mark.parametrize("error", [RuntimeError("boom"), WorkerError("the process died"), ValueError("bad step")])
def test_a_failed_step_fails_every_call_and_says_why(tiny_model: Path, error: Exception) -> None:
    engine = RolloutEngine(tiny_options(tiny_model), make_worker=lambda config: FailingWorker(config, error, fail_at=3))
    with engine:
        with pytest.raises(EngineFailedError, match=str(error)) as caught:
            engine.generate(["a", "b"], LONG)
        assert caught.value.__cause__ is error
        assert (engine.health()["state"], engine.health()["cause"]) == ("failed", repr(error))
        for call in (lambda: engine.generate("a"), lambda: engine.score([[1, 2]]), lambda: engine.abort_all()):
            with pytest.raises(EngineFailedError, match=str(error)):
                call()
        assert engine.metrics()["steps"] == 3
    assert loop_threads() == 0


def test_weights_that_are_not_numbers_fail_the_step(engine: RolloutEngine) -> None:
    tensors = tiny_tensors(1)
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)
    engine.update_weights(tensors)
    with pytest.raises(EngineFailedError, match="not finite") as caught:
        engine.generate("a", LONG)
    assert isinstance(caught.value.__cause__, FloatingPointError)


def test_closing_ends_calls_in_flight_and_is_idempotent(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    call = in_thread(lambda: engine.generate("a", LONG))
    worker.began.acquire()
    closing = in_thread(engine.close)
    worker.open()
    closing()
    with pytest.raises(EngineClosedError):
        call()
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.generate("a")
    assert engine.health()["state"] == "closed"
    assert loop_threads() == 0


def test_an_engine_collected_in_another_thread_does_not_hold_that_thread_up(tiny_model: Path) -> None:
    """Which may be one that the loop itself waits for."""
    engine, worker = gated_engine(tiny_model)
    call = in_thread(lambda: engine.generate([[1, 2]], SamplingParams(max_tokens=3)))
    worker.began.acquire()
    in_thread(engine._finalizer)()  # returns while a step is at the gate
    assert engine._loop._thread.is_alive()
    worker.open()
    with pytest.raises(EngineClosedError):
        call()
    engine._loop._thread.join(30)
    assert not engine._loop._thread.is_alive()


def test_a_forgotten_engine_closes_itself(tiny_model: Path) -> None:
    engine = RolloutEngine(tiny_options(tiny_model))
    engine.generate("a", LONG)
    assert loop_threads() == 1
    del engine
    gc.collect()
    assert loop_threads() == 0


def test_a_process_that_never_closes_its_engine_ends(tiny_model: Path) -> None:
    program = (
        "import sys; from zerokl.rollout import EngineConfig, RolloutEngine, SamplingParams\n"
        "engine = RolloutEngine(EngineConfig(model=sys.argv[1], num_blocks=64, num_threads=1))\n"
        "print(len(engine.generate('a', SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tiny_model)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "3\n", "")


def test_a_killed_worker_process_fails_the_calls_in_flight(tiny_model: Path) -> None:
    with RolloutEngine(tiny_options(tiny_model, worker="process", max_model_len=256)) as engine:
        call = in_thread(lambda: engine.generate(["a"] * 8, SamplingParams(max_tokens=250, ignore_eos=True)))
        wait_until(lambda: engine.metrics()["steps"] > 3)
        os.kill(engine.health()["worker"]["pid"], signal.SIGKILL)
        with pytest.raises(EngineFailedError) as caught:
            call()
        assert isinstance(caught.value.__cause__, WorkerError)
    assert engine.health()["state"] == "failed"
