"""What a decode step costs the host, with the model's compute taken out.

    python benchmarks/host_step.py --json                       the last line is one JSON object
    python benchmarks/host_step.py --against TREE --json        beside another checkout, run in turns, with ratios

64, 256 and 512 sequences (samples of prompts of 256 tokens, 8 of each) decode at full rate, logprobs returned, steps
launched ahead: by an engine loop over one rank in the process, one rank in a process of its own, and two ranks in
processes, which share the sequences. Ranks are real processes behind real channels; each packs a step's arrays as for
a GPU (where Triton can be imported), and answers at once with figures that it had before.

Microseconds of CPU time of the loop's thread per step, means over 16 steps (each sequence gets a block once), of these
the median:

plan      `Scheduler.plan_ahead`
orders    arrays for the ranks
send      handing them over: encoding; in the process the packing
take      waiting for results: decoding
update    results -> requests
rest      the loop, its meters, delivery
host      all of it
rank      of a rank's process (the mean of ranks): decoding, packing, encoding; with `packing` of it
period    wall time per step

The floor that is stated first: one pass in Python over the sequences that asks a set whether a token ends them and
appends it to a list, once per step. Nothing of a step's Python that touches each sequence can be faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from zerokl.kernels.ops import SampleResult, StepInputs
from zerokl.rollout import worker_child, worker_process
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.control import Call, WeightSets
from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.scheduler_config import SchedulerConfig
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.step_plan import StepPlan
from zerokl.rollout.stop import StopStrings
from zerokl.rollout.worker_link import RankProcesses

BLOCK, PROMPT, SAMPLES, WINDOW = 16, 256, 8, 16
ENGINES = {"inprocess": 0, "one_process": 1, "two_processes": 2}
"""Ranks that are processes, of each engine."""
STAGES = ("plan", "orders", "send", "take", "update")

try:
    from zerokl.kernels.gpu.attention_tiles import attention_tiles, share_prefixes
    from zerokl.kernels.gpu.step_arrays import bucket, lay_out
except ImportError:  # no Triton: nothing is packed
    PACKS = False
else:
    PACKS = True


# -- a rank ------------------------------------------------------------------------------------------------------------
def pack(inputs: StepInputs) -> None:
    """What `GpuOps.begin_step` makes of a step on the host."""
    singles, chunks = attention_tiles(inputs.seq_starts, inputs.context_lens, 64)
    shared = share_prefixes(singles, inputs.block_tables, BLOCK, 8, 64)
    if len(shared):
        shared = np.pad(shared, ((0, bucket(len(singles)) // 2 - len(shared)), (0, 0)))
    lay_out(inputs, single_tiles=singles, chunk_tiles=chunks, shared_tiles=shared)


class CannedWorker:
    """Packs steps, and answers with figures that it has."""

    def __init__(self, config: EngineConfig | None = None, place: object = None) -> None:
        self.packing = 0.0
        numbers = np.random.default_rng(0)
        self.tokens = numbers.integers(100, 30_000, (64, 1024)).astype(np.int32)
        self.figures = numbers.random((3, 1024)).astype(np.float32)

    def begin(self, order: StepOrder) -> CannedStep:
        start = time.thread_time()
        if PACKS:
            pack(order.inputs)
        self.packing += time.thread_time() - start
        return CannedStep(self, order.inputs.step, len(order.inputs.logit_rows))

    def describe(self) -> dict[str, Any]:
        return {"seconds": time.thread_time(), "packing": self.packing, "versions": {}}


class CannedStep:
    """A step that is done."""

    def __init__(self, worker: CannedWorker, step: int, rows: int) -> None:
        self.worker, self.step, self.rows = worker, step, rows

    def result(self) -> StepResult:
        tokens, figures = self.worker.tokens[self.step % 64, : self.rows], self.worker.figures[:, : self.rows].copy()
        sampled = SampleResult(
            tokens=tokens.copy(), logprobs=figures[0], policy_logprobs=figures[1], entropy=figures[2]
        )
        return StepResult(sampled=sampled)


def install() -> None:
    """In a rank's process, before its `main`."""
    worker_process.LocalWorker = CannedWorker  # type: ignore[assignment, misc]


class RankInProcess:
    """`OverlappingRanks` of one canned worker."""

    size = 1

    def __init__(self) -> None:
        self.worker = CannedWorker()

    def begin(self, orders: Sequence[StepOrder]) -> Callable[[], list[StepResult]]:
        (order,) = orders
        step = self.worker.begin(order)
        return lambda: [step.result()]

    def describe(self) -> list[dict[str, Any]]:
        return [self.worker.describe()]

    def close(self) -> None: ...


def ranks_in_processes(number: int) -> RankProcesses:
    main = "from zerokl.rollout.worker_process"
    canned = f"sys.path.append({str(Path(__file__).parent)!r}); import host_step; host_step.install(); "
    worker_child._BOOT = worker_child._BOOT.replace(main, canned + main, 1)
    config = EngineConfig(model="unused", worker="process", data_parallel_size=number, num_blocks=1)
    return RankProcesses(config)


# -- the loop's thread -------------------------------------------------------------------------------------------------
class Clock:
    """CPU time of the loop's thread, by stage, up to each step."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)
        self.steps: list[tuple[float, float, dict[str, float]]] = []

    def timed(self, stage: str, call: Callable[..., Any], *args: Any) -> Any:
        start = time.thread_time()
        value = call(*args)
        self.spent[stage] += time.thread_time() - start
        return value

    def end_step(self, _: Sequence[StepResult]) -> None:
        self.steps.append((time.perf_counter(), time.thread_time(), dict(self.spent)))


class TimedScheduler(Scheduler):
    """Tells a clock how long it takes, and when the step comes at which all decode."""

    timer: Clock
    planned = 0.0

    def plan_ahead(self, plan: StepPlan, now: float) -> StepPlan | None:
        ahead: StepPlan | None = self.timer.timed("plan", super().plan_ahead, plan, now)
        self.planned = time.thread_time()
        return ahead

    def update(self, plan: StepPlan, results: Sequence[StepResult], ahead: StepPlan | None = None) -> list[Request]:
        finished: list[Request] = self.timer.timed("update", super().update, plan, results, ahead)
        return finished


def microseconds(engine: str, sequences: int, windows: int) -> dict[str, float]:
    """Figures of one engine, by the names above."""
    processes = ENGINES[engine]
    ranks: Any = ranks_in_processes(processes) if processes else RankInProcess()
    steps, size = (windows + 2) * WINDOW, max(1, processes)
    config = SchedulerConfig(max_num_seqs=sequences // size, max_num_batched_tokens=1 << 16, max_group_imbalance=0.0)
    blocks = sequences // size * (steps // BLOCK + 2) + sequences * PROMPT // BLOCK
    scheduler = TimedScheduler(config, [KVCacheManager(blocks, BLOCK) for _ in range(size)])
    scheduler.timer = clock = Clock()
    scheduler.set_weights("policy", epoch=1, version=0)

    def begin(orders: Sequence[StepOrder]) -> Callable[[], list[StepResult]]:
        clock.spent["orders"] += time.thread_time() - scheduler.planned
        wait: Callable[[], list[StepResult]] = clock.timed("send", ranks.begin, orders)
        return lambda: clock.timed("take", wait)

    loop = EngineLoop(
        scheduler,
        ranks,
        WeightSets(ranks, scheduler),
        StopStrings(None),
        BLOCK,
        lambda: None,
        begin_step=begin,
        after_step=clock.end_step,
    )
    numbers = np.random.default_rng(1)
    params = SamplingParams(max_tokens=steps, n=SAMPLES)
    groups = {}
    for number in range(sequences // SAMPLES):
        tokens, name = numbers.integers(0, 30_000, PROMPT), f"generate-{number}"
        groups[name] = [
            Request.generate(f"{name}/{i}", tokens, params, seed=number, sample_index=i, group_id=name)
            for i in range(SAMPLES)
        ]
    call = Call(groups)
    before = ranks.describe()
    loop.submit(call)
    loop.start()
    call.future.result()
    after = loop.at_boundary(ranks.describe).result()
    loop.close()
    found = summary(clock, (before, after), windows)
    if not processes:
        del found["rank"]  # it has no thread of its own
    return found


def summary(clock: Clock, marks: Sequence[list[dict[str, Any]]], windows: int) -> dict[str, float]:
    """Of the last windows but one: by then all sequences decode, and none ends."""
    ends = clock.steps[-(windows + 1) * WINDOW - 1 : -WINDOW + 1 : WINDOW]
    figures: dict[str, list[float]] = {name: [] for name in (*STAGES, "rest", "host", "period")}
    for (wall, cpu, spent), (next_wall, next_cpu, next_spent) in pairwise(ends):
        parts = {stage: next_spent[stage] - spent[stage] for stage in STAGES}
        parts |= {"host": next_cpu - cpu, "period": next_wall - wall, "rest": next_cpu - cpu - sum(parts.values())}
        for name, seconds in parts.items():
            figures[name].append(seconds / WINDOW * 1e6)
    found = {name: round(statistics.median(values), 1) for name, values in figures.items()}
    for name, key in (("rank", "seconds"), ("packing", "packing")):
        spans = [after[key] - before[key] for before, after in zip(*marks, strict=True)]
        found[name] = round(statistics.mean(spans) / len(clock.steps) * 1e6, 1)
    return found


def floor_us(sequences: int) -> float:
    """See above."""
    stops = [frozenset({2})] * sequences
    outputs: list[list[int]] = [[] for _ in range(sequences)]
    tokens, times = list(range(100, 100 + sequences)), []
    for _ in range(50):
        start = time.thread_time()
        for token, stop, output in zip(tokens, stops, outputs, strict=True):
            if token not in stop:
                output.append(token)
        times.append(time.thread_time() - start)
    return round(statistics.median(times) * 1e6, 1)


# -- several runs ------------------------------------------------------------------------------------------------------
def measure(arguments: Sequence[str], tree: Path | None) -> dict[str, Any]:
    """The figures of this file in a fresh process, over the sources of another checkout if one is given."""
    environment = dict(os.environ)
    if tree is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(tree / ".links"), str(tree / "benchmarks")])
    done = subprocess.run(
        [sys.executable, __file__, "--json", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of runs of both checkouts, taken in turns for each engine and size, and this one's over the other's."""
    facts: dict[str, Any] = {}
    for engine in options.engines:
        for count in options.sequences:
            arguments = ["--engines", engine, "--sequences", str(count), "--windows", str(options.windows)]
            runs = [[measure(arguments, tree) for tree in (None, options.against)] for _ in range(options.runs)]
            key = f"{engine}_{count}"
            facts.setdefault("floor_us", {})[str(count)] = runs[0][0]["floor_us"][str(count)]
            for name in runs[0][0][key]:
                here, there = (statistics.median(run[side][key][name] for run in runs) for side in (0, 1))
                facts[f"{key}_{name}"] = [round(here), round(there), round(here / max(there, 0.1), 2)]
            if not options.json:
                print(key, {name[len(key) + 1 :]: fact for name, fact in facts.items() if key in name}, flush=True)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--sequences", nargs="+", type=int, default=[64, 256, 512])
    parser.add_argument("--windows", type=int, default=12, help="of 16 steps each (default 12)")
    parser.add_argument("--against", type=Path, help="a checkout whose .links holds its rooms as zerokl")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs with --against (default 3)")
    options = parser.parse_args()
    if options.against is not None:
        facts = compared(options)
    else:
        facts = {"floor_us": {str(count): floor_us(count) for count in options.sequences}, "packs": PACKS}
        if not options.json:
            print("floor, us per step:", facts["floor_us"], flush=True)
        for engine in options.engines:
            for count in options.sequences:
                facts[f"{engine}_{count}"] = microseconds(engine, count, options.windows)
                if not options.json:
                    print(f"{engine}_{count}", facts[f"{engine}_{count}"], flush=True)
    print(json.dumps({**facts, **machine()}))


def machine() -> dict[str, Any]:
    """Facts of the machine, where ZeroKL is installed; a folder of links is enough to run."""
    from importlib.metadata import PackageNotFoundError

    from machine_facts import machine_facts

    try:
        return machine_facts()
    except PackageNotFoundError:
        return {}


if __name__ == "__main__":
    main()
