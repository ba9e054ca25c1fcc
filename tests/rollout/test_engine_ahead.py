"""A whole engine whose steps overlap, on the CPU: whoever comes at any moment gets the bits of an engine without."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import late_device
import numpy as np
import pytest
from late_device import LateDevice
from tiny_engine import in_thread, tiny_options, tiny_tensors

from zerokl.rollout import worker_child
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineFailedError
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.step_plan import StepPlan
from zerokl.rollout.worker import LocalWorker

PARAMS = [
    SamplingParams(max_tokens=24, n=3),
    SamplingParams(max_tokens=17, frequency_penalty=0.5, repetition_penalty=1.2, temperature=0.7),
    SamplingParams(max_tokens=30, stop_token_ids=tuple(range(40)), min_tokens=4, top_p=0.9),
    SamplingParams(max_tokens=9, logit_bias={5: -np.inf, 6: 3.0}, min_p=0.05, n=2),
    SamplingParams(max_tokens=40, stop=("e", "7"), raw_logprobs=True, top_k=20, presence_penalty=0.3),
]
CALLS = [(length, PARAMS[number % 5], 100 + number) for number, length in enumerate([5, 60, 33, 90, 14, 70, 8, 41] * 2)]
SMALL: dict[str, Any] = {"max_num_batched_tokens": 24, "max_num_seqs": 7, "num_blocks": 60}


class LateWorker(LocalWorker):
    """Runs each step when its result is asked for."""

    device: LateDevice

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.device = LateWorker.device = LateDevice(self.execute, late=True)
        self.begin = self.device.begin

    def warm_up(self) -> None:
        """Nothing to make ready."""


@pytest.fixture
def overlapped(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RolloutEngine]:
    def overlapping_ranks(ranks: Any, config: EngineConfig) -> Any:
        return ranks if isinstance(ranks.worker, LateWorker) else None

    monkeypatch.setattr("zerokl.rollout.engine.overlapping_ranks", overlapping_ranks)
    with RolloutEngine(tiny_options(tiny_model, **SMALL), make_worker=LateWorker) as engine:
        yield engine


@pytest.fixture
def plain(tiny_model: Path) -> Iterator[RolloutEngine]:
    with RolloutEngine(tiny_options(tiny_model, **SMALL)) as engine:
        yield engine


def ask(engine: RolloutEngine, number: int) -> list[Rollout]:
    length, params, seed = CALLS[number]
    prompt = np.random.default_rng(number % 5).integers(0, 256, length)
    return engine.generate([prompt], replace(params, seed=seed))


def figures(rollouts: list[Rollout]) -> list[Any]:
    """All that a rollout says of its tokens, to the bit."""
    names = ("token_ids", "logprobs", "policy_logprobs", "entropy", "raw_logprobs")
    return [
        (r.finish_reason, r.stop_reason, r.text, *(np.asarray(getattr(r, name)).tolist() for name in names))
        for r in rollouts
    ]


def test_calls_from_many_threads_have_the_bits_of_an_engine_without(
    overlapped: RolloutEngine, plain: RolloutEngine
) -> None:
    expected = [figures(ask(plain, number)) for number in range(len(CALLS))]
    for _ in range(2):
        waits = [in_thread(lambda number=number: ask(overlapped, number)) for number in range(len(CALLS))]
        assert [figures(wait()) for wait in waits] == expected
    device = LateWorker.device
    assert device.num_ahead > 0.5 * device.num_steps and device.num_open == 0
    (rank,) = overlapped._scheduler.rank_metrics()
    assert rank["free_blocks"] == SMALL["num_blocks"]


def test_aborts_pauses_and_updates_find_no_step_under_way(overlapped: RolloutEngine, plain: RolloutEngine) -> None:
    expected = [figures(ask(plain, number)) for number in range(len(CALLS))]
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            overlapped.pause_generation("keep")
            overlapped.resume_generation()
            overlapped.update_weights(tiny_tensors(), mode="keep")
            overlapped.abort(["nobody"])

    stop = in_thread(disturb)
    waits = [in_thread(lambda number=number: ask(overlapped, number)) for number in range(len(CALLS))]
    got = [figures(wait()) for wait in waits]
    done.set()
    stop()
    assert got == expected


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_that_are_processes_are_begun_a_step_ahead(
    tiny_model: Path, plain: RolloutEngine, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    """Real processes and channels, over workers that run behind their host."""
    boot, main = worker_child._BOOT, "from zerokl.rollout.worker_process"
    assert main in boot
    late = f"sys.path.append({str(Path(late_device.__file__).parent)!r}); import late_worker; late_worker.install(); "
    monkeypatch.setattr(worker_child, "_BOOT", boot.replace(main, late + main))
    monkeypatch.setattr("zerokl.rollout.engine.overlapping_ranks", lambda ranks, config: ranks)
    steps: list[bool] = []

    def noted(scheduler: Scheduler, plan: StepPlan, now: float) -> StepPlan | None:
        ahead = plan_ahead(scheduler, plan, now)
        steps.append(ahead is not None)
        return ahead

    plan_ahead = Scheduler.plan_ahead
    monkeypatch.setattr(Scheduler, "plan_ahead", noted)
    expected = [figures(ask(plain, number)) for number in range(len(CALLS))]
    options = SMALL | {"worker": "process", "data_parallel_size": num_ranks, "batched_token_timeout": 0.005}
    with RolloutEngine(tiny_options(tiny_model, **options)) as engine:
        waits = [in_thread(lambda number=number: ask(engine, number)) for number in range(len(CALLS))]
        assert [figures(wait()) for wait in waits] == expected
        assert sum(steps) > 0.5 * len(steps) > 20
        pids = engine.rank_pids
        call = engine.submit([[1, 2, 3]], SamplingParams(max_tokens=80, ignore_eos=True))
        os.kill(pids[-1], signal.SIGKILL)
        with pytest.raises(EngineFailedError, match="killed by SIGKILL"):
            call.future.result()
