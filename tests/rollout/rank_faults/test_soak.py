"""Ranks are lost at any moments of anything: every call ends, and every span of tokens is its version's, to the bit."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leftovers import children_of, segments_of
from ranks_engine import on_ranks, write_moe_model

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.synthetic import random_tensors
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync import WeightPublisher

LAYOUTS: list[dict[str, Any]] = [
    {"expert_parallel_size": 2, "expert_rebalance_interval": 4},
    {"expert_parallel_size": 2, "data_parallel_size": 2, "rank_roles": ["prefill", "decode", "mixed", "decode"]},
    {"data_parallel_size": 3, "rank_roles": ["prefill", "decode", "decode"]},
    {"worker": "process"},
]
NUM_STRIKES = 6


def tensors(engine: RolloutEngine, version: int) -> dict[str, Any]:
    return random_tensors(engine.model_config, version % 3, gain=2.0)


class Changes:
    """Updates of every kind and mode, and all else that may be asked of an engine meanwhile; broken ones too."""

    def __init__(self, engine: RolloutEngine, random: np.random.Generator) -> None:
        self._engine, self._random = engine, random
        self._publisher = WeightPublisher()

    def one(self) -> None:
        engine, random = self._engine, self._random
        kind = int(random.integers(7))
        if kind < 3:
            version = engine.get_weight_version() + 1
            source: Any = tensors(engine, version)
            if kind == 1:
                source = self._publisher.publish(source, version)
            mode: Any = str(random.choice(["wait", "keep", "in_place", "abort"]))
            assert engine.update_weights(source, mode=mode) == version
        elif kind == 3:
            with pytest.raises(ValueError, match="norm"):
                engine.update_weights({**tensors(engine, 0), "model.norm.weight": np.ones(3, np.float32)})
        elif kind == 4:
            engine.rebalance_experts()
            engine.reset_prefix_cache()
        elif kind == 5:
            engine.pause_generation("keep")
            engine.resume_generation()
        else:
            engine.pin_weights()
            engine.describe_ranks()

    def close(self) -> None:
        self._publisher.close()


def sampled(engine: RolloutEngine, random: np.random.Generator) -> list[Rollout]:
    prompts = [random.integers(0, 90, random.integers(1, 30)).tolist() for _ in range(5)]
    params = [SamplingParams(n=2, max_tokens=20, seed=int(random.integers(1 << 30)), ignore_eos=True) for _ in prompts]
    return engine.generate(prompts, params)


def strike(engine: RolloutEngine, random: np.random.Generator) -> None:
    pause = threading.Event()
    for _ in range(NUM_STRIKES):
        pause.wait(float(random.exponential(0.15)))
        pid = engine.rank_pids[int(random.integers(engine.config.num_ranks))]
        with suppress(ProcessLookupError):  # it has just been struck
            os.kill(pid, signal.SIGSTOP if random.random() < 0.15 else signal.SIGKILL)


def differing_spans(folder: Path, rollouts: list[Rollout]) -> int:
    """Spans whose logprobs are not those of an engine that never saw a fault."""
    exact = [rollout for rollout in rollouts if not rollout.num_kept_updates and len(rollout.token_ids)]
    assert exact
    with on_ranks(folder) as engine:
        scores = []
        for seed in range(3):
            engine.update_weights(tensors(engine, seed))
            scores.append(engine.score(exact))
    return sum(
        scores[version % 3][index][start:end].tobytes() != rollout.policy_logprobs[start:end].tobytes()
        for index, rollout in enumerate(exact)
        for start, end, version in rollout.version_spans
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 24))])
def test_whatever_is_under_way_when_ranks_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    folder = write_moe_model(tmp_path / "model")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    children, segments = children_of(os.getpid()), segments_of(os.getpid())
    randoms = [np.random.default_rng([seed, number]) for number in range(3)]
    rollouts: list[Rollout] = []
    with on_ranks(folder, max_rank_restarts=1000, **LAYOUTS[seed % len(LAYOUTS)]) as engine:
        engine.update_weights(tensors(engine, 0), version=0, allow_rewind=True)
        changes = Changes(engine, randoms[1])
        with ThreadPoolExecutor(3) as pool:
            striking = pool.submit(strike, engine, randoms[2])

            def until_struck(work: Callable[[], Any]) -> None:
                while not striking.done():
                    work()

            works = [lambda: rollouts.extend(sampled(engine, randoms[0])), changes.one]
            done = [pool.submit(until_struck, work) for work in works]
        for future in [striking, *done]:
            future.result()
        rollouts += sampled(engine, randoms[0])
        engine._scheduler.check_integrity()
        assert engine.metrics()["running"] == engine.metrics()["waiting"] == 0
        assert engine.metrics()["rank_restarts"] > 0
        changes.close()
    assert differing_spans(folder, rollouts) == 0
    assert children_of(os.getpid()) == children and segments_of(os.getpid()) == segments
    assert list((tmp_path / "temporary").iterdir()) == []
