"""However a worker process, or the one that started it, comes to its end: nothing of it stays."""

from __future__ import annotations

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

import pytest
import zmq
from leftovers import children_of, segments_of, wait_for_end
from process_rig import a_step, loaded, process_config, sample

from zerokl.rollout import worker_child
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.worker_channels import Channels
from zerokl.rollout.worker_link import RankProcesses
from zerokl.weight_sync import WeightPublisher

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return process_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def mortal(config: EngineConfig) -> Iterator[RankProcesses]:
    """A worker of the test's own."""
    worker = loaded(config)
    yield worker
    worker.close()


def test_close_leaves_no_process_thread_descriptor_or_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: EngineConfig
) -> None:
    def state() -> tuple[list[int], int, int]:
        tasks, descriptors = (len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("task", "fd"))
        return children_of(os.getpid()), tasks, descriptors

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    children, tasks, descriptors = state()
    worker = RankProcesses(config)
    pid = worker.pids[0]
    assert state()[0] == [*children, pid] and state()[1] > tasks
    assert list(tmp_path.iterdir()) == []  # a connected socket needs no name
    worker.close()
    worker.close()
    left = state()
    assert left[0] == children and left[1] <= tasks and left[2] == descriptors  # threads of tests before may have ended
    with pytest.raises(WorkerError, match="closed"):
        worker.describe()


def test_channels_wait_for_no_killed_rank(tmp_path: Path) -> None:
    """What counts is what LINGER was when a socket was bound: the end might wait for ever for one that was killed."""
    lingers: list[object] = []

    class Watched(zmq.Socket):
        def bind(self, address):
            lingers.append(self.get(zmq.LINGER))
            return super().bind(address)

    class Context(zmq.Context):
        _socket_class = Watched

    with Context() as context:
        channels = Channels(context, "steps")
        channels.bind(tmp_path, [0, 1])
        assert lingers == [0, 0]
        channels.close()


def test_a_worker_that_does_not_answer_is_killed_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch, mortal: RankProcesses
) -> None:
    monkeypatch.setattr(worker_child, "CLOSE_SECONDS", 0.2)
    pid = mortal.pids[0]
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
        worker = pool.submit(RankProcesses, config).result()
    assert worker.describe()[0]["kind"] == "process"
    worker.close()


def test_a_forked_copy_cannot_end_its_parents_worker(mortal: RankProcesses) -> None:
    child = os.fork()
    if not child:
        mortal._link.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert mortal.describe()[0]["kind"] == "process"


def test_a_long_path_for_temporary_files_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: EngineConfig
) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    worker = RankProcesses(config)
    assert list(deep.iterdir()) == []
    worker.close()


USER_SCRIPT = """
import os, signal, sys, time
import numpy as np
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import random_tensors
from zerokl.rollout.weight_source import SharedWeights
from zerokl.rollout.worker_link import RankProcesses
from zerokl.weight_sync import WeightPublisher
config = EngineConfig(model=sys.argv[1], num_blocks=8, max_model_len=128, num_threads=1, worker="process")
worker = RankProcesses(config)
publisher = WeightPublisher()
published = publisher.publish(random_tensors(ModelConfig.from_json(sys.argv[1]), 1), 1)
worker.stage_weights(SharedWeights(published=published), 1)
print(worker.pids[0], flush=True)
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
    tmp_path: Path, config: EngineConfig, then: str, by: signal.Signals | None, status: int
) -> None:
    script = tmp_path / "user_script.py"  # no main guard, and run from a folder that holds a `kernels`
    script.write_text(USER_SCRIPT + then)
    command = [sys.executable, str(script), config.model]
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


def test_an_engine_killed_while_its_worker_starts_leaves_no_folder(tmp_path: Path, config: EngineConfig) -> None:
    script = USER_SCRIPT.replace("worker = ", "print('starting', flush=True)\nworker = ")
    command = [sys.executable, "-c", script, config.model]
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"starting\n"
        while not (children := children_of(process.pid)):
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert wait_for_end(children[0])
    assert list(tmp_path.iterdir()) == []
