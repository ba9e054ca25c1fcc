"""Ranks that die, stop or hang are started anew, and what comes back has the bits of a run that nothing disturbed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from exactness_harness import NONE_DIFFER, differences
from leftovers import wait_for_end
from rank_faults_rig import SPREAD, disturbed, sampled, some_slow

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout


def faults(engine: RolloutEngine) -> int:
    metrics = engine.metrics()
    return int(metrics["rank_deaths"] + metrics["rank_stalls"] + metrics["rank_step_timeouts"])


@pytest.mark.parametrize("spread", some_slow(["1", "E2 x D2"], ["D2", "E2"]))
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


@pytest.mark.parametrize("spread", some_slow(["D2"], ["E2 x D2"]))
def test_a_rank_that_is_stopped_is_as_good_as_dead(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout], spread: str
) -> None:
    engine = engine_of(spread)
    stalls, pid = engine.metrics()["rank_stalls"], engine.rank_pids[1]
    assert differences(expected, disturbed(engine, [(5, 1, signal.SIGSTOP)])) == NONE_DIFFER
    assert engine.metrics()["rank_stalls"] == stalls + 1 and wait_for_end(pid)


@pytest.mark.parametrize(
    ("spread", "seed"),
    some_slow([("E2", 0), ("D2", 1)], [(spread, seed) for spread in SPREAD for seed in range(10, 25)]),
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
