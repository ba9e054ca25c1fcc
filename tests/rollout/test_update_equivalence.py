"""An engine that was updated to a version, by whatever way, is an engine that was started with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import engine_with, in_thread, tiny_options, tiny_tensors, wait_until, write_tiny_model

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineFailedError, WorkerError
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.weight_source import WeightSource
from zerokl.rollout.worker import LocalWorker
from zerokl.weight_sync import WeightPublisher

PROMPTS = [list(range(20)), [7, 8, 9]]
PARAMS = SamplingParams(n=2, max_tokens=8, seed=1, ignore_eos=True)
Update = Callable[[RolloutEngine, Path], Any]


def assert_same(rollouts: list[Rollout], expected: list[Rollout]) -> None:
    for rollout, other in zip(rollouts, expected, strict=True):
        for name in ("token_ids", "logprobs", "policy_logprobs", "entropy"):
            np.testing.assert_array_equal(getattr(rollout, name), getattr(other, name))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Rollout]:
    """Rollouts of an engine that was started with the weights of seed 1."""
    with RolloutEngine(tiny_options(write_tiny_model(tmp_path_factory.mktemp("fresh"), seed=1))) as fresh:
        return fresh.generate(PROMPTS, PARAMS)


def from_shared_memory(engine: RolloutEngine, folder: Path) -> None:
    with WeightPublisher() as publisher:
        engine.update_weights(publisher.publish(tiny_tensors(1), version=1))


def after_failed_attempts(engine: RolloutEngine, folder: Path) -> None:
    wrong = tiny_tensors(2) | {"model.norm.weight": np.ones(3, np.float32)}
    for source in (wrong, {}, folder / "nothing"):
        with pytest.raises(ValueError, match=r"missing|model\.norm\.weight|safetensors"):
            engine.update_weights(source)
    with WeightPublisher() as publisher:
        published = publisher.publish(tiny_tensors(2), version=1)
    with pytest.raises(ValueError, match=published.segment):
        engine.update_weights(published)
    engine.update_weights(tiny_tensors(1))


def along_a_chain_of_deltas(engine: RolloutEngine, folder: Path) -> None:
    start, goal = tiny_tensors(0), tiny_tensors(1)
    names = list(goal)
    with WeightPublisher() as publisher:
        engine.update_weights(publisher.publish(start, version=1))
        for step in range(20):
            part = {name: goal[name] for name in names[step::20]}
            engine.update_weights(publisher.publish_delta(part, version=step + 2), mode="keep")
    assert engine.get_weight_version() == 21


def after_other_versions(engine: RolloutEngine, folder: Path) -> None:
    for seed in (2, 3, 1):
        engine.update_weights(tiny_tensors(seed), mode="keep")


def after_sleep(engine: RolloutEngine, folder: Path) -> None:
    engine.sleep(level=2)
    engine.update_weights(tiny_tensors(1))
    engine.wake_up()


def in_a_coroutine(engine: RolloutEngine, folder: Path) -> None:
    asyncio.run(engine.aupdate_weights(tiny_tensors(1), mode="abort"))


WAYS: list[Update] = [
    lambda engine, _: engine.update_weights(tiny_tensors(1)),
    lambda engine, folder: engine.update_weights(write_tiny_model(folder, seed=1)),
    from_shared_memory,
    along_a_chain_of_deltas,
    after_failed_attempts,
    after_other_versions,
    after_sleep,
    in_a_coroutine,
]


@pytest.mark.parametrize("update", WAYS)
def test_every_way_leads_to_the_same_engine(
    engine: RolloutEngine, tmp_path: Path, expected: list[Rollout], update: Update
) -> None:
    before = engine.generate(PROMPTS, PARAMS)
    update(engine, tmp_path)
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
    with pytest.raises(AssertionError):
        assert_same(before, expected)


def test_every_way_leads_a_worker_process_there(tiny_model: Path, tmp_path: Path, expected: list[Rollout]) -> None:
    with RolloutEngine(tiny_options(tiny_model, worker="process")) as engine:
        for update in (from_shared_memory, along_a_chain_of_deltas, after_failed_attempts, after_sleep):
            update(engine, tmp_path)
            assert_same(engine.generate(PROMPTS, PARAMS), expected)
            engine.update_weights(tiny_tensors(0), version=0, allow_rewind=True)


def packed_bytes(worker: LocalWorker) -> list[bytes]:
    """All arrays of the live set."""
    found: list[bytes] = []

    def visit(node: Any) -> None:
        if isinstance(node, np.ndarray):
            found.append(node.tobytes())
        elif isinstance(node, tuple):
            for child in node:
                visit(child)
        elif hasattr(node, "__dataclass_fields__"):
            for name in node.__dataclass_fields__:
                visit(getattr(node, name))

    visit(worker._live_runner().weight_sets["policy"].params)
    assert len(found) > 10
    return found


def test_perturb_apply_revert_is_identical_to_the_byte(tiny_model: Path) -> None:
    engine, worker = engine_with(tiny_model, LocalWorker)
    with engine:
        start, rollouts = packed_bytes(worker), engine.generate(PROMPTS, PARAMS)
        tensors = tiny_tensors(0)
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
            engine.update_weights(tensors | {name: np.nextafter(tensors[name], np.float32(9))})
            assert packed_bytes(worker) != start, "the smallest change of one tensor shows"
            engine.update_weights(tensors)
            assert packed_bytes(worker) == start
        assert_same(engine.generate(PROMPTS, PARAMS), rollouts)


class SlowStaging(LocalWorker):
    """Staging, but the first, waits for `gate`, then raises `error` if there is one."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.staging, self.gate = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def stage_weights(self, source: WeightSource, version: int) -> None:
        if self._live_runner().weight_sets:
            self.staging.set()
            assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        super().stage_weights(source, version)


@pytest.fixture
def slow(tiny_model: Path) -> Iterator[tuple[RolloutEngine, SlowStaging]]:
    engine, worker = engine_with(tiny_model, SlowStaging)
    with engine:
        yield engine, worker
        worker.gate.set()


def test_requests_run_while_weights_are_staged(
    slow: tuple[RolloutEngine, SlowStaging], expected: list[Rollout]
) -> None:
    engine, worker = slow
    update = in_thread(lambda: engine.update_weights(tiny_tensors(1)))
    worker.staging.wait()
    for rollout in engine.generate(PROMPTS, PARAMS):
        assert rollout.version_spans == [(0, 8, 0)]
    assert engine.health()["state"] == "running"
    worker.gate.set()
    assert update() == 1
    assert_same(engine.generate(PROMPTS, PARAMS), expected)


def test_an_update_given_up_while_it_is_staged_does_not_take_the_next_one_with_it(
    slow: tuple[RolloutEngine, SlowStaging], expected: list[Rollout]
) -> None:
    engine, worker = slow

    async def cancel() -> None:
        task = asyncio.create_task(engine.aupdate_weights(tiny_tensors(2)))
        await asyncio.to_thread(worker.staging.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        worker.gate.set()

    asyncio.run(cancel())
    assert engine.get_weight_version() == 0
    assert engine.update_weights(tiny_tensors(1)) == 1
    assert_same(engine.generate(PROMPTS, PARAMS), expected)


def test_a_worker_that_dies_while_it_stages_ends_the_engine(slow: tuple[RolloutEngine, SlowStaging]) -> None:
    engine, worker = slow
    worker.error = WorkerError("the process died")
    worker.gate.set()
    with pytest.raises(EngineFailedError, match="the process died"):
        engine.update_weights(tiny_tensors(1))
    wait_until(lambda: engine.health()["state"] == "failed")
    with pytest.raises(EngineFailedError):
        engine.generate("a")


@pytest.mark.parametrize("error", [MemoryError("too little"), RuntimeError("odd"), OSError("gone")])
def test_any_other_error_while_staging_is_the_callers(
    slow: tuple[RolloutEngine, SlowStaging], error: Exception, expected: list[Rollout]
) -> None:
    engine, worker = slow
    worker.gate.set()
    worker.error = error
    with pytest.raises(type(error), match=str(error)):
        engine.update_weights(tiny_tensors(2))
    worker.error = None
    assert engine.update_weights(tiny_tensors(1)) == 1
    assert_same(engine.generate(PROMPTS, PARAMS), expected)
