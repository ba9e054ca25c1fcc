"""A device that runs behind its host, over anything that runs whole steps: for engines whose steps overlap."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SamplingBatch, StepInputs
from zerokl.rollout.step_order import StepOrder, StepResult


def begin_on(devices: Sequence[LateDevice]) -> Callable[[Sequence[StepOrder]], Callable[[], list[StepResult]]]:
    """What launches a step on the device of each rank."""

    def begin(orders: Sequence[StepOrder]) -> Callable[[], list[StepResult]]:
        pending = [device.begin(order) for device, order in zip(devices, orders, strict=True)]
        return lambda: [step.result() for step in pending]

    return begin


class LateDevice:
    """Runs a step when it is begun, or with `late` not before its result is asked for.

    Tokens under way are taken from the rows of the step before, as a GPU does.
    """

    def __init__(self, execute: Callable[[StepOrder], StepResult], late: bool, takes_drawn_tokens: bool = True) -> None:
        """`takes_drawn_tokens` off is a planted fault."""
        self.execute = execute
        self.late = late
        self.takes_drawn_tokens = takes_drawn_tokens
        self.waiting: deque[tuple[StepOrder, LateStep]] = deque()
        self.drawn: NDArray[np.int32] = np.zeros(0, np.int32)
        self.num_steps = 0
        self.num_ahead = 0
        """Steps that were begun before the results of the one before had been asked for."""
        self.num_open = 0

    def begin(self, order: StepOrder) -> LateStep:
        arrays = [getattr(order.inputs, field.name) for field in fields(StepInputs)]
        assert all(array.flags.c_contiguous for array in arrays if isinstance(array, np.ndarray))
        step = LateStep(self)
        self.waiting.append((order, step))
        self.num_steps += 1
        self.num_ahead += self.num_open > 0
        self.num_open += 1
        assert self.num_open <= 2, "two steps are under way at most"
        if not self.late:
            self.run()
        return step

    def run(self) -> None:
        order, step = self.waiting.popleft()
        inputs = order.inputs
        if inputs.token_rows is not None and self.takes_drawn_tokens:
            inputs = self._with_tokens(inputs, inputs.token_rows)
        step.value = self.execute(StepOrder(inputs=inputs))
        if len(inputs.logit_rows):  # what nobody draws stays as it is
            self.drawn = step.value.sampled.tokens

    def _with_tokens(self, inputs: StepInputs, rows: NDArray[np.int32]) -> StepInputs:
        token_ids = np.where(rows >= 0, self.drawn[rows] if len(self.drawn) else 0, inputs.token_ids)
        return replace(inputs, token_ids=token_ids, token_rows=None, sampling=self._with_histories(inputs.sampling))

    def _with_histories(self, batch: SamplingBatch) -> SamplingBatch:
        rows = [self._history(batch, row) for row in range(len(batch.forced))]
        tokens, counts = ([*chain.from_iterable(column)] for column in zip(*rows, strict=True)) if rows else ([], [])
        return replace(
            batch,
            history_start=np.cumsum([0, *(len(row[0]) for row in rows)], dtype=np.int32),
            history_token=np.array(tokens, np.int32),
            history_count=np.array(counts, np.int32),
        )

    def _history(self, batch: SamplingBatch, row: int) -> tuple[list[int], list[int]]:
        """A row's tokens and counts, the one under way among them."""
        span = slice(batch.history_start[row], batch.history_start[row + 1])
        counts = dict(zip(batch.history_token[span].tolist(), batch.history_count[span].tolist(), strict=True))
        if -1 in counts:
            token = int(self.drawn[-1 - counts.pop(-1)])
            counts[token] = counts.get(token, 0) + 1
        return [*counts], [*counts.values()]


class LateStep:
    """A step under way."""

    value: StepResult | None = None

    def __init__(self, device: LateDevice) -> None:
        self.device = device

    def result(self) -> StepResult:
        while self.value is None:
            self.device.run()
        self.device.num_open -= 1
        return self.value
