"""The worker in a process of its own: the same results as in-process, and prompt errors."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from leftovers import children_of, segments_of, wait_for_end
from process_rig import MODEL, a_step, loaded, process_config, sample

from zerokl.kernels.ops import SampleResult
from zerokl.rollout import worker_child
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.models.synthetic import random_tensors
from zerokl.rollout.ranks import OneRank, Ranks
from zerokl.rollout.weight_source import FolderWeights, SharedWeights, TensorWeights
from zerokl.rollout.worker import LocalWorker
from zerokl.rollout.worker_link import RankProcesses, RemoteTraceback, WorkerDiedError
from zerokl.weight_sync import ChecksumError, WeightPublisher


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return process_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def mortal(config: EngineConfig) -> Iterator[RankProcesses]:
    """A worker of the test's own."""
    worker = loaded(config)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def shared_remote(config: EngineConfig) -> Iterator[RankProcesses]:
    worker = RankProcesses(config)
    yield worker
    worker.close()


@pytest.fixture
def remote(shared_remote: RankProcesses, config: EngineConfig) -> RankProcesses:
    """A worker with the folder's weights live and nothing staged; for tests that leave it alive."""
    shared_remote.stage_weights(FolderWeights(path=config.model), 0)
    shared_remote.commit_weights()
    return shared_remote


def same(one: SampleResult, other: SampleResult) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(SampleResult)]
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def local_result(config: EngineConfig, seed: int) -> SampleResult:
    worker = OneRank(LocalWorker(config))
    worker.stage_weights(TensorWeights(tensors=random_tensors(MODEL, seed)), 0)
    worker.commit_weights()
    return sample(worker, a_step())


# -- the same worker ---------------------------------------------------------------------------------------------------
def test_results_are_those_of_the_local_worker_from_every_source_of_weights(
    remote: RankProcesses, config: EngineConfig
) -> None:
    expected = [local_result(config, seed) for seed in range(3)]
    assert same(sample(remote, a_step()), expected[0]) and not same(expected[0], expected[1])
    remote.pin_weights("reference")
    remote.stage_weights(TensorWeights(tensors=random_tensors(MODEL, 1)), 1)
    assert same(sample(remote, a_step()), expected[0])
    remote.commit_weights()
    assert same(sample(remote, a_step()), expected[1])
    with WeightPublisher() as publisher:
        published = publisher.publish(random_tensors(MODEL, 2), 2)
        remote.stage_weights(SharedWeights(published=published), 2)
        publisher.publish(random_tensors(MODEL, 3), 3)
        publisher.publish(random_tensors(MODEL, 4), 4)
    remote.commit_weights()
    assert same(sample(remote, a_step()), expected[2])
    assert same(sample(remote, a_step("reference")), expected[0])
    (facts,) = remote.describe()
    assert facts["kind"] == "process" and facts["pid"] != os.getpid()
    assert facts["versions"] == {"policy": 2, "reference": 0}
    remote.drop_weights("reference")
    assert remote.describe()[0]["versions"] == {"policy": 2}
    assert len(segments_of(os.getpid())) == 1  # kept for the next arrays


def test_results_are_the_callers_to_keep(remote: RankProcesses) -> None:
    first = sample(remote, a_step())
    kept = first.logprobs.copy()
    sample(remote, dataclasses.replace(a_step(), token_ids=np.arange(2, 21, dtype=np.int32)))
    np.testing.assert_array_equal(first.logprobs, kept)
    first.logprobs[...] = 0


def test_an_error_keeps_its_text_and_leaves_the_worker_as_it_was(remote: RankProcesses, config: EngineConfig) -> None:
    before = sample(remote, a_step())
    tensors = random_tensors(MODEL, 1)
    del tensors["model.norm.weight"]
    local: Ranks = OneRank(LocalWorker(config))
    for worker in (local, remote):
        with pytest.raises(ValueError, match=r"model\.norm\.weight") as missing:
            worker.stage_weights(TensorWeights(tensors=tensors), 1)
        with pytest.raises(ValueError, match="nobody") as unknown:
            sample(worker, a_step("nobody"))
    assert isinstance(missing.value.__cause__, RemoteTraceback) and "stage" in str(missing.value.__cause__)
    assert isinstance(missing.value, ValueError) and type(unknown.value) is ValueError
    assert same(sample(remote, a_step()), before)


def test_damaged_weights_are_refused_by_type_and_name(remote: RankProcesses) -> None:
    before = sample(remote, a_step())
    with WeightPublisher(buffers=1) as publisher:
        published = publisher.publish(random_tensors(MODEL, 1), 1)
        spec = published.manifest.tensors[2]
        with Path("/dev/shm" + published.segment).open("r+b") as file:
            file.seek(spec.offset)
            file.write(b"\xff\xff\xff")
        with pytest.raises(ChecksumError, match=spec.name):
            remote.stage_weights(SharedWeights(published=published), 1)
        publisher.publish(random_tensors(MODEL, 1), 2)  # the worker holds no lease
    assert same(sample(remote, a_step()), before)


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_bad_model_folder_raises_as_in_process(tmp_path: Path, config: EngineConfig, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    broken = dataclasses.replace(config, model=str(tmp_path))
    before = children_of(os.getpid())
    with pytest.raises((ValueError, OSError)) as local:
        LocalWorker(broken)
    with pytest.raises((ValueError, OSError)) as remote:
        RankProcesses(broken)
    assert str(remote.value) == str(local.value)
    assert isinstance(local.value, type(remote.value))
    assert children_of(os.getpid()) == before


def test_the_child_stays_clear_of_paddle(remote: RankProcesses) -> None:
    assert "paddle" not in Path(f"/proc/{remote.pids[0]}/maps").read_text()


# -- death -------------------------------------------------------------------------------------------------------------
def test_a_worker_killed_in_a_call_is_noticed_at_once(mortal: RankProcesses) -> None:
    pid = mortal.pids[0]
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(sample, mortal, a_step())
        assert not call.done()
        os.kill(pid, signal.SIGKILL)
        start = time.perf_counter()
        with pytest.raises(WorkerDiedError, match=f"rank 0: worker process {pid} was killed by SIGKILL"):
            call.result()
        assert time.perf_counter() - start < 1
    assert pid not in children_of(os.getpid())


def test_a_worker_killed_between_calls_is_noticed_by_the_next_and_every_later_one(mortal: RankProcesses) -> None:
    segments = segments_of(os.getpid())
    pid = mortal.pids[0]
    os.kill(pid, signal.SIGKILL)
    assert wait_for_end(pid)
    for _ in range(3):
        with pytest.raises(WorkerDiedError, match="SIGKILL") as died:
            sample(mortal, a_step())
        assert isinstance(died.value, WorkerError)
    tensors = TensorWeights(tensors=random_tensors(MODEL, 1))
    with pytest.raises(WorkerDiedError):
        mortal.stage_weights(tensors, 1)
    assert segments_of(os.getpid()) == segments


def test_the_last_words_of_a_crash_are_in_the_error(
    monkeypatch: pytest.MonkeyPatch, config: EngineConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    worker = RankProcesses(config)
    os.kill(worker.pids[0], signal.SIGSEGV)
    with pytest.raises(WorkerDiedError, match=r"(?s)killed by SIGSEGV; it wrote:.*Segmentation fault"):
        worker.describe()
    worker.close()
    assert "Segmentation fault" in capfd.readouterr().err


def test_a_child_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, config: EngineConfig) -> None:
    monkeypatch.setattr(worker_child, "_BOOT", "raise SystemExit('no zerokl here')")
    with pytest.raises(WorkerDiedError, match=r"(?s)ended with exit status 1; it wrote:\nno zerokl here"):
        RankProcesses(config)


# -- interruption ------------------------------------------------------------------------------------------------------
def test_ctrl_c_does_not_reach_the_worker_and_late_answers_are_dropped(remote: RankProcesses) -> None:
    expected = sample(remote, a_step())
    pid = remote.pids[0]
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGSTOP)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    previous = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            remote.describe()
    finally:
        signal.signal(signal.SIGALRM, previous)
        os.kill(pid, signal.SIGCONT)
    assert same(sample(remote, a_step()), expected)


def test_two_workers_live_side_by_side(remote: RankProcesses, mortal: RankProcesses) -> None:
    assert same(sample(remote, a_step()), sample(mortal, a_step()))
    mortal.close()
    assert remote.describe()[0]["kind"] == "process"
