"""Workers that die while they stage, and Ctrl-C meanwhile: the old version serves on, and the next update succeeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from leftovers import segments_of
from tiny_engine import tiny_options, tiny_tensors, write_tiny_model

from zerokl.rollout import worker_child
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineFailedError
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.worker_child import WorkerDiedError
from zerokl.weight_sync import WeightPublisher

_DYING = """
import os, signal
from zerokl.weight_sync import arrivals
whole, left = arrivals.ArrivingTensor.{step}, [{number}]
def last(self, *given, **named):
    left[0] -= 1
    result = whole(self, *given, **named)
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
arrivals.ArrivingTensor.{step} = last
"""


def bits(engine: RolloutEngine) -> bytes:
    (rollout,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5, seed=4, ignore_eos=True))
    return np.asarray(rollout.token_ids).tobytes() + np.asarray(rollout.logprobs).tobytes()


def kill_while_staging(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    random = np.random.default_rng(seed)
    number = int(random.integers(1, len(tiny_tensors()) + 1))
    step = str(random.choice(["arrive", "read", "finish"]))
    options = tiny_options(folder, worker="process")
    with WeightPublisher() as publisher:
        published = publisher.publish(tiny_tensors(seed + 1), 1)
        with monkeypatch.context() as patched:
            patched.setattr(worker_child, "_BOOT", _DYING.format(step=step, number=number) + worker_child._BOOT)
            doomed = RolloutEngine(options)
        with doomed:
            before = bits(doomed)
            with pytest.raises((EngineFailedError, WorkerDiedError), match="killed by SIGKILL"):
                doomed.update_weights(published)
            assert doomed.health()["weight_versions"] == {"policy": 0}
        assert segments_of(os.getpid()) == [published.segment]  # still the publisher's own
        with RolloutEngine(options) as engine:
            assert bits(engine) == before
            assert engine.update_weights(published) == 1
            assert bits(engine) != before
        publisher.publish(tiny_tensors(0), 2)
        publisher.publish(tiny_tensors(0), 3)  # the dead worker holds no lease
    assert segments_of(os.getpid()) == []


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 30))])
def test_a_worker_killed_inside_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    kill_while_staging(write_tiny_model(tmp_path), monkeypatch, seed)


# Staging stops at the first tensor, in this process or in the worker's, until it is let go.
_WAITING = """
import os, sys
from zerokl.weight_sync import arrivals
whole, first = arrivals.ArrivingTensor.read, [True]
def read(self, stop):
    if first.pop() if first else False:
        with open({began!r}, "w") as began:
            began.write("x")
        try:
            open({hold!r}).read()
        except KeyboardInterrupt:
            raise
    return whole(self, stop)
arrivals.ArrivingTensor.read = read
"""

_TRAINER = """
import sys
sys.path.append({tests!r})
from pathlib import Path
from test_staging_interrupted import bits
from tiny_engine import tiny_options, tiny_tensors
from zerokl.rollout import worker_child
from zerokl.rollout.engine import RolloutEngine
from zerokl.weight_sync import WeightPublisher
waiting = {waiting!r}
if {worker!r} == "process":
    worker_child._BOOT = waiting + worker_child._BOOT
else:
    exec(waiting)
with RolloutEngine(tiny_options(Path({folder!r}), worker={worker!r})) as engine, WeightPublisher() as publisher:
    before = bits(engine)
    source = tiny_tensors(1) if {arrays!r} else publisher.publish(tiny_tensors(1), 1)
    try:
        engine.update_weights(source)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    assert engine.health()["weight_versions"] == {{"policy": 0}}
    engine.reset_prefix_cache()
    assert bits(engine) == before
    for seed, version in ((2, 1), (1, 2)):
        good = tiny_tensors(seed)
        assert engine.update_weights(good if {arrays!r} else publisher.publish(good, version)) == version
        assert bits(engine) != before
    print("updated", flush=True)
"""


@pytest.mark.parametrize(
    ("worker", "arrays"), [("inprocess", False), ("process", False), ("process", True)], ids=["here", "there", "arrays"]
)
def test_ctrl_c_inside_staging(tmp_path: Path, worker: str, arrays: bool) -> None:
    write_tiny_model(tmp_path)
    began, hold = str(tmp_path / "began"), str(tmp_path / "hold")
    for path in (began, hold):
        os.mkfifo(path)
    script = _TRAINER.format(
        tests=str(Path(__file__).parent),
        folder=str(tmp_path),
        worker=worker,
        arrays=arrays,
        waiting=_WAITING.format(began=began, hold=hold),
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        cwd=tmp_path,
    ) as process:
        try:
            assert Path(began).read_text() == "x"
            os.killpg(process.pid, signal.SIGINT)
            if worker == "process":
                Path(hold).write_text("")  # staging goes on to its end, for which the interrupted call waits
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert output.split() == ["interrupted", "updated"]
    assert segments_of(process.pid) == []
