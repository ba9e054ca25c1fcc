"""Ways in which requests come, go and are disturbed: each runs a policy's whole job on an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tiny_engine import wait_until

from gate.policies import WAYS_TO_SAMPLE, GatePolicy
from gate.step_watch import StepWatch
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.weight_sync import WeightPublisher


@dataclass
class Run:
    """A policy's job on one engine, under the way that its requests arrive."""

    policy: GatePolicy
    engine: RolloutEngine
    watch: StepWatch
    factors: dict[str, float] = field(default_factory=dict)
    """What the arrival brought about, besides what the watch and the engine count."""

    def __post_init__(self) -> None:
        self.everything = range(len(self.policy.job.prompts))
        self._threads = ThreadPoolExecutor(max_workers=len(self.everything) + 4)

    def params(self, prompts: Sequence[int]) -> list[SamplingParams]:
        """Sampling parameters of these prompts; seeds are fixed by the prompt's place in the job."""
        every = self.policy.job.params(WAYS_TO_SAMPLE)
        return [every[index] for index in prompts]

    def generate(self, prompts: Sequence[int], ids: Sequence[str] | None = None) -> list[Rollout]:
        """Rollouts of these prompts of the job, in one call."""
        rollouts = self.engine.generate(
            [self.policy.job.prompts[index] for index in prompts], self.params(prompts), request_ids=ids
        )
        return numbered(rollouts, prompts)

    def generate_one(self, prompt: int) -> list[Rollout]:
        """Sample 0 of a prompt alone."""
        params = replace(self.params([prompt])[0], n=1)
        return numbered(self.engine.generate([self.policy.job.prompts[prompt]], params), [prompt])

    async def agenerate(self, prompts: Sequence[int]) -> list[Rollout]:
        """`generate` as a coroutine."""
        rollouts = await self.engine.agenerate(
            [self.policy.job.prompts[index] for index in prompts], self.params(prompts)
        )
        return numbered(rollouts, prompts)

    def start(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call it in a thread of its own."""
        return self._threads.submit(function, *args)

    def start_held(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """As `start`, while the engine is stopped; returns once it has taken note of the call or the change."""
        held = self.engine.health()["num_held"]
        future = self.start(function, *args)
        wait_until(lambda: future.done() or self.engine.health()["num_held"] > held)
        return future

    def close(self) -> None:
        """Let the engine step freely and end the threads."""
        self.watch.open()
        self._threads.shutdown()


Arrival = Callable[[Run], list[Rollout]]


def numbered(rollouts: Sequence[Rollout], prompts: Sequence[int]) -> list[Rollout]:
    """With the prompt's place in the job for its place in the call."""
    return [replace(rollout, prompt_index=prompts[rollout.prompt_index]) for rollout in rollouts]


def at_once(run: Run) -> list[Rollout]:
    """One call with all prompts."""
    return run.generate(run.everything)


def shuffled(run: Run) -> list[Rollout]:
    """One call, prompts in another order."""
    order = np.random.default_rng(3).permutation(len(run.everything)).tolist()
    run.factors["prompts_out_of_place"] = sum(index != at for at, index in enumerate(order))
    return run.generate(order)


def twice(run: Run) -> list[Rollout]:
    """The second of two equal calls, as the cache leaves it; sample 0 of a group has no sibling to take blocks from."""
    run.generate(run.everything)
    rollouts = run.generate(run.everything)
    leaders = [rollout.num_cached_tokens for rollout in rollouts if rollout.sample_index == 0]
    run.factors["cached_prompt_tokens"] = sum(leaders)
    run.factors["computed_prompts"] = sum(tokens == 0 for tokens in leaders)
    return rollouts


def trickled(run: Run, steps_between: int = 2, together: int = 1) -> list[Rollout]:
    """A thread and a call for `together` prompts, each call arriving some steps after the one before."""
    starts = run.everything[::together]
    return _in_turn(run, [(run.generate, run.everything[first : first + together]) for first in starts], steps_between)


def forward_signal(run: Run) -> list[Rollout]:
    """Schedule and forward in turn, coupled by a signal: one prompt a call, taken up when the forward has ended.

    A lone sample comes first, and again with its prompt: other ranks have nothing to do in that step.
    """
    return _in_turn(run, [(run.generate_one, 0), *((run.generate, [index]) for index in run.everything)], 1)


def _in_turn(run: Run, calls: Sequence[tuple[Callable[..., list[Rollout]], Any]], steps: int) -> list[Rollout]:
    (function, argument), *others = calls
    run.watch.allow_first(steps)
    started = [run.start(function, argument)]
    for function, argument in others:
        run.watch.wait_stopped()
        started.append(run.start_held(function, argument))
        run.watch.allow(steps)
    run.watch.open()
    return [rollout for call in started for rollout in call.result()]


def paced(seconds_between: float) -> Arrival:
    """A coroutine and a call per prompt, at a steady rate of arrival."""

    async def one(run: Run, start: float, index: int) -> list[Rollout]:
        await asyncio.sleep(start + index * seconds_between - time.perf_counter())
        return await run.agenerate([index])

    async def every(run: Run) -> list[list[Rollout]]:
        start = time.perf_counter()
        return await asyncio.gather(*(one(run, start, index) for index in run.everything))

    return lambda run: [rollout for call in asyncio.run(every(run)) for rollout in call]


def aborted(run: Run) -> list[Rollout]:
    """Every other prompt is aborted after four steps and submitted anew; what was sampled until then counts too."""
    run.watch.allow_first(4)
    call = run.start(run.generate, run.everything, [f"prompt {index}" for index in run.everything])
    run.watch.wait_stopped()
    ended = [index for index in run.everything if index % 2]
    # Not `abort`, which would wait for the step that is stopped here.
    num_aborted = run.engine._loop.abort([f"prompt {index}" for index in ended])
    run.watch.open()
    first = call.result()
    run.factors["aborted"] = num_aborted.result()
    run.factors["aborted_tokens"] = sum(len(one.token_ids) for one in first if one.finish_reason == "abort")
    return first + run.generate(ended)


def updated(run: Run) -> list[Rollout]:
    """New weights come (mode "wait") while the first half is in flight; the second half is submitted meanwhile."""
    half = len(run.everything) // 2
    with WeightPublisher() as publisher:
        source = run.policy.publish(publisher, version=1)
        run.watch.allow_first(3)
        before = run.start(run.generate, run.everything[:half])
        run.watch.wait_stopped()
        update = run.start_held(run.engine.update_weights, source)
        run.factors["in_flight_at_update"] = run.engine.health()["num_running"]
        after = run.start_held(run.generate, run.everything[half:])
        run.watch.open()
        update.result()
        rollouts: list[Rollout] = before.result() + after.result()
    for version in (0, 1):
        run.factors[f"tokens_of_version_{version}"] = sum(
            int((rollout.policy_versions == version).sum()) for rollout in rollouts
        )
    return rollouts
