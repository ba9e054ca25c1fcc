"""What the scheduler costs: a plan for 1,024 running requests on 8 ranks, intake while planning, delivery of results.

    python benchmarks/scheduler.py --json          the last line is one JSON object

`plan_ms_*`: median over steps of `Scheduler.plan`, snapshot and commit included, with 10,000 and 100,000 waiting;
`plan_p99_ms_*`: of the same steps. Before each step some waiting and running requests are aborted, so that others join:
those at the head need more blocks than are free, those behind them hit cached prefixes. `intake_per_s`: requests from
another thread through `EngineLoop.submit` into the scheduler, while the loop plans and steps as fast as it can (no
model: ranks answer with constants). `result_p99_ms`: from the end of the forward that finished a request to the moment
its caller's thread has it, while a head that needs a whole pool waits.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from machine_facts import machine_facts

from zerokl.kernels.ops import SampleResult
from zerokl.rollout.config import SchedulerConfig
from zerokl.rollout.control import Call, WeightSets
from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.step_plan import StepPlan
from zerokl.rollout.stop import StopStrings

RANKS, RUNNING, BLOCK = 8, 1024, 16
SHARED = list(range(256))
"""A beginning that many prompts have in common."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--steps", type=int, default=300, help="steps planned per figure (default 300)")
    options = parser.parse_args()
    facts: dict[str, Any] = {}
    for name, waiting in (("10k", 10_000), ("100k", 100_000)):
        times = plan_times(waiting, options.steps)
        facts[f"plan_ms_{name}_waiting"] = round(float(np.median(times)) * 1e3, 3)
        facts[f"plan_p99_ms_{name}_waiting"] = round(float(np.percentile(times, 99)) * 1e3, 3)
    facts["intake_per_s"] = round(intake_per_second(20_000))
    facts["result_p99_ms"] = round(float(np.percentile(delivery_times(400), 99)) * 1e3, 3)
    if not options.json:
        for key, value in facts.items():
            print(f"{key:28} {value}")
    print(json.dumps({**facts, **machine_facts()}))


# -- plans -------------------------------------------------------------------------------------------------------------
def plan_times(num_waiting: int, num_steps: int) -> list[float]:
    """Seconds of each plan, commit included."""
    scheduler, numbers = crowded_scheduler(num_waiting), np.random.default_rng(1)
    times, number = [], 0
    gc.collect()
    gc.freeze()  # a full collection over 100,000 requests is not the scheduler's
    for _ in range(num_steps):
        running = [request for request in scheduler.requests.values() if request.rank >= 0]
        waiting = [request_id for request_id in list(scheduler.requests)[-64:] if request_id[0] == "w"]
        for request in numbers.choice(np.array(running, object), 4, replace=False):
            scheduler.abort(request.request_id)
        for request_id in waiting[:2]:
            scheduler.abort(request_id)
        while scheduler.num_waiting < num_waiting:
            scheduler.add(prompt(f"w{num_waiting + number}", number))
            number += 1
        start = time.perf_counter()
        plan = scheduler.plan(0.0)
        times.append(time.perf_counter() - start)
        assert isinstance(plan, StepPlan)
        scheduler.update(plan, answers(plan))
    refused = {name: count for name, count in scheduler.metrics().items() if name.startswith("refused_") and count}
    assert refused["refused_blocks"] and scheduler.metrics()["cached_tokens"], "nothing was blocked or hit the cache"
    gc.unfreeze()
    return times


def crowded_scheduler(num_waiting: int) -> Scheduler:
    """1,024 running requests over 8 ranks, and so many waiting, of which the first need more blocks than are free."""
    slots = RUNNING // RANKS
    config = SchedulerConfig(max_num_seqs=slots, max_num_batched_tokens=2048, max_overtakes=1 << 30)
    scheduler = Scheduler(config, [KVCacheManager(slots * 40, BLOCK) for _ in range(RANKS)])
    scheduler.set_weights("policy", epoch=1, version=0)
    for number in range(RUNNING):
        scheduler.add(prompt(f"r{number}", number, max_tokens=100_000))
    while scheduler.num_waiting:
        step(scheduler)
    for number in range(8):
        tokens = np.random.default_rng(number).integers(1000, 2000, slots * 36 * BLOCK)
        scheduler.add(Request.generate(f"head{number}", tokens, SamplingParams(), seed=0))
    for number in range(num_waiting):
        scheduler.add(prompt(f"w{number}", number))
    return scheduler


def prompt(request_id: str, number: int, max_tokens: int = 64) -> Request:
    tokens = [*SHARED, *(1000 + (number * 7 + i) % 997 for i in range(64 + number % 128))]
    return Request.generate(request_id, tokens, SamplingParams(max_tokens=max_tokens), seed=number)


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan(0.0)
    assert isinstance(plan, StepPlan)
    scheduler.update(plan, answers(plan))
    return plan


def answers(plan: StepPlan) -> list[StepResult]:
    return [StepResult(sampled=sampled(rank.num_rows)) for rank in plan.ranks]


def sampled(num_rows: int) -> SampleResult:
    figures = np.zeros(num_rows, np.float32)
    tokens = np.full(num_rows, 5, np.int32)
    return SampleResult(tokens=tokens, logprobs=figures, policy_logprobs=figures, entropy=figures)


# -- the engine's loop, without a model --------------------------------------------------------------------------------
class ConstantRanks:
    """Ranks that sample one token for ever; `ended` is when the last forward was done."""

    def __init__(self) -> None:
        self.ended = 0.0

    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        results = [StepResult(sampled=sampled(len(order.inputs.logit_rows))) for order in orders]
        self.ended = time.perf_counter()
        return results

    def close(self) -> None:
        pass


def start_loop(max_num_seqs: int, num_blocks: int) -> tuple[EngineLoop, ConstantRanks]:
    config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=2048)
    scheduler = Scheduler(config, [KVCacheManager(num_blocks, BLOCK) for _ in range(RANKS)])
    scheduler.set_weights("policy", epoch=1, version=0)
    ranks: Any = ConstantRanks()
    loop = EngineLoop(scheduler, ranks, WeightSets(ranks, scheduler), StopStrings(None), BLOCK, lambda: None)
    loop.start()
    return loop, ranks


def call(*requests: Request) -> Call:
    return Call({request.request_id: [request] for request in requests})


def intake_per_second(num_requests: int) -> float:
    """Requests per second through `submit`, while 256 others decode."""
    loop, _ = start_loop(32, 4096)
    background = call(*(prompt(f"r{number}", number, max_tokens=60_000 // 32) for number in range(32 * RANKS)))
    loop.submit(background)
    requests = [prompt(f"w{number}", number) for number in range(num_requests)]
    start = time.perf_counter()
    for first in range(0, num_requests, 8):
        loop.submit(call(*requests[first : first + 8]))
    loop.at_boundary(lambda: None).result()
    while loop.num_held:
        loop.at_boundary(lambda: None).result()
    seconds = time.perf_counter() - start
    loop.close()
    return num_requests / seconds


def delivery_times(num_requests: int) -> list[float]:
    """Seconds from the forward that ends a request to its caller, behind a head that needs a whole pool."""
    loop, ranks = start_loop(32, 512)
    holders = [prompt(f"hold{number}", number, max_tokens=3000) for number in range(RANKS)]
    loop.submit(call(*holders))
    loop.at_boundary(lambda: None).result()
    loop.submit(call(Request.generate("head", [7] * (512 * BLOCK - 64), SamplingParams(), seed=0)))
    times = []
    for number in range(num_requests):
        small = call(Request.generate(f"small{number}", [1, 2, 3], SamplingParams(max_tokens=1), seed=0))
        ended: list[float] = []
        small.future.add_done_callback(lambda _, ended=ended: ended.append(ranks.ended))
        loop.submit(small)
        small.future.result()
        times.append(time.perf_counter() - ended[0])
    loop.close()
    return times


if __name__ == "__main__":
    main()
