"""Steps under way: launched on the ranks, results not yet taken. Two where the device runs while the host goes on.

begin(plan k)     launch k
run_ahead()       launch k + 1, if it follows and nobody is about to ask for a boundary; then take the results of k
finish()          take the results of all
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from zerokl.rollout.awaited_boundary import AwaitedBoundary
from zerokl.rollout.ranks import Ranks
from zerokl.rollout.routing_store import RankRouting
from zerokl.rollout.run_ahead import order_ahead
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.step_inputs import build_step_orders
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.step_plan import StepPlan

Begin = Callable[[Sequence[StepOrder]], Callable[[], list[StepResult]]]
"""Launches a step of all ranks, whose orders it is given; what it returns waits for the results, is called once, and in
the order of the steps."""


class DoneStep(NamedTuple):
    """A step with its results."""

    plan: StepPlan
    results: Sequence[StepResult]
    start: float
    """When its planning began, or that of the results of the step before; seconds of time.perf_counter."""
    plan_seconds: float
    """From the begin of its planning to its launch."""
    worker_seconds: float
    """For which the host waited for it."""


class _Launched(NamedTuple):
    plan: StepPlan
    orders: list[StepOrder]
    plan_seconds: float
    results: Callable[[], list[StepResult]]


class StepPipeline:
    """Runs on the loop thread. `take` is given each step with its results, before a step after the next is planned."""

    def __init__(
        self,
        scheduler: Scheduler,
        ranks: Ranks,
        block_size: int,
        routing: RankRouting,
        take: Callable[[DoneStep, StepPlan | None], None],
        begin: Begin | None,
    ) -> None:
        """`begin` launches a step without waiting for it; None: `ranks.execute` runs each to its end.

        `take(step, ahead)`: the step is done, `ahead` was planned meanwhile.
        """
        self._scheduler = scheduler
        self._ranks = ranks
        self._block_size = block_size
        self._routing = routing
        self._take = take
        self._begin = begin
        self.awaited = AwaitedBoundary()
        """While it is near no step is launched ahead."""
        self._launched: deque[_Launched] = deque()
        self._start = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether no step is under way."""
        return not self._launched

    def begin(self, plan: StepPlan, start: float) -> None:
        """Launch a step, while none is under way; its planning began at `start`."""
        assert self.is_empty, "a step is under way"
        self._start = start
        self._routing.hand_over(plan.handovers)
        self._launch(plan, build_step_orders(plan, self._scheduler.requests, self._block_size), start)
        if self._begin is None:
            self._take_next(None)

    def run_ahead(self, now: float) -> None:
        """Launch the step that follows the one under way, where one does; then take the results of that.

        `now` is as for `Scheduler.plan`.
        """
        start = time.perf_counter()
        (last,) = self._launched
        ahead = None if self.awaited.is_near else self._scheduler.plan_ahead(last.plan, now)
        if ahead is not None:
            requests = self._scheduler.requests
            orders = [
                order_ahead(order, last.plan, ahead, requests, self._block_size, rank)
                for rank, order in enumerate(last.orders)
            ]
            self._launch(ahead, orders, start)
        self._take_next(ahead)
        if not self._scheduler.num_unfinished:
            self.finish()

    def finish(self) -> None:
        """Take the results of what is under way."""
        while self._launched:
            self._take_next(self._launched[1].plan if len(self._launched) > 1 else None)

    def _launch(self, plan: StepPlan, orders: list[StepOrder], start: float) -> None:
        plan_seconds = time.perf_counter() - start
        if self._begin is None:
            self._launched.append(_Launched(plan, orders, plan_seconds, lambda: self._ranks.execute(orders)))
        else:
            self._launched.append(_Launched(plan, orders, plan_seconds, self._begin(orders)))

    def _take_next(self, ahead: StepPlan | None) -> None:
        plan, orders, plan_seconds, wait = self._launched.popleft()
        called = time.perf_counter()
        results = wait()
        waited = time.perf_counter()
        self._routing.record(orders, results)
        self._take(DoneStep(plan, results, self._start, plan_seconds, waited - called), ahead)
        self._start = time.perf_counter()
