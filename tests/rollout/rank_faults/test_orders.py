"""Ranks that die in an order, an update above all: it is carried out on all of them, or refused for its own reasons."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exactness_harness import NONE_DIFFER, differences
from rank_faults_rig import RESTARTS, sampled, short, some_slow, weights
from ranks_engine import gated, on_ranks
from tiny_engine import in_thread, wait_until

from zerokl.rollout import worker_child
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout

_DIES_ONCE = """
import os, signal, sys
import zerokl.rollout.worker as worker
whole = worker.LocalWorker.{method}
def dying(self, *given):
    if sys.argv[2] == "{rank}" and os.path.exists({flag!r}):
        os.unlink({flag!r})
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *given)
worker.LocalWorker.{method} = dying
"""


@pytest.fixture
def dying_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, int], Callable[[], None]]:
    """Have a rank of engines that are made afterwards die in a method of its worker: once, after what is returned."""

    def prepare(method: str, rank: int) -> Callable[[], None]:
        flag = tmp_path / "armed"
        script = _DIES_ONCE.format(method=method, rank=rank, flag=str(flag))
        monkeypatch.setattr(worker_child, "_BOOT", worker_child._BOOT.replace("main()", "") + script + "\nmain()")
        return flag.touch

    return prepare


@pytest.mark.parametrize(
    ("method", "mode"),
    some_slow(
        [("stage_weights", "keep"), ("commit_weights", "wait"), ("stage_weights", "abort")],
        [
            ("stage_weights", "wait"),
            ("stage_weights", "in_place"),
            *(("commit_weights", mode) for mode in ("keep", "in_place", "abort")),
        ],
    ),
)
def test_an_update_in_which_a_rank_dies_comes_about_all_the_same(
    moe_model: Path, dying_in: Callable[[str, int], Callable[[], None]], mode: Any, method: str
) -> None:
    """On all ranks; and every span of tokens is its version's, to the bit."""
    arm = dying_in(method, 1)
    with on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        steps = threading.Semaphore(0)
        end = engine.watch_steps(steps.release)
        call = in_thread(lambda: sampled(engine))
        assert steps.acquire(timeout=30)
        end()
        arm()
        assert engine.update_weights(weights(engine, 1), mode=mode) == 1
        rollouts = call()
        assert engine.metrics()["rank_deaths"] == 1
        assert [rank["versions"] for rank in engine.describe_ranks()] == [{"policy": 1}] * 2
        scores = {1: engine.score(rollouts)}
        engine.update_weights(str(moe_model), version=0, allow_rewind=True)
        scores[0] = engine.score(rollouts)
        for index, rollout in enumerate(rollouts):
            for start, stop, version in rollout.version_spans if not rollout.num_kept_updates else []:
                np.testing.assert_array_equal(scores[version][index][start:stop], rollout.policy_logprobs[start:stop])


def test_an_update_that_is_refused_after_a_rank_died_leaves_the_old_version(
    moe_model: Path, dying_in: Callable[[str, int], Callable[[], None]]
) -> None:
    arm = dying_in("stage_weights", 0)
    with on_ranks(moe_model, data_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        expected = short(engine)
        arm()
        wrong = weights(engine, 1)
        del wrong["model.norm.weight"]
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            engine.update_weights(wrong)
        wait_until(lambda: engine.metrics()["rank_restarts"] == 1)
        engine.reset_prefix_cache()
        assert differences(expected, short(engine)) == NONE_DIFFER
        assert engine.update_weights(weights(engine, 1)) == 1


def test_a_rank_lost_between_staging_and_commit_has_the_staged_weights_too(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout]
) -> None:
    engine = engine_of("D2")
    with gated(engine) as ranks:
        call = in_thread(lambda: sampled(engine))
        ranks.began.acquire()
        update = in_thread(lambda: engine.update_weights(weights(engine, 1)))
        wait_until(lambda: engine.health()["num_held"] == 1)  # staged; it waits for the requests
        os.kill(engine.rank_pids[1], signal.SIGKILL)
        ranks.open()
        assert differences(expected, call()) == NONE_DIFFER
        assert update() == 1
    assert [rank["versions"] for rank in engine.describe_ranks()] == [{"policy": 1}] * 2
    engine.update_weights(engine.config.model, version=0, allow_rewind=True)
    assert differences(expected, sampled(engine)) == NONE_DIFFER


@pytest.mark.parametrize("method", some_slow(["rearrange_experts", "sleep"], ["pin_weights", "wake_up"]))
def test_an_order_in_which_a_rank_dies_is_carried_out_on_all(
    moe_model: Path, tmp_path: Path, dying_in: Callable[[str, int], Callable[[], None]], method: str
) -> None:
    arm = dying_in(method, 1)
    with on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        expected = short(engine)
        arm()
        engine.rebalance_experts()
        engine.pin_weights()
        engine.sleep(spill_dir=tmp_path)
        engine.wake_up()
        assert engine.metrics()["rank_deaths"] == 1 and engine.metrics()["rank_restarts"] == 2
        assert differences(expected, short(engine)) == NONE_DIFFER
        scores = engine.score(expected, policy="reference")
        assert all(np.array_equal(a, b.policy_logprobs) for a, b in zip(scores, expected, strict=True))
