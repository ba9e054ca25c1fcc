"""Ranks that die, stop or hang are started anew, and what comes back has the bits of a run that nothing disturbed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exactness_harness import NONE_DIFFER, differences
from leftovers import wait_for_end
from ranks_engine import on_ranks, write_moe_model
from tiny_engine import in_thread

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

PROMPTS = [list(range(1 + index, 4 + index + 9 * (index % 4))) for index in range(9)]
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


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moe_model(tmp_path_factory.mktemp("moe_model"))


@pytest.fixture(scope="module")
def engine_of(moe_model: Path) -> Iterator[Callable[[str], RolloutEngine]]:
    """One engine for each way to spread the model, for tests that leave it as they found it, whatever its pids."""
    engines: dict[str, RolloutEngine] = {}

    def get(spread: str) -> RolloutEngine:
        if spread not in engines:
            engines[spread] = on_ranks(moe_model, return_routing="all", max_rank_restarts=RESTARTS, **SPREAD[spread])
        return engines[spread]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def expected(moe_model: Path) -> list[Rollout]:
    """What an engine of one rank in this process gives, which nothing disturbs."""
    with on_ranks(moe_model, return_routing="all") as engine:
        return sampled(engine)


def params() -> list[SamplingParams]:
    return [SamplingParams(n=2, max_tokens=14, seed=100 + index, ignore_eos=True) for index in range(len(PROMPTS))]


def sampled(engine: RolloutEngine) -> list[Rollout]:
    return engine.generate(PROMPTS, params())


def faults(engine: RolloutEngine) -> int:
    metrics = engine.metrics()
    return int(metrics["rank_deaths"] + metrics["rank_stalls"] + metrics["rank_step_timeouts"])


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


# -- the same bits -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spread", SPREAD)
def test_a_batch_is_the_same_whichever_ranks_die_in_it(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout], spread: str
) -> None:
    engine = engine_of(spread)
    before, num_ranks = faults(engine), engine.config.num_ranks
    old = engine.rank_pids
    hits = [(3, num_ranks - 1, signal.SIGKILL), (6, 0, signal.SIGKILL)]
    assert differences(expected, disturbed(engine, hits)) == NONE_DIFFER
    assert faults(engine) == before + 2 and engine.metrics()["rank_restarts"] >= 2
    assert engine.rank_pids[0] != old[0] and engine.rank_pids[-1] != old[-1]
    assert [rank["pid"] for rank in engine.health()["ranks"]] == engine.rank_pids
    assert [rank["pid"] for rank in engine.describe_ranks()] == engine.rank_pids


@pytest.mark.parametrize("spread", ["D2", pytest.param("E2 x D2", marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_is_as_good_as_dead(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout], spread: str
) -> None:
    engine = engine_of(spread)
    stalls, pid = engine.metrics()["rank_stalls"], engine.rank_pids[1]
    assert differences(expected, disturbed(engine, [(5, 1, signal.SIGSTOP)])) == NONE_DIFFER
    assert engine.metrics()["rank_stalls"] == stalls + 1 and wait_for_end(pid)


@pytest.mark.parametrize(
    ("spread", "seed"),
    [("E2", 0), ("D2", 1), *(pytest.param(s, n, marks=pytest.mark.slow) for s in SPREAD for n in range(10, 25))],
)
def test_a_batch_is_the_same_under_faults_at_any_moments(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout], spread: str, seed: int
) -> None:
    """Not at the ends of steps: a little later each, so in the middle of one, or of the last restart."""
    engine, random = engine_of(spread), np.random.default_rng(seed)
    pause, before = threading.Event(), faults(engine)

    def strike() -> None:
        for kind in (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP if random.integers(2) else signal.SIGKILL):
            pause.wait(float(random.exponential(0.1)))
            pid = engine.rank_pids[int(random.integers(engine.config.num_ranks))]
            with suppress(ProcessLookupError):  # it has just been struck
                os.kill(pid, kind)

    with ThreadPoolExecutor(1) as pool:
        striking = pool.submit(strike)
        while not striking.done():
            engine.reset_prefix_cache()
            assert differences(expected, sampled(engine)) == NONE_DIFFER
    striking.result()
    assert differences(expected, sampled(engine)) == NONE_DIFFER
    assert faults(engine) > before


def test_requests_that_keep_what_was_lost_are_seen(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with its computed tokens counted as before, a request reads an empty KV pool."""
    engine = engine_of("D2")
    with monkeypatch.context() as patched:
        patched.setattr(engine._ranks, "_tell_lost", lambda ranks: None)
        rollouts = disturbed(engine, [(6, 1, signal.SIGKILL)])
    assert differences(expected, rollouts) != NONE_DIFFER
    engine.reset_prefix_cache()
    assert differences(expected, sampled(engine)) == NONE_DIFFER
