"""Ranks that are lost in the middle of things: the batch that is disturbed, and the ways to disturb it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from ranks_engine import PROMPTS
from tiny_engine import in_thread, wait_until

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.synthetic import random_tensors
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

SPREAD: dict[str, dict[str, Any]] = {
    "1": {"worker": "process"},
    "D2": {"data_parallel_size": 2},
    "E2": {"expert_parallel_size": 2, "expert_rebalance_interval": 5},
    "E2 x D2": {
        "expert_parallel_size": 2,
        "data_parallel_size": 2,
        "num_redundant_experts": 2,
        "expert_rebalance_interval": 3,
        "rank_roles": ["prefill", "decode", "mixed", "decode"],
    },
}
RESTARTS = 1000


def some_slow(quick: Sequence[Any], slow: Sequence[Any]) -> list[Any]:
    """Parameters, some of which `make test-slow` alone tries."""
    values = [one if isinstance(one, tuple) else (one,) for one in slow]
    return [*quick, *(pytest.param(*one, marks=pytest.mark.slow) for one in values)]


def params() -> list[SamplingParams]:
    """One for each of PROMPTS."""
    return [SamplingParams(n=2, max_tokens=14, seed=100 + index, ignore_eos=True) for index in range(len(PROMPTS))]


def sampled(engine: RolloutEngine) -> list[Rollout]:
    """The batch."""
    return engine.generate(PROMPTS, params())


def weights(engine: RolloutEngine, seed: int) -> dict[str, Any]:
    """A set by Hugging Face name."""
    return random_tensors(engine.model_config, seed, gain=2.0)


def short(engine: RolloutEngine) -> list[Rollout]:
    """A smaller batch."""
    return engine.generate(PROMPTS[:3], [SamplingParams(max_tokens=6, seed=seed, ignore_eos=True) for seed in range(3)])


def lose(engine: RolloutEngine, *ranks: int) -> None:
    """The ranks die while nothing runs, and are replaced."""
    before = engine.metrics()["rank_restarts"]
    for rank in ranks:
        os.kill(engine.rank_pids[rank], signal.SIGKILL)
    wait_until(lambda: engine.metrics()["rank_restarts"] >= before + len(ranks))


def disturbed(engine: RolloutEngine, hits: list[tuple[int, int, signal.Signals]]) -> list[Rollout]:
    """The batch, with a signal to a rank as soon as so many steps have ended since the last one."""
    engine.reset_prefix_cache()
    steps = threading.Semaphore(0)
    end = engine.watch_steps(steps.release)
    try:
        call = in_thread(lambda: sampled(engine))
        for num_steps, rank, kind in hits:
            for _ in range(num_steps):
                assert steps.acquire(timeout=30)
            os.kill(engine.rank_pids[rank], kind)
        return call()
    finally:
        end()
