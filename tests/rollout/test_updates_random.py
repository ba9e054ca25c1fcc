"""Several updates at random steps of a busy engine: every span of every rollout is its version's, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import gated_engine, in_thread, tiny_options, tiny_tensors, update_after, wait_until

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams

NUM_UPDATES = 3


def run_case(folder: Path, seed: int, options: dict[str, Any]) -> list[Rollout]:
    """Rollouts of random requests on a small pool, with NUM_UPDATES updates on the way."""
    random = np.random.default_rng(seed)
    changes = {
        "num_blocks": int(random.integers(14, 30)),  # too few for all: some are preempted on their own account
        "max_num_batched_tokens": int(random.integers(6, 40)),
        "enable_prefix_caching": bool(random.integers(2)),
    }
    prompts = [random.integers(0, 255, random.integers(1, 30)).tolist() for _ in range(4)]
    prompts.append(prompts[0] + [1, 2, 3])
    params = [
        SamplingParams(
            n=int(random.integers(1, 4)), max_tokens=int(random.integers(20, 40)), seed=index, ignore_eos=True
        )
        for index in range(len(prompts))
    ]
    engine, worker = gated_engine(folder, **changes)
    with engine:
        call = in_thread(lambda: engine.generate(prompts, params))
        for version in range(1, NUM_UPDATES + 1):
            update = update_after(engine, worker, int(random.integers(1, 12)), tiny_tensors(version), **options)
            worker.began.acquire()
            assert update() == version
            worker.gate.release()
        worker.open()
        rollouts: list[Rollout] = call()
        engine._scheduler.check_integrity()
        assert engine.metrics()["free_blocks"] == changes["num_blocks"]
    return rollouts


def scores_by_version(folder: Path, rollouts: list[Rollout]) -> list[list[Any]]:
    with RolloutEngine(tiny_options(folder)) as engine:
        scores = [engine.score(rollouts)]
        for version in range(1, NUM_UPDATES + 1):
            engine.update_weights(tiny_tensors(version))
            scores.append(engine.score(rollouts))
    return scores


def differing_spans(folder: Path, rollouts: list[Rollout]) -> int:
    scores = scores_by_version(folder, rollouts)
    return sum(
        not np.array_equal(rollout.policy_logprobs[start:end], scores[version][index][start:end])
        for index, rollout in enumerate(rollouts)
        for start, end, version in rollout.version_spans
    )


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 200))])
def test_every_span_is_of_its_version(tiny_model: Path, seed: int) -> None:
    rollouts = run_case(tiny_model, seed, {"mode": "keep"})
    assert max(len(rollout.version_spans) for rollout in rollouts) > 1
    assert differing_spans(tiny_model, rollouts) == 0


@pytest.mark.parametrize("seed", range(2))
def test_kept_keys_and_values_would_be_seen(tiny_model: Path, seed: int) -> None:
    rollouts = run_case(tiny_model, seed, {"mode": "keep", "kv": "keep"})
    assert differing_spans(tiny_model, rollouts) > 0
    for rollout in rollouts:
        assert rollout.num_kept_updates or differing_spans(tiny_model, [rollout]) == 0


@pytest.mark.parametrize("seed", range(2))
def test_no_rollout_is_staler_than_the_bound(tiny_model: Path, seed: int) -> None:
    rollouts = run_case(tiny_model, seed, {"mode": "keep", "max_staleness": 1})
    assert all(rollout.policy_versions[-1] - rollout.policy_versions[0] <= 1 for rollout in rollouts)
    assert any(rollout.num_restarts for rollout in rollouts)
    assert differing_spans(tiny_model, rollouts) == 0


@pytest.mark.parametrize("worker", ["inprocess", "process"])
def test_updates_under_load_tear_nothing(tiny_model: Path, worker: str) -> None:
    """Nothing is gated here: weights are staged while steps run."""
    params = SamplingParams(n=4, max_tokens=120, seed=1, ignore_eos=True)
    with RolloutEngine(tiny_options(tiny_model, worker=worker)) as engine:
        calls = [in_thread(lambda: engine.generate([[1, 2, 3], [4] * 40], params)) for _ in range(2)]
        wait_until(lambda: engine.metrics()["steps"] > 0)
        for version in range(1, NUM_UPDATES + 1):
            engine.update_weights(tiny_tensors(version), mode="keep")
        rollouts = [rollout for call in calls for rollout in call()]
        crossed = any(len(rollout.version_spans) > 1 for rollout in rollouts)
        assert (engine.metrics()["weight_pause_seconds"] > 0) == crossed
    assert differing_spans(tiny_model, rollouts) == 0
