"""What the scheduler costs: a plan for 1,024 running requests on 8 ranks, intake while planning, delivery of results.

    python benchmarks/scheduler.py --json          the last line is one JSON object

`plan_ms_*`: median over steps of `Scheduler.plan`, snapshot and commit included, with 10,000 and 100,000 waiting;
`plan_p99_ms_*`: of the same steps. `orders_ms_*`, `update_ms_*`: the controller's other work of a step. Before each
step some waiting and running requests are aborted, so that others join: those at the head need more blocks than are
free, those behind them hit cached prefixes. The garbage collector is as an engine has it.

There is no model: ranks answer with constants. `intake_per_s`: requests from another thread through `EngineLoop.submit`
into the scheduler, while the loop plans and steps 256 others as fast as it can. Then requests are due 10,000 times per
second, handed over 8 at a time beside 1,024 that decode: `paced_intake_per_s` is the rate at which they come into the
scheduler, the slope of their number over time, `paced_lag_*_ms` how long after they were due (a step or so, if the loop
keeps up), `paced_submit_p99_ms` what a hand-over takes and `paced_plan_ms` the loop's plans meanwhile (both wait for
the interpreter too).
`result_p99_ms`: from the end of the forward that finished a request to the moment its caller's thread has it, while a
head that needs a whole pool waits; forwards take 2 ms, in which the interpreter is free, as it is while kernels run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from machine_facts import machine_facts
from numpy.typing import NDArray

from zerokl.kernels.ops import SampleResult
from zerokl.rollout.control import Call, WeightSets
from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.kv_cache import KVCacheManager
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.scheduler_config import SchedulerConfig
from zerokl.rollout.step_inputs import build_step_orders
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.step_plan import Hold, StepPlan
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
        plans, orders, updates = step_times(waiting, options.steps)
        facts[f"plan_ms_{name}_waiting"] = milliseconds(plans)
        facts[f"plan_p99_ms_{name}_waiting"] = milliseconds(plans, 99)
        facts[f"orders_ms_{name}_waiting"] = milliseconds(orders)
        facts[f"update_ms_{name}_waiting"] = milliseconds(updates)
    facts["intake_per_s"] = round(intake_per_second(20_000))
    facts |= paced_intake(10_000, seconds=3)
    facts["result_p99_ms"] = milliseconds(delivery_times(400), 99)
    if not options.json:
        for key, value in facts.items():
            print(f"{key:28} {value}")
    print(json.dumps({**facts, **machine_facts()}))


def milliseconds(seconds: Sequence[float] | NDArray[np.float64], percentile: float = 50) -> float:
    return round(float(np.percentile(seconds, percentile)) * 1e3, 3)


# -- plans -------------------------------------------------------------------------------------------------------------
def step_times(num_waiting: int, num_steps: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each step's plan (commit included), orders and update."""
    scheduler, numbers = crowded_scheduler(num_waiting), np.random.default_rng(1)
    plans, orders, updates, number = [], [], [], 0
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
        planned = time.perf_counter()
        assert isinstance(plan, StepPlan)
        build_step_orders(plan, scheduler.requests, BLOCK)
        built, results = time.perf_counter(), answers(plan)
        answered = time.perf_counter()
        scheduler.update(plan, results)
        plans.append(planned - start)
        orders.append(built - planned)
        updates.append(time.perf_counter() - answered)
    refused = {name: count for name, count in scheduler.metrics().items() if name.startswith("refused_") and count}
    assert refused["refused_blocks"] and scheduler.metrics()["cached_tokens"], "nothing was blocked or hit the cache"
    return plans, orders, updates


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

    def __init__(self, forward_seconds: float) -> None:
        self.ended = 0.0
        self._forward_seconds = forward_seconds

    def execute(self, orders: Sequence[StepOrder]) -> list[StepResult]:
        if self._forward_seconds:
            time.sleep(self._forward_seconds)
        results = [StepResult(sampled=sampled(len(order.inputs.logit_rows))) for order in orders]
        self.ended = time.perf_counter()
        return results

    def close(self) -> None:
        pass


class TimedScheduler(Scheduler):
    """Keeps the seconds of each plan, and when each request came in."""

    plan_times: list[float]
    added_at: list[float]

    def add(self, request: Request, now: float = 0.0) -> None:
        super().add(request, now)
        self.added_at.append(time.perf_counter())

    def plan(self, now: float) -> StepPlan | Hold | None:
        start = time.perf_counter()
        plan = super().plan(now)
        self.plan_times.append(time.perf_counter() - start)
        return plan


def start_loop(
    max_num_seqs: int, num_blocks: int, forward_seconds: float = 0.0
) -> tuple[EngineLoop, TimedScheduler, ConstantRanks]:
    config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=2048)
    scheduler = TimedScheduler(config, [KVCacheManager(num_blocks, BLOCK) for _ in range(RANKS)])
    scheduler.plan_times, scheduler.added_at = [], []
    scheduler.set_weights("policy", epoch=1, version=0)
    ranks: Any = ConstantRanks(forward_seconds)
    loop = EngineLoop(scheduler, ranks, WeightSets(ranks, scheduler), StopStrings(None), BLOCK, lambda: None)
    loop.start()
    return loop, scheduler, ranks


def call(*requests: Request) -> Call:
    return Call({request.request_id: [request] for request in requests})


def intake_per_second(num_requests: int) -> float:
    """Requests per second through `submit`, while 256 others decode."""
    loop, _, _ = start_loop(32, 4096)
    background = call(*(prompt(f"r{number}", number, max_tokens=60_000 // 32) for number in range(32 * RANKS)))
    loop.submit(background)
    requests = [prompt(f"w{number}", number) for number in range(num_requests)]
    start = time.perf_counter()
    for first in range(0, num_requests, 8):
        loop.submit(call(*requests[first : first + 8]))
    wait_for_intake(loop)
    seconds = time.perf_counter() - start
    loop.close()
    return num_requests / seconds


def paced_intake(per_second: int, seconds: int) -> dict[str, float]:
    """Arrivals at a steady rate, 8 samples a call, beside `RUNNING` requests that fill the ranks' slots."""
    slots = RUNNING // RANKS
    loop, scheduler, _ = start_loop(slots, slots * 40, forward_seconds=0.002)
    loop.submit(call(*(prompt(f"r{number}", number, max_tokens=100_000) for number in range(RUNNING))))
    while loop.at_boundary(lambda: scheduler.num_running).result() < RUNNING:
        pass
    calls = [
        call(*(prompt(f"w{first + i}", first + i) for i in range(8))) for first in range(0, per_second * seconds, 8)
    ]
    scheduler.plan_times.clear()
    scheduler.added_at.clear()
    submits, start = [], time.perf_counter()
    due = start + np.arange(len(calls)) * 8 / per_second
    for moment, item in zip(due.tolist(), calls, strict=True):
        ahead = moment - time.perf_counter()
        if ahead > 0:  # otherwise it would give the interpreter away
            time.sleep(ahead)
        begin = time.perf_counter()
        loop.submit(item)
        submits.append(time.perf_counter() - begin)
    wait_for_intake(loop)
    loop.close()
    added = np.array(scheduler.added_at)
    return {
        "paced_intake_per_s": round(float(np.polyfit(added - start, np.arange(len(added)), 1)[0])),
        "paced_lag_p50_ms": milliseconds(added - np.repeat(due, 8)),
        "paced_lag_p99_ms": milliseconds(added - np.repeat(due, 8), 99),
        "paced_submit_p99_ms": milliseconds(submits, 99),
        "paced_plan_ms": milliseconds(scheduler.plan_times),
    }


def wait_for_intake(loop: EngineLoop) -> None:
    """Until the scheduler has all that was submitted."""
    loop.at_boundary(lambda: None).result()
    while loop.num_held:
        loop.at_boundary(lambda: None).result()


def delivery_times(num_requests: int) -> list[float]:
    """Seconds from the forward that ends a request to its caller, behind a head that needs a whole pool."""
    loop, _, ranks = start_loop(32, 512, forward_seconds=0.002)
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
