"""A worker that notes when the GPU begins and ends each step, and when the host begins it."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import triton
from cuda.bindings import runtime

from models import RandomWeights
from zerokl.kernels.gpu.paddle_device import check
from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.step_outcome import PendingStep


class TimedWorker(RandomWeights):
    """Events around the launches of each step; `log` has (tokens, rows, host seconds, first event, last event)."""

    latest: TimedWorker

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.log: list[tuple[int, int, float, Any, Any]] = []
        TimedWorker.latest = self

    def begin(self, order: StepOrder) -> PendingStep:
        stream = triton.runtime.driver.active.stream
        events = [check(runtime.cudaEventCreate()) for _ in range(2)]
        began = time.perf_counter()
        check(runtime.cudaEventRecord(events[0], stream))
        pending = super().begin(order)
        check(runtime.cudaEventRecord(events[1], stream))
        self.log.append((len(order.inputs.token_ids), len(order.inputs.logit_rows), began, *events))
        return pending

    def take(self, sequences: int) -> dict[str, float]:
        """Of the steps since the last call that decode this many sequences: median span of the GPU and period of the
        host, in ms; and the rest: steps and milliseconds on the GPU.
        """
        log, self.log = self.log, []
        decodes = [step for step in log if step[0] == step[1] == sequences]
        others = [step for step in log if not step[0] == step[1] == sequences]
        if len(decodes) < 3:
            return {"decode_steps": len(decodes)}
        spans = [milliseconds(step[3], step[4]) for step in decodes]
        gaps = [milliseconds(a[4], b[3]) for a, b in itertools.pairwise(decodes)]
        periods = [b[2] - a[2] for a, b in itertools.pairwise(decodes)]
        return {
            "decode_steps": len(decodes),
            "gpu_span_ms": round(statistics.median(spans), 3),
            "gpu_gap_ms": round(statistics.median(gaps), 3),
            "period_ms": round(statistics.median(periods) * 1e3, 3),
            "other_steps": len(others),
            "other_gpu_ms": round(sum(milliseconds(step[3], step[4]) for step in others), 1),
        }


def milliseconds(first: Any, last: Any) -> float:
    """From one event to another."""
    return float(check(runtime.cudaEventElapsedTime(first, last)))
