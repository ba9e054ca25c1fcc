"""A rank that is started anew holds what all hold: weights, pins, sleep, and what the order in hand brings."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exactness_harness import NONE_DIFFER, differences
from leftovers import children_of, segments_of
from rank_faults_rig import RESTARTS, lose, sampled, short, weights
from ranks_engine import on_ranks
from tiny_engine import in_thread

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineAsleepError
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import tiny_moe_config
from zerokl.rollout.outputs import Rollout
from zerokl.weight_sync import WeightPublisher, publish_file


def holds(engine: RolloutEngine) -> tuple[Any, ...]:
    """What the live and the pinned weights give; with KV computed anew, so by whoever has the weights now."""
    engine.reset_prefix_cache()
    rollouts = short(engine)
    scores = engine.score(rollouts, policy="reference")
    bits = [(rollout.token_ids.tobytes(), rollout.logprobs.tobytes()) for rollout in rollouts]
    return bits, [score.tobytes() for score in scores], engine.health()["weight_versions"]


def test_a_new_rank_holds_what_every_kind_of_update_has_left(moe_model: Path, tmp_path: Path) -> None:
    """Arrays, a publication that is overwritten later, a delta to it, a file and a folder that are gone later."""
    children, segments = children_of(os.getpid()), segments_of(os.getpid())
    with (
        on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine,
        WeightPublisher() as publisher,
    ):
        save_pretrained(tmp_path / "folder", tiny_moe_config(), weights(engine, 6))
        delta = {name: tensor for name, tensor in weights(engine, 4).items() if "norm" in name or ".experts.1." in name}
        sources: list[Callable[[], Any]] = [
            lambda: weights(engine, 1),
            lambda: publisher.publish(weights(engine, 2), 2),
            lambda: publisher.publish_delta(delta, 3),
            lambda: publish_file(tmp_path / "file", weights(engine, 5), 4),
            lambda: str(tmp_path / "folder"),
            lambda: publisher.publish(weights(engine, 7), 6, dtype="bfloat16"),
            lambda: publisher.publish_delta(delta, 7),
        ]
        for number, source in enumerate(sources):
            engine.update_weights(source())
            if number in (0, 3):
                engine.pin_weights()
            if number == 4:
                shutil.rmtree(tmp_path / "folder")
            before = holds(engine)
            lose(engine, number % 2)
            assert holds(engine) == before
            if number == 3:
                engine.rebalance_experts()
        lose(engine, 0, 1)
        assert holds(engine) == before
        engine.drop_weights("reference")
        assert len(segments_of(os.getpid())) <= len(segments) + 2 + 2
    assert children_of(os.getpid()) == children and segments_of(os.getpid()) == segments


def test_deltas_go_on_after_a_restart(moe_model: Path) -> None:
    with on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine, WeightPublisher() as one:
        first, second, third = (weights(engine, seed) for seed in (1, 2, 3))
        engine.update_weights(one.publish(first, 1))
        lose(engine, 1)
        names = [name for name in first if "norm" in name or ".experts.1." in name]
        engine.update_weights(one.publish_delta({name: second[name] for name in names}, 2))
        lose(engine, 0)
        engine.update_weights(one.publish_delta({names[0]: third[names[0]]}, 3))
        rollouts = short(engine)
        engine.update_weights(first | {name: second[name] for name in names} | {names[0]: third[names[0]]})
        engine.reset_prefix_cache()
        assert differences(rollouts, short(engine)) == NONE_DIFFER


@pytest.mark.parametrize("level", [1, 2])
def test_a_rank_lost_asleep_is_replaced_by_one_that_sleeps(moe_model: Path, tmp_path: Path, level: int) -> None:
    with on_ranks(moe_model, expert_parallel_size=2, max_rank_restarts=RESTARTS) as engine:
        expected = short(engine)
        engine.sleep(level=level, spill_dir=tmp_path)
        lose(engine, 1)
        assert engine.health()["asleep"] == {"weights": level, "kv_cache": level}
        with pytest.raises(EngineAsleepError):
            short(engine)
        if level == 2:
            engine.update_weights(str(moe_model))
        assert engine.wake_up() == []
        assert differences(expected, short(engine)) == NONE_DIFFER


def test_what_is_kept_asleep(moe_model: Path, tmp_path: Path) -> None:
    """The set of an update at level 1, and no memory for a next one; nothing at level 2, nor of the model's folder."""
    segments = len(segments_of(os.getpid()))

    def num_kept() -> int:
        return len(segments_of(os.getpid())) - segments

    with on_ranks(moe_model, worker="process", max_rank_restarts=RESTARTS) as engine:
        engine.sleep("weights", spill_dir=tmp_path)
        assert num_kept() == 0 and engine.wake_up() == []
        for seed in (1, 2):
            engine.update_weights(weights(engine, seed))
        expected = short(engine)
        assert num_kept() == 2
        engine.sleep("kv_cache")
        assert num_kept() == 2
        engine.sleep("weights", spill_dir=tmp_path)
        assert num_kept() == 1
        lose(engine, 0)
        assert engine.wake_up() == []
        assert differences(expected, short(engine)) == NONE_DIFFER
        engine.sleep("weights", level=2)
        assert num_kept() == 0


def test_a_rank_lost_in_a_pause_is_replaced_and_what_stood_still_goes_on(
    engine_of: Callable[[str], RolloutEngine], expected: list[Rollout]
) -> None:
    engine = engine_of("D2")
    engine.reset_prefix_cache()
    steps = threading.Semaphore(0)
    end = engine.watch_steps(steps.release)
    call = in_thread(lambda: sampled(engine))
    for _ in range(4):
        assert steps.acquire(timeout=30)
    end()
    engine.pause_generation("keep")
    lose(engine, 0, 1)
    assert engine.health()["state"] == "paused"
    engine.resume_generation()
    assert differences(expected, call()) == NONE_DIFFER
