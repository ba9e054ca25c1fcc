"""Part `sync` of run_all.py: weights of a trainer's process through the GPU's memory into an engine that generates.

An update takes from the trainer's call of `publish`, its values being written, to the end of `update_weights`: publish
(in place the trainer's checksums are computed after it), transfer (encoded, through a pipe, decoded), stage (opened,
copied, checked, the trainer's checksums awaited) and commit (between two steps). It is announced some time before the
end of the staging, and no step launched ahead from then on (announced_before_ms). While
sequences run, what generation loses is told by the device: the longest time between two steps around the commit, over
the usual one. The floor is the bytes that have to move at the datasheet's bandwidth: published in place they are read
by the trainer's checksum, read and written by the copy, and read by the engine's checksum; buffers add a copy.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from step_times import TimedWorker, milliseconds

from models import model_folder
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.weight_source import DeviceWeights, WeightSource
from zerokl.rollout.worker import LocalWorker
from zerokl.weight_sync import PublishedDeviceWeights

Row = dict[str, Any]

BANDWIDTH = 3.35e12
"""Bytes a second of an H100's memory."""
WARM_UPDATES = 3
"""Until both slots are allocated, their steps recorded and all kernels compiled."""
UNDER_WAY = 4
"""Steps that may not have ended when the last one is seen."""
PROMPT, OUTPUT = 64, 1500


class SyncedWorker(TimedWorker):
    """Weights of its own at first, then those that a trainer publishes."""

    announced = staged = 0.0
    """When the last of these were nearly staged, and staged, on the monotonic clock."""

    def stage_weights(self, source: WeightSource, version: int) -> None:
        if isinstance(source, DeviceWeights):
            announce = source.nearly_staged

            def noted() -> None:
                announce()
                SyncedWorker.announced = time.monotonic()

            LocalWorker.stage_weights(self, replace(source, nearly_staged=noted), version)
            SyncedWorker.staged = time.monotonic()
        else:
            super().stage_weights(source, version)


class Trainer:
    """The process of `sync_trainer.py`."""

    def __init__(self, model: str, buffers: int) -> None:
        script = str(Path(__file__).with_name("sync_trainer.py"))
        self._process = subprocess.Popen(
            [sys.executable, script, model, str(buffers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.facts = self._answer()

    def publish(self, version: int) -> tuple[PublishedDeviceWeights, Row]:
        """The publication, and the clock when it was begun, published and received."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"%d\n" % version)
        self._process.stdin.flush()
        answer = self._answer()
        published = PublishedDeviceWeights.from_bytes(self._process.stdout.read(answer.pop("size")))
        return published, answer | {"received": time.monotonic()}

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(b"{"):
                answer: Row = json.loads(line)
                return answer
        raise RuntimeError("the trainer has ended")


@contextmanager
def running(engine: RolloutEngine, sequences: int) -> Iterator[None]:
    """That many sequences decode inside; what is left of them is aborted at the end."""
    if not sequences:
        yield
        return
    prompts = list(np.random.default_rng(sequences).integers(10, 1000, (sequences, PROMPT)).astype(np.int32))
    call = engine.submit(prompts, SamplingParams(max_tokens=OUTPUT, ignore_eos=True, seed=1))
    try:
        wait_for_steps(engine, 30)
        yield
    finally:
        engine.abort_all()
        call.future.result()


def update(engine: RolloutEngine, trainer: Trainer, version: int, sequences: int) -> Row:
    """Milliseconds of one update, and what the steps around it tell."""
    worker = TimedWorker.latest
    calm = len(worker.log)  # before the trainer uses the GPU
    published, answer = trainer.publish(version)
    engine.update_weights(published, mode="keep", kv="keep")
    done = time.monotonic()
    if sequences:
        wait_for_steps(engine, 12)
    clock = [answer["begun"], answer["published"], answer["received"], SyncedWorker.staged, done]
    spans = [1e3 * (end - begin) for begin, end in itertools.pairwise(clock)]
    row = dict(zip(("publish_ms", "transfer_ms", "stage_ms", "commit_ms"), spans, strict=True))
    row |= {"total_ms": sum(spans), "announced_before_ms": 1e3 * (SyncedWorker.staged - SyncedWorker.announced)}
    return row | pauses(worker.log, calm, answer["begun"])


def pauses(log: list[Any], calm: int, begun: float) -> Row:
    """The longest time between two steps from `begun` on, and the longest step, over the medians before `calm`.

    `begun` is on the clock of the steps' starts; the last step before it counts, too.
    """
    log = log[: max(0, len(log) - UNDER_WAY)]
    usual = log[max(0, calm - 20) : calm]
    around = log[max(0, sum(step[2] < begun for step in log) - 1) :]
    if len(usual) < 10 or len(around) < 3:
        return {}
    usual_span, usual_gap = (statistics.median(times) for times in _spans_and_gaps(usual))
    spans, gaps = _spans_and_gaps(around)
    return {"paused_ms": max(gaps) - usual_gap, "longest_step_over_median_ms": max(spans) - usual_span}


def _spans_and_gaps(steps: list[Any]) -> tuple[list[float], list[float]]:
    """Milliseconds of each step on the GPU, and between each two."""
    spans = [milliseconds(step[3], step[4]) for step in steps]
    return spans, [milliseconds(a[4], b[3]) for a, b in itertools.pairwise(steps)]


def floor_ms(size: int, buffers: int) -> float:
    return 1e3 * size * (6 if buffers else 4) / BANDWIDTH


def sync_rows(
    folder: Path, make_engine: Any, models: tuple[str, ...], sizes: tuple[int, ...], updates: int
) -> list[Row]:
    """Medians over `updates` updates per model, form (in place, two buffers) and number of sequences that run."""
    forms = [(model, buffers) for model in models for buffers in ((0, 2) if model == "A" else (0,))]
    return [row for form in forms for row in _rows_of(folder, make_engine, *form, sizes, updates)]


def _rows_of(
    folder: Path, make_engine: Any, model: str, buffers: int, sizes: tuple[int, ...], updates: int
) -> Iterator[Row]:
    trainer = Trainer(model, buffers)
    options = {"kv_cache_bytes": 8 << 30, "max_num_seqs": 256, "make_worker": SyncedWorker}
    with make_engine(model_folder(model, folder / model), **options) as engine:
        versions = itertools.count(1)
        for sequences in sizes:
            made: list[Row] = []
            for number in range(WARM_UPDATES + updates):
                with running(engine, sequences):
                    made.append(update(engine, trainer, next(versions), sequences))
                print(f"{model} buffers={buffers} sequences={sequences} #{number} {json.dumps(made[-1])}", flush=True)
            yield {
                "model": model, "buffers": buffers, "sequences": sequences, **trainer.facts,
                "floor_ms": round(floor_ms(trainer.facts["bytes"], buffers), 3),
                "first_update_ms": round(made[0]["total_ms"], 1), **_medians(made[WARM_UPDATES:]),
            }  # fmt: skip
    trainer.close()


def _medians(rows: list[Row]) -> Row:
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: round(statistics.median(row[key] for row in rows if key in row), 3) for key in keys}


def wait_for_steps(engine: RolloutEngine, count: int) -> None:
    """Return after that many steps from now on."""
    done, left = threading.Event(), iter(range(count - 1))
    end = engine.watch_steps(lambda: done.set() if next(left, None) is None else None)
    try:
        if not done.wait(120):
            raise RuntimeError("nothing is computed")
    finally:
        end()
