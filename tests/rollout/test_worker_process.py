"""The worker in a process of its own: the same results as in-process, prompt errors, and nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from leftovers import children_of, segments_of, wait_for_end

from zerokl.kernels.ops import SampleResult, StepInputs, neutral_sampling
from zerokl.rollout import worker_child
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, step_inputs, tiny_config
from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.weight_source import FolderWeights, SharedWeights, TensorWeights
from zerokl.rollout.worker import LocalWorker, Worker
from zerokl.rollout.worker_link import RemoteTraceback, RemoteWorker, WorkerDiedError
from zerokl.weight_sync import ChecksumError, WeightPublisher

CONTENT = tiny_config("LlamaForCausalLM")
MODEL = ModelConfig.from_json(CONTENT)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    save_pretrained(path, CONTENT, random_tensors(MODEL, 0))
    return str(path)


@pytest.fixture(scope="module")
def config(folder: str) -> EngineConfig:
    return EngineConfig(model=folder, num_blocks=8, max_model_len=128, num_threads=1, worker="process")


@pytest.fixture(scope="module")
def shared_remote(config: EngineConfig) -> Iterator[RemoteWorker]:
    worker = RemoteWorker(config)
    yield worker
    worker.close()


@pytest.fixture
def remote(shared_remote: RemoteWorker, folder: str) -> RemoteWorker:
    """A worker with the folder's weights live and nothing staged; for tests that leave it alive."""
    shared_remote.stage_weights(FolderWeights(path=folder), 0)
    shared_remote.commit_weights()
    return shared_remote


@pytest.fixture
def mortal(config: EngineConfig, folder: str) -> Iterator[RemoteWorker]:
    """A worker of the test's own."""
    worker = RemoteWorker(config)
    worker.stage_weights(FolderWeights(path=folder), 0)
    worker.commit_weights()
    yield worker
    worker.close()


def a_step(policy: str = "policy") -> StepInputs:
    tokens = np.arange(1, 20, dtype=np.int32)
    rows = np.arange(19, dtype=np.int32)
    sampling = dataclasses.replace(neutral_sampling(19), seed=rows.astype(np.uint64), want_raw=True)
    return step_inputs([tokens], [0], [[5, 3]], 16, policy=policy, logit_rows=rows, sampling=sampling, step=3)


def sample(worker: Worker, step: StepInputs) -> SampleResult:
    return worker.execute(StepOrder(inputs=step)).sampled


def same(one: SampleResult, other: SampleResult) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(SampleResult)]
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def local_result(config: EngineConfig, seed: int) -> SampleResult:
    worker = LocalWorker(config)
    worker.stage_weights(TensorWeights(tensors=random_tensors(MODEL, seed)), 0)
    worker.commit_weights()
    return sample(worker, a_step())


# -- the same worker ---------------------------------------------------------------------------------------------------
def test_results_are_those_of_the_local_worker_from_every_source_of_weights(
    remote: RemoteWorker, config: EngineConfig
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
    facts = remote.describe()
    assert facts["kind"] == "process" and facts["pid"] != os.getpid()
    assert facts["versions"] == {"policy": 2, "reference": 0}
    remote.drop_weights("reference")
    assert remote.describe()["versions"] == {"policy": 2}
    assert len(segments_of(os.getpid())) == 1  # kept for the next arrays


def test_results_are_the_callers_to_keep(remote: RemoteWorker) -> None:
    first = sample(remote, a_step())
    kept = first.logprobs.copy()
    sample(remote, dataclasses.replace(a_step(), token_ids=np.arange(2, 21, dtype=np.int32)))
    np.testing.assert_array_equal(first.logprobs, kept)
    first.logprobs[...] = 0


def test_an_error_keeps_its_text_and_leaves_the_worker_as_it_was(remote: RemoteWorker, config: EngineConfig) -> None:
    before = sample(remote, a_step())
    tensors = random_tensors(MODEL, 1)
    del tensors["model.norm.weight"]
    local: Worker = LocalWorker(config)
    for worker in (local, remote):
        with pytest.raises(ValueError, match=r"model\.norm\.weight") as missing:
            worker.stage_weights(TensorWeights(tensors=tensors), 1)
        with pytest.raises(ValueError, match="nobody") as unknown:
            sample(worker, a_step("nobody"))
    assert isinstance(missing.value.__cause__, RemoteTraceback) and "stage" in str(missing.value.__cause__)
    assert isinstance(missing.value, ValueError) and type(unknown.value) is ValueError
    assert same(sample(remote, a_step()), before)


def test_damaged_weights_are_refused_by_type_and_name(remote: RemoteWorker) -> None:
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
        RemoteWorker(broken)
    assert str(remote.value) == str(local.value)
    assert isinstance(local.value, type(remote.value))
    assert children_of(os.getpid()) == before


def test_the_child_stays_clear_of_paddle(remote: RemoteWorker) -> None:
    assert "paddle" not in Path(f"/proc/{remote.describe()['pid']}/maps").read_text()


# -- death -------------------------------------------------------------------------------------------------------------
def test_a_worker_killed_in_a_call_is_noticed_at_once(mortal: RemoteWorker) -> None:
    pid = mortal.describe()["pid"]
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


def test_a_worker_killed_between_calls_is_noticed_by_the_next_and_every_later_one(mortal: RemoteWorker) -> None:
    segments = segments_of(os.getpid())
    pid = mortal.describe()["pid"]
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
    worker = RemoteWorker(config)
    os.kill(worker.describe()["pid"], signal.SIGSEGV)
    with pytest.raises(WorkerDiedError, match=r"(?s)killed by SIGSEGV; it wrote:.*Segmentation fault"):
        worker.describe()
    worker.close()
    assert "Segmentation fault" in capfd.readouterr().err


def test_a_child_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, config: EngineConfig) -> None:
    monkeypatch.setattr(worker_child, "_BOOT", "raise SystemExit('no zerokl here')")
    with pytest.raises(WorkerDiedError, match=r"(?s)ended with exit status 1; it wrote:\nno zerokl here"):
        RemoteWorker(config)


# -- interruption ------------------------------------------------------------------------------------------------------
def test_ctrl_c_does_not_reach_the_worker_and_late_answers_are_dropped(remote: RemoteWorker) -> None:
    expected = sample(remote, a_step())
    pid = remote.describe()["pid"]
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


# -- nothing left ------------------------------------------------------------------------------------------------------
def test_close_leaves_no_process_thread_descriptor_or_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: EngineConfig
) -> None:
    def state() -> tuple[list[int], int, int]:
        tasks, descriptors = (len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("task", "fd"))
        return children_of(os.getpid()), tasks, descriptors

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    children, tasks, descriptors = state()
    worker = RemoteWorker(config)
    pid = worker.describe()["pid"]
    assert state()[0] == [*children, pid] and state()[1] > tasks
    assert list(tmp_path.iterdir()) == []  # a connected socket needs no name
    worker.close()
    worker.close()
    left = state()
    assert left[0] == children and left[1] <= tasks and left[2] == descriptors  # threads of tests before may have ended
    with pytest.raises(WorkerError, match="closed"):
        worker.describe()


def test_a_worker_that_does_not_answer_is_killed_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch, mortal: RemoteWorker
) -> None:
    monkeypatch.setattr(worker_child, "CLOSE_SECONDS", 0.2)
    pid = mortal.describe()["pid"]
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        about_to_call = threading.Event()
        call = pool.submit(lambda: about_to_call.set() or sample(mortal, a_step()))
        about_to_call.wait()
        start = time.perf_counter()
        mortal.close()
        with pytest.raises(WorkerError):
            call.result()
    assert time.perf_counter() - start < 2
    assert wait_for_end(pid) and pid not in children_of(os.getpid())


def test_a_worker_outlives_the_thread_that_started_it(config: EngineConfig) -> None:
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(RemoteWorker, config).result()
    assert worker.describe()["kind"] == "process"
    worker.close()


def test_a_forked_copy_cannot_end_its_parents_worker(remote: RemoteWorker) -> None:
    child = os.fork()
    if not child:
        remote._link.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert remote.describe()["kind"] == "process"


def test_a_long_path_for_temporary_files_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: EngineConfig
) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    worker = RemoteWorker(config)
    assert list(deep.iterdir()) == []
    worker.close()


USER_SCRIPT = """
import os, signal, sys, time
import numpy as np
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import random_tensors
from zerokl.rollout.weight_source import SharedWeights
from zerokl.rollout.worker_link import RemoteWorker
from zerokl.weight_sync import WeightPublisher
worker = RemoteWorker(EngineConfig(model=sys.argv[1], num_blocks=8, max_model_len=128, num_threads=1))
publisher = WeightPublisher()
published = publisher.publish(random_tensors(ModelConfig.from_json(sys.argv[1]), 1), 1)
worker.stage_weights(SharedWeights(published=published), 1)
print(worker.describe()["pid"], flush=True)
"""


@pytest.mark.parametrize(
    ("then", "by", "status"),
    [
        ("", None, 0),
        ("raise RuntimeError('bug')", None, 1),
        ("sys.stdin.read()", signal.SIGINT, -signal.SIGINT),
        ("sys.stdin.read()", signal.SIGTERM, -signal.SIGTERM),
        ("sys.stdin.read()", signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["exit", "exception", "ctrl-c", "terminated", "killed"],
)
def test_however_the_engines_process_ends_nothing_of_it_stays(
    tmp_path: Path, folder: str, then: str, by: signal.Signals | None, status: int
) -> None:
    script = tmp_path / "user_script.py"  # no main guard, and run from a folder that holds a `kernels`
    script.write_text(USER_SCRIPT + then)
    command = [sys.executable, str(script), folder]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        child = process.stdout.readline()
        assert child, process.stderr.read().decode()
        if by is signal.SIGINT:
            os.killpg(process.pid, by)  # as a terminal does
        elif by is not None:
            process.send_signal(by)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == status, errors.decode()
    assert wait_for_end(int(child))
    assert list(tmp_path.iterdir()) == [script]
    if by in (signal.SIGKILL, signal.SIGTERM):  # these leave no chance to clean up: the next start does it
        WeightPublisher().close()
    assert segments_of(process.pid) == []
    assert b"Exception ignored" not in errors and b"resource_tracker" not in errors


def test_an_engine_killed_while_its_worker_starts_leaves_no_folder(tmp_path: Path, folder: str) -> None:
    script = USER_SCRIPT.replace("worker = ", "print('starting', flush=True)\nworker = ")
    command = [sys.executable, "-c", script, folder]
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"starting\n"
        while not (children := children_of(process.pid)):
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert wait_for_end(children[0])
    assert list(tmp_path.iterdir()) == []


def test_two_workers_live_side_by_side(remote: RemoteWorker, mortal: RemoteWorker) -> None:
    assert same(sample(remote, a_step()), sample(mortal, a_step()))
    mortal.close()
    assert remote.describe()["kind"] == "process"
