"""The one thread that plans and runs steps. It alone touches scheduler, KV cache bookkeeping and ranks.

    callers --(Call | Exclusive)--> inbox --+
    callers --(small actions)----> urgent --+--> [ urgent, inbox, one step ]* --> futures

The thread waits on a condition while there is nothing to do: until something comes, or a collection window of the
scheduler closes. `failed` and `closed` are never left again.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Literal, TypeVar

from zerokl.rollout.awaited_boundary import AwaitedBoundary
from zerokl.rollout.control import Call, Exclusive, WeightSets, ending_error, gave_up
from zerokl.rollout.errors import EngineClosedError, EngineFailedError, StepAbandonedError, WorkerError
from zerokl.rollout.histogram import HistogramData
from zerokl.rollout.loop_inbox import LoopInbox
from zerokl.rollout.loop_meter import LoopMeter
from zerokl.rollout.pause import GenerationPause, PauseMode
from zerokl.rollout.pending_change import PendingChange
from zerokl.rollout.ranks import Ranks
from zerokl.rollout.request import Request
from zerokl.rollout.routing_store import NO_ROUTING, RankRouting
from zerokl.rollout.running_calls import RunningCalls
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.step_order import StepResult
from zerokl.rollout.step_pipeline import Begin, DoneStep, StepPipeline
from zerokl.rollout.step_plan import Hold, StepPlan
from zerokl.rollout.step_watchers import StepWatchers
from zerokl.rollout.stop import StopStrings

CLOSE_SECONDS = 5.0
"""What `close` leaves a step to end by itself."""

EngineState = Literal["running", "draining", "paused", "failed", "closed"]
Result = TypeVar("Result")


class EngineLoop:
    """Owns the loop thread from `start` to `close`. Public methods may be called from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        ranks: Ranks,
        weights: WeightSets,
        stop_strings: StopStrings,
        block_size: int,
        check_awake: Callable[[], None],
        after_step: Callable[[Sequence[StepResult]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        routing: RankRouting = NO_ROUTING,
        begin_step: Begin | None = None,
    ) -> None:
        """`check_awake` raises EngineAsleepError where requests cannot run. `after_step` is given each step's results;
        `clock` gives seconds. `routing` hears of each step's handovers and outcome before the scheduler takes it.
        `begin_step`: as `StepPipeline` takes it.
        """
        self._scheduler = scheduler
        self._ranks = ranks
        self._after_step = after_step
        self._clock = clock
        self._steps = StepPipeline(scheduler, ranks, block_size, routing, self._take_results, begin_step)
        self._inbox = LoopInbox(check_awake, clock)
        self._calls = RunningCalls(scheduler, self._inbox, stop_strings, check_awake)
        self._pause = GenerationPause()
        self._watchers = StepWatchers()
        self._hold: Hold | None = None
        """Set while the scheduler has nothing to compute but requests that a collection window holds."""
        self._meter = LoopMeter(scheduler, weights)
        self._change = PendingChange(scheduler, self._pause, self._meter)
        self._thread = threading.Thread(target=self._run, name="zerokl-engine-loop", daemon=True)

    # -- any thread ---------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start the thread; the ranks are the thread's from here on, closing included."""
        self._thread.start()

    @property
    def state(self) -> EngineState:
        """What the loop is about."""
        if self._inbox.ended is not None:
            return self._inbox.ended
        if self._pause.holds_calls and (self._pause.is_frozen or not self._scheduler.num_unfinished):
            return "paused"
        return "draining" if self._change.exists or self._pause.holds_calls else "running"

    @property
    def cause(self) -> BaseException | None:
        """What made the engine fail; None while it has not."""
        return self._inbox.cause

    @property
    def awaited_boundary(self) -> AwaitedBoundary:
        """Where a change announces itself, so that it need not wait for a step launched ahead."""
        return self._steps.awaited

    @property
    def num_held(self) -> int:
        """Calls and changes in the inbox, not yet taken up."""
        return len(self._inbox)

    def submit(self, item: Call | Exclusive) -> None:
        """Queue a call or a change.

        Raises ValueError if an id is in use, EngineAsleepError, EngineFailedError or EngineClosedError.
        """
        self._inbox.submit(item)

    def at_boundary(self, action: Callable[[], Result]) -> Future[Result]:
        """Run a short action on the loop thread before its next step, ahead of all that is queued."""
        return self._inbox.at_boundary(action)

    def run_soon(self, action: Callable[[], None]) -> None:
        """As `at_boundary`, if the loop runs; returns at once."""
        with contextlib.suppress(EngineFailedError, EngineClosedError):
            self.at_boundary(action)

    def fail(self, error: WorkerError) -> None:
        """End the loop with this error, if it runs; returns at once."""

        def throw() -> None:
            raise error

        self.run_soon(throw)

    def abort(self, ids: Collection[str] | None) -> Future[int]:
        """Abort the requests of these ids, or all; unknown ids are passed over. Resolves to the number aborted."""
        return self.at_boundary(lambda: self._calls.abort(ids))

    def pause(self, mode: PauseMode) -> Future[None]:
        """Pause generation before the next step; resolves once the pause holds. See `GenerationPause`."""
        holds: Future[None] = Future()

        def pass_on(begun: Future[None]) -> None:
            error = begun.exception()
            if error is not None and holds.set_running_or_notify_cancel():
                holds.set_exception(error)

        self.at_boundary(lambda: self._begin_pause(mode, holds)).add_done_callback(pass_on)
        return holds

    def resume(self) -> Future[None]:
        """End a pause, if there is one."""
        return self.at_boundary(self._pause.lift)

    def watch_steps(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Have `watcher` called on the loop thread after each step, quick and without raising; returns what ends it."""
        return self._watchers.add(watcher)

    def metrics(self) -> dict[str, float]:
        """Counters since the start and sizes of now: see `LoopMeter.metrics`; calls and changes held."""
        return {**self._meter.metrics(), "held": self.num_held, "generation_pause_seconds": self._pause.times.sum}

    def histograms(self) -> list[HistogramData]:
        """Durations since the start: see `LoopMeter.histograms`; of pauses of generation."""
        return [*self._meter.histograms(), self._pause.times.data("pause_seconds", cause="generation")]

    def close(self, *, wait: bool = True) -> None:
        """End the thread after its current step, failing what is in flight. Idempotent; waits until it has ended.

        Ranks that are processes and do not end their part of the step within CLOSE_SECONDS are killed.
        """
        self._inbox.close()
        # A callback of a call may close its engine, on the loop's own thread.
        if wait and self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                self._ranks.kill()
                self._thread.join()

    def check_alive(self) -> None:
        """Raise EngineFailedError or EngineClosedError where the loop has ended, or is about to be."""
        self._inbox.check_alive()

    # -- the loop thread ----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
        except Exception as error:  # noqa: BLE001 - whatever ends the loop, the callers that wait must hear of it
            self._end("failed", error)
        else:
            self._end("closed", None)
        finally:
            with contextlib.suppress(WorkerError):
                self._ranks.close()

    def _turn(self) -> None:
        if self._steps.is_empty or self._is_asked():
            self._steps.finish()  # what others want is done between steps
            self._inbox.run_urgent()
            self._take_inbox()
        elif self._is_open:  # what is under way is none of the business of those who come
            while (call := self._inbox.take_call()) is not None:
                self._calls.add(call)
        if self._scheduler.num_unfinished and not self._pause.is_frozen:
            with contextlib.suppress(StepAbandonedError):  # applied nowhere: planned again
                self._step()
        self._pause.settle(self._scheduler.num_unfinished)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when that is to end."""
        until = None if self._hold is None else self._hold.until
        goes_on = self._inbox.wait(self._has_work, until)
        self._hold = None
        return goes_on

    def _has_work(self) -> bool:
        unfinished = self._scheduler.num_unfinished > 0
        if unfinished and self._pause.is_frozen:  # a change that is draining stands still too
            return self._inbox.num_changes > 0 and not self._change.exists
        if self._change.exists or (self._inbox.num_changes if self._pause.holds_calls else self._inbox):
            return True
        if self._hold is not None:
            return self._clock() >= self._hold.until
        return unfinished

    @property
    def _is_open(self) -> bool:
        """Whether further calls are let in: neither a change nor a pause waits for those in flight."""
        return not self._change.exists and not self._pause.holds_calls

    def _is_asked(self) -> bool:
        """Whether there is anything to do that is done while no step is under way: all but letting calls in."""
        if self._inbox.num_urgent:
            return True
        return self._change.is_due if self._change.exists else self._inbox.num_changes > 0

    def _take_inbox(self) -> None:
        while self._change.settle():
            item = self._inbox.take(only_changes=self._pause.holds_calls)
            if item is None:
                return
            if isinstance(item, Call):
                self._calls.add(item)
            else:
                self._change.begin(item)

    def _begin_pause(self, mode: PauseMode, holds: Future[None]) -> None:
        self._pause.begin(mode, holds)
        if mode == "abort":
            self._calls.abort_generating()

    def _step(self) -> None:
        # While nobody else is let in nothing is worth waiting for.
        now = self._clock() if self._is_open else math.inf
        if not self._steps.is_empty:
            self._steps.run_ahead(now)
            return
        start = time.perf_counter()
        plan = self._scheduler.plan(now)
        assert plan is not None, "unfinished requests and nothing to run"
        if isinstance(plan, Hold):
            self._hold = plan
            return
        self._steps.begin(plan, start)

    def _take_results(self, step: DoneStep, ahead: StepPlan | None) -> None:
        for request in self._scheduler.update(step.plan, step.results, ahead):
            self.deliver(request)
        self._after_step(step.results)
        self._meter.count_step(
            step.plan, start=step.start, plan_seconds=step.plan_seconds, worker_seconds=step.worker_seconds
        )
        self._watchers.call()

    def deliver(self, request: Request) -> None:
        """Hand a request that has ended to its call; on the loop thread only, as `refuse`."""
        self._calls.deliver(request)

    def refuse(self, request: Request, error: Exception) -> None:
        """End the call of a request that is in flight, with an error."""
        self._calls.refuse(request, error)

    def _end(self, state: Literal["failed", "closed"], error: BaseException | None) -> None:
        futures, changes = self._inbox.end(state, error)
        pending = self._change.take()
        changes += [] if pending is None else [pending]
        futures += self._pause.take_waiters()
        futures += [change.future for change in changes if not gave_up(change.future)]
        for future in futures:
            future.set_exception(ending_error(state, error))
