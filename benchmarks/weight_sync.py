"""From a trainer's arrays to an engine that samples with them, beside one memcpy of the same bytes in the same run.

    python benchmarks/weight_sync.py --json [--sizes 135m,0.6b,1.7b] [--rounds 5] [--threads 1]

Seconds are medians of the rounds. All pages were touched by rounds before; the first publication is told apart.

- `memcpy_s`: one thread copies `bytes_moved` bytes, piece by piece. `publish_s`: the trainer's part with its checksums.
  `sync_s`: that and `update_weights` of an engine that nobody uses (checksums, packing, commit).
- `pause_*_ms`: while eight sequences decode, from the end of the last step on the old version to the start of the first
  on the new one, less the ordinary gap. `staging_throughput`: steps per second while staging, over undisturbed.
  `recompute_ms`: with kv="recompute", the time of the steps that compute old tokens' keys and values again.

The worker is a process (but for "inproc"). The share of "delta" is 2 per cent of the tensors' bytes. 1.7b is published
as bfloat16 alone, through one segment: float32 would not fit 24 GiB, and so would no file beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from machine_facts import machine_facts
from weight_models import MODELS, Tensors, made_up_weights, some_changed

from zerokl.kernels.dispatch import fill_weights
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import num_parameters
from zerokl.rollout.ranks import Ranks, make_ranks
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.weight_source import FolderWeights, SharedWeights, TensorWeights, WeightSource
from zerokl.weight_sync import WeightPublisher, publish_file

SEQUENCES, WARM_STEPS = 8, 8
DELTA_SHARE = 0.02
COPIED = 256 << 20


@dataclass
class Record:
    """What a worker did, in seconds of `perf_counter`."""

    steps: list[tuple[float, float, int]] = field(default_factory=list)
    """(start, end, tokens)"""
    staging: tuple[float, float] = (0.0, 0.0)
    commit: int = 0
    """Steps before it."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_steps(self, count: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: len(self.steps) >= count)


class RecordingWorker:
    """The one rank of an engine as its worker, which notes what it does. The folder to load at the start is `first`."""

    def __init__(self, ranks: Ranks, record: Record, first: WeightSource) -> None:
        self._ranks, self._record, self._first = ranks, record, first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ranks, name)  # what needs no noting

    def execute(self, order: StepOrder) -> StepResult:
        start = perf_counter()
        (result,) = self._ranks.execute([order])
        with self._record.changed:
            self._record.steps.append((start, perf_counter(), len(order.inputs.token_ids)))
            self._record.changed.notify_all()
        return result

    def stage_weights(self, source: WeightSource, version: int) -> None:
        start = perf_counter()
        self._ranks.stage_weights(self._first if isinstance(source, FolderWeights) else source, version)
        self._record.staging = (start, perf_counter())

    def commit_weights(self) -> None:
        self._record.commit = len(self._record.steps)
        self._ranks.commit_weights()

    def describe(self) -> dict[str, Any]:
        return self._ranks.describe()[0]


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = action()
    return perf_counter() - start, result


def memcpy_seconds(nbytes: int) -> float:
    """Of that many bytes, between two pieces of memory that no cache holds."""
    size = min(nbytes, COPIED)
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    return min(timed(lambda: np.copyto(target, source))[0] for _ in range(3)) * nbytes / size


class Bench:
    """One engine and one publisher; a row for each way from one to the other."""

    def __init__(self, tensors: Tensors, publisher: WeightPublisher, engine: RolloutEngine, record: Record) -> None:
        self.tensors, self.publisher, self.engine, self.record = tensors, publisher, engine, record
        self.path = Path(engine.config.model) / "published.safetensors"
        self.first_publish: dict[str, float] = {}

    def publish(self, transport: str, dtype: Any) -> Any:
        version = self.engine.get_weight_version() + 1
        if transport == "inproc":
            return self.tensors
        if transport == "disk":
            return publish_file(self.path, self.tensors, version, dtype=dtype, fill=fill_weights)
        if transport == "delta":
            return self.publisher.publish_delta(some_changed(self.tensors, DELTA_SHARE), version)
        return self.publisher.publish(self.tensors, version, dtype=dtype)

    def row(self, transport: str, dtype: Any, rounds: int) -> dict[str, Any]:
        first, _ = timed(lambda: self.publish("shm" if transport == "delta" else transport, dtype))
        for _ in range(3):  # both buffers, and both sets of packed weights
            source = self.publish("shm" if transport == "delta" else transport, dtype)
            self.engine.update_weights(source)
        moved = some_changed(self.tensors, DELTA_SHARE) if transport == "delta" else self.tensors
        nbytes = sum(array.nbytes for array in moved.values()) // (2 if dtype else 1)
        published, synced, copied, beside = [], [], [], []
        for _ in range(rounds):
            copied.append(memcpy_seconds(nbytes))
            seconds, source = timed(lambda: self.publish(transport, dtype))
            published.append(seconds)
            synced.append(seconds + timed(lambda source=source: self.engine.update_weights(source))[0])
            beside.append(self.beside_steps(self.publish(transport, dtype), "keep"))
        again = self.beside_steps(self.publish(transport, dtype), "recompute")
        publish_s, sync_s, memcpy_s = (statistics.median(values) for values in (published, synced, copied))
        pauses = [one["pause_ms"] for one in beside]
        return {
            "transport": transport,
            "dtype": dtype or "float32",
            "publish_s": publish_s,
            "sync_s": sync_s,
            "memcpy_s": memcpy_s,
            "publish_ratio": publish_s / memcpy_s,
            "sync_ratio": sync_s / memcpy_s,
            "pause_p50_ms": float(np.percentile(pauses, 50)),
            "pause_p99_ms": float(np.percentile(pauses, 99)),
            "staging_throughput": statistics.median(one["throughput"] for one in beside),
            "recompute_ms": again["recompute_ms"],
            "first_publish_s": first,
            "bytes_moved": nbytes,
        }

    def beside_steps(self, source: Any, kv: Any) -> dict[str, float]:
        """One update of a busy engine."""
        record = self.record
        record.steps.clear()
        params = SamplingParams(max_tokens=900, seed=1, ignore_eos=True)
        prompts = [[7 + index, 3, 5] for index in range(SEQUENCES)]
        calling = threading.Thread(target=self.engine.generate, args=(prompts, params))
        calling.start()
        record.wait_for_steps(2 * WARM_STEPS)
        self.engine.update_weights(source, mode="keep", kv=kv)
        record.wait_for_steps(record.commit + 4)
        self.engine.abort_all()
        calling.join()
        return summary(record)


def summary(record: Record) -> dict[str, float]:
    steps, commit, (begin, end) = record.steps, record.commit, record.staging
    quiet = [step for step in steps if step[1] <= begin][WARM_STEPS // 2 :]
    gap = statistics.median(after[0] - before[1] for before, after in pairwise(quiet))
    per_step = (quiet[-1][1] - quiet[0][0]) / len(quiet)
    staging = [step for step in steps if begin <= step[0] and step[1] <= end]
    span = staging[-1][1] - staging[0][0] if staging else 0.0
    again = [end - start for start, end, tokens in steps[commit:] if tokens > SEQUENCES]
    return {
        "pause_ms": 1e3 * max(0.0, steps[commit][0] - steps[commit - 1][1] - gap),
        "throughput": len(staging) * per_step / span if span else 1.0,
        "recompute_ms": 1e3 * sum(again),
    }


@contextmanager
def bench_of(model: str, worker: str, args: argparse.Namespace) -> Iterator[Bench]:
    config = ModelConfig.from_json(MODELS[model])
    tensors, record = made_up_weights(config), Record()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
        options = EngineConfig(
            model=folder,
            num_blocks=SEQUENCES * 64,
            max_model_len=1024,
            num_threads=args.threads,
            worker=worker,  # type: ignore[arg-type]
        )
        large = model == "1.7b"
        with WeightPublisher("bench", buffers=1 if large else 2, fill=fill_weights) as publisher:
            first: WeightSource = TensorWeights(tensors=tensors)
            if large:  # arrays would go to the worker's process through a float32 segment of their own
                first = SharedWeights(published=publisher.publish(tensors, 0, dtype="bfloat16"))
            with RolloutEngine(
                options, make_worker=lambda given: RecordingWorker(make_ranks(given), record, first)
            ) as engine:
                yield Bench(tensors, publisher, engine, record)


def rows_of(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    facts = {"model": model, "params": num_parameters(ModelConfig.from_json(MODELS[model]))}
    rounds = max(2, args.rounds // 2) if model == "1.7b" else args.rounds
    ways = [("process", "shm", None), ("process", "disk", None), ("process", "delta", None)]
    ways += [("process", "shm", "bfloat16"), ("process", "disk", "bfloat16"), ("process", "delta", "bfloat16")]
    ways += [("inprocess", "inproc", None)]
    if model == "1.7b":
        ways = [way for way in ways if way[2] and way[1] != "disk"]
    rows = []
    for worker in dict.fromkeys(way[0] for way in ways):
        with bench_of(model, worker, args) as bench:
            for _, transport, dtype in (way for way in ways if way[0] == worker):
                rows.append(facts | bench.row(transport, dtype, rounds))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="accepted by every benchmark; the last line is JSON anyway")
    parser.add_argument("--sizes", default="135m,0.6b,1.7b", help=f"some of {','.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="of the engine's kernels; the trainer's part has one")
    args = parser.parse_args()
    sizes = args.sizes.split(",")
    if unknown := set(sizes) - MODELS.keys():
        parser.error(f"--sizes: {sorted(unknown)} are not among {list(MODELS)}")
    rows = [row for size in sizes for row in rows_of(size, args)]
    print(json.dumps({"rows": rows, **machine_facts()}))


if __name__ == "__main__":
    main()
