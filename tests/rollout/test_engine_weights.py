"""New weights: no request sees two versions, no cached prefix outlives its weights, and a failure changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_engine import (
    GatedWorker,
    gated_engine,
    in_thread,
    step_into_drain,
    tiny_options,
    tiny_tensors,
    wait_until,
    write_tiny_model,
)

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineClosedError
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync import WeightPublisher

PROMPT = [list(range(20))]
PARAMS = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)


@pytest.fixture
def gated(tiny_model: Path) -> Iterator[tuple[RolloutEngine, GatedWorker]]:
    """An engine whose steps wait for permits, and its worker."""
    engine, worker = gated_engine(tiny_model)
    with engine:
        yield engine, worker
        worker.open()


def test_new_weights_give_what_a_fresh_engine_gives(engine: RolloutEngine, tmp_path: Path) -> None:
    old = engine.generate(PROMPT, PARAMS)[0]
    assert engine.update_weights(tiny_tensors(1)) == 1 == engine.get_weight_version()
    new = engine.generate(PROMPT, PARAMS)[0]
    assert new.num_cached_tokens == 0, "a prefix computed by other weights must not be found"
    assert new.policy_versions.tolist() == [1] * 6
    with RolloutEngine(tiny_options(write_tiny_model(tmp_path, seed=1))) as fresh:
        expected = fresh.generate(PROMPT, PARAMS)[0]
    np.testing.assert_array_equal(new.token_ids, expected.token_ids)
    np.testing.assert_array_equal(new.logprobs, expected.logprobs)
    assert old.token_ids.tolist() != new.token_ids.tolist()


def test_every_source_gives_the_same_weights(engine: RolloutEngine, tmp_path: Path) -> None:
    tensors = tiny_tensors(1)
    folder = write_tiny_model(tmp_path, seed=1)
    results = []
    with WeightPublisher() as publisher:
        for source in (tensors, list(tensors.items()), folder, str(folder), publisher.publish(tensors, version=5)):
            engine.update_weights(source)
            results.append(engine.generate(PROMPT, PARAMS)[0])
    assert engine.get_weight_version() == 5, "a publication brings its version"
    for result in results[1:]:
        np.testing.assert_array_equal(result.logprobs, results[0].logprobs)


def test_versions_follow_each_other(engine: RolloutEngine) -> None:
    assert engine.update_weights(tiny_tensors(1), version=5, allow_rewind=True) == 5
    for version, kind in ((5, "a repetition"), (4, "a step back"), (7, "a gap")):
        with pytest.raises(ValueError, match=rf"version must be 6, .* got {version} \({kind}\)"):
            engine.update_weights(tiny_tensors(2), version=version)
    with pytest.raises(ValueError, match="version must be an integer"):
        engine.update_weights(tiny_tensors(2), version=6.0)  # type: ignore[arg-type]
    assert engine.update_weights(tiny_tensors(2)) == 6


def test_bad_weights_leave_the_old_version_serving(engine: RolloutEngine, tmp_path: Path) -> None:
    before = engine.generate(PROMPT, PARAMS)[0]
    missing = tiny_tensors(1)
    del missing["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        engine.update_weights(missing)
    misshapen = tiny_tensors(1) | {"model.norm.weight": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        engine.update_weights(misshapen)
    with pytest.raises(ValueError, match="safetensors"):
        engine.update_weights(tmp_path)
    for source in (5, b"bytes", [1, 2], None):
        with pytest.raises(ValueError, match="source must be"):
            engine.update_weights(source)  # type: ignore[arg-type]
    assert engine.get_weight_version() == 0
    after = engine.generate(PROMPT, PARAMS)[0]
    np.testing.assert_array_equal(after.logprobs, before.logprobs)
    assert after.policy_versions.tolist() == [0] * 6


class Unreadable:
    """An array that lives where NumPy cannot look, as a tensor on a GPU does."""

    def __dlpack__(self, **_: object) -> object:
        raise BufferError("on another device")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


@pytest.mark.parametrize("worker", ["inprocess", "process"])
def test_what_cannot_be_read_leaves_the_engine_running(tiny_model: Path, tmp_path: Path, worker: str) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(tiny_model, cut)
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    not_a_file = tmp_path / "not_a_file"
    (not_a_file / "model.safetensors").mkdir(parents=True)
    with RolloutEngine(tiny_options(tiny_model, worker=worker)) as engine:
        before = engine.generate(PROMPT, PARAMS)[0]
        for folder in (cut, not_a_file):
            with pytest.raises(ValueError, match=f"{folder}/model.safetensors: "):
                engine.update_weights(folder)
        with pytest.raises(ValueError, match=r"model\.norm\.weight must be an array that NumPy can view"):
            engine.update_weights(tiny_tensors(1) | {"model.norm.weight": Unreadable()})
        after = engine.generate(PROMPT, PARAMS)[0]
        np.testing.assert_array_equal(after.logprobs, before.logprobs)
        assert engine.health()["weight_versions"] == {"policy": 0}


def test_requests_before_an_update_finish_under_the_old_version_and_later_ones_wait(
    gated: tuple[RolloutEngine, GatedWorker],
) -> None:
    engine, worker = gated
    early = in_thread(lambda: engine.generate(PROMPT, PARAMS))
    worker.began.acquire()
    update = in_thread(lambda: engine.update_weights(tiny_tensors(1)))
    step_into_drain(engine, worker)
    late = in_thread(lambda: engine.generate(PROMPT, PARAMS))
    wait_until(lambda: engine.health()["num_held"] == 1)
    worker.open()
    assert update() == 1
    assert early()[0].policy_versions.tolist() == [0] * 6
    assert late()[0].policy_versions.tolist() == [1] * 6
    assert engine.metrics()["weight_updates"] == 1


def test_an_update_that_drains_is_applied_when_the_last_request_ends(
    gated: tuple[RolloutEngine, GatedWorker],
) -> None:
    engine, worker = gated
    early = in_thread(lambda: engine.generate(PROMPT, PARAMS))
    worker.began.acquire()
    update = in_thread(lambda: engine.update_weights(tiny_tensors(1)))
    step_into_drain(engine, worker)
    worker.open()
    assert early()[0].policy_versions.tolist() == [0] * 6
    assert update() == 1, "nothing else may be needed to wake the loop"


def test_a_held_call_can_be_aborted_and_a_drain_given_up_by_closing(gated: tuple[RolloutEngine, GatedWorker]) -> None:
    engine, worker = gated
    early = in_thread(lambda: engine.generate(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True)))
    worker.began.acquire()
    update = in_thread(lambda: engine.update_weights(tiny_tensors(1)))
    step_into_drain(engine, worker)
    late = in_thread(lambda: engine.generate(PROMPT, PARAMS, request_ids=["late"]))
    wait_until(lambda: engine.health()["num_held"] == 1)
    aborting = in_thread(lambda: engine.abort("late"))
    worker.gate.release(2)
    assert aborting() == 1
    (rollout,) = late()
    assert rollout.finish_reason == "abort" and len(rollout.token_ids) == 0
    assert engine.get_weight_version() == 0
    closing = in_thread(engine.close)
    worker.open()
    closing()
    for join in (early, update):
        with pytest.raises(EngineClosedError):
            join()


def test_pinned_weights_go_on_scoring_as_before(engine: RolloutEngine) -> None:
    (rollout,) = engine.generate(PROMPT, PARAMS)
    assert engine.pin_weights("reference") == 0
    (at_start,) = engine.score(rollout, policy="reference")
    np.testing.assert_array_equal(at_start, rollout.policy_logprobs)
    engine.update_weights(tiny_tensors(1))
    (reference,) = engine.score(rollout, policy="reference")
    (policy,) = engine.score(rollout)
    np.testing.assert_array_equal(reference, at_start)
    assert not np.array_equal(policy, reference)
    assert (engine.get_weight_version("reference"), engine.get_weight_version()) == (0, 1)
    engine.pin_weights("reference")
    np.testing.assert_array_equal(engine.score(rollout, policy="reference")[0], policy)
    engine.drop_weights("reference")
    for call in (lambda: engine.score(rollout, policy="reference"), lambda: engine.drop_weights("reference")):
        with pytest.raises(ValueError, match="reference"):
            call()
    with pytest.raises(ValueError, match="policy"):
        engine.pin_weights("policy")


def test_weights_that_were_rounded_on_the_way_are_named(engine: RolloutEngine) -> None:
    with WeightPublisher() as publisher:
        engine.update_weights(publisher.publish(tiny_tensors(1), 1, dtype="bfloat16"))
        engine.pin_weights("reference")
        assert engine.health()["inexact_weights"] == ["policy", "reference"]
        engine.update_weights(publisher.publish(tiny_tensors(1), 2))
        assert engine.health()["inexact_weights"] == ["reference"]
        engine.update_weights(publisher.publish(tiny_tensors(1), 3, dtype="bfloat16", inexact=False))
    engine.drop_weights("reference")
    assert engine.health()["inexact_weights"] == []
