"""What the engine loop has done so far, in tokens and seconds."""

from __future__ import annotations

import time

from zerokl.rollout.control import WeightSets
from zerokl.rollout.histogram import Histogram, HistogramData
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.step_plan import StepPlan


class LoopMeter:
    """Counters that the loop thread keeps; any thread may read them, a step apart."""

    def __init__(self, scheduler: Scheduler, weights: WeightSets) -> None:
        self._scheduler = scheduler
        self._weights = weights
        self._decode_tokens = 0
        self._steps = Histogram()
        self._plans = Histogram()
        self._worker_seconds = 0.0
        self._drains = Histogram()
        self._drain_start = 0.0
        self._pauses = Histogram()
        self._last_end: float | None = None
        self._num_updates = 0

    def count_step(self, plan: StepPlan, *, start: float, plan_seconds: float, worker_seconds: float) -> None:
        """A step is done that began at `start`, was planned and laid out in `plan_seconds`, and was waited for."""
        end = time.perf_counter()
        if self._weights.num_updates != self._num_updates:
            self._num_updates = self._weights.num_updates
            if self._last_end is not None:
                self._pauses.observe(start - self._last_end)
        self._last_end = end if self._scheduler.num_unfinished else None
        self._decode_tokens += sum(rank.num_singles for rank in plan.ranks)
        self._steps.observe(end - start)
        self._plans.observe(plan_seconds)
        self._worker_seconds += worker_seconds

    def begin_drain(self) -> None:
        """From here on a change waits for requests in flight."""
        self._drain_start = time.perf_counter()

    def end_drain(self) -> None:
        """The change is due now."""
        self._drains.observe(time.perf_counter() - self._drain_start)

    def metrics(self) -> dict[str, float]:
        """The scheduler's counters; tokens by kind, seconds of steps and weights.

        `weight_pause_seconds` sums, over the updates with requests in flight, what lay between the last step before the
        new weights and the first one after.
        """
        scheduler = self._scheduler.metrics()
        return {
            **scheduler,
            "kv_usage": 1.0 - scheduler["free_blocks"] / scheduler["total_blocks"],
            "prefill_tokens": scheduler["computed_tokens"] - self._decode_tokens,
            "decode_tokens": self._decode_tokens,
            "step_seconds": self._steps.sum,
            "worker_seconds": self._worker_seconds,
            "weight_updates": self._weights.num_updates,
            "weight_stage_seconds": self._weights.stage_times.sum,
            "weight_drain_seconds": self._drains.sum,
            "weight_pause_seconds": self._pauses.sum,
            "weight_commit_seconds": self._weights.commit_times.sum,
        }

    def histograms(self) -> list[HistogramData]:
        """The scheduler's; seconds of steps, of planning them and laying out their arrays, and of weight updates:
        staging, waiting for requests in flight, committing, and the pause of those in flight.
        """
        return [
            *self._scheduler.meter.histograms(),
            self._steps.data("step_seconds"),
            self._plans.data("plan_seconds"),
            self._weights.stage_times.data("weight_sync_seconds", part="stage"),
            self._drains.data("weight_sync_seconds", part="drain"),
            self._weights.commit_times.data("weight_sync_seconds", part="commit"),
            self._pauses.data("pause_seconds", cause="weights"),
        ]
