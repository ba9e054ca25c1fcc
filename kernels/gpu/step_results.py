"""What a step draws: tokens and log-probabilities of its rows, kept on the device until the next step draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.gpu import general_sampling, sampling
from zerokl.kernels.gpu import lm_head as heads
from zerokl.kernels.gpu.current_step import CurrentStep
from zerokl.kernels.gpu.device import Device
from zerokl.kernels.gpu.elementwise import Tensor
from zerokl.kernels.gpu.packed import PackedLinear
from zerokl.kernels.gpu.transfers import Downloads, Fetch
from zerokl.kernels.ops import SampleResult, SamplingBatch

_MAX_ROWS = 1 << 16
"""Rows of results that a step can have."""
_ROWS_PER_PASS = 512
"""Rows whose logits are in memory at once."""

Settle = Callable[[Tensor, PackedLinear, Tensor, Tensor], None]
"""(hidden [R, E], head, options [R, NUM_OPTIONS], out [R, NUM_RESULTS]): results of rows that `lm_head.serves`."""


def further_needs(batch: SamplingBatch) -> general_sampling.Needs | None:
    """What a batch asks for that `lm_head.settle` does not serve; batches with equal needs have the same launches."""
    return None if heads.serves(batch) else general_sampling.needs_of(batch)


class StepResults:
    """Draws for the rows of the step that is under way."""

    def __init__(self, step: CurrentStep, device: Device, downloads: Downloads) -> None:
        self._step = step
        self._downloads = downloads
        self.drawn: Tensor = device.empty([_MAX_ROWS, int(sampling.NUM_RESULTS)], "int32")
        """Of the last step that drew; the tokens of the next one may be taken from here."""

    def draw(self, hidden: Tensor, lm_head: PackedLinear, batch: SamplingBatch, settle: Settle) -> None:
        """Fill `drawn` for the rows of the step's batch; `settle` serves those passes that it can."""
        assert batch is self._step.inputs.sampling
        assert len(batch.forced) <= _MAX_ROWS, f"{len(batch.forced)} rows of results"
        needs = further_needs(batch)
        rows, options = hidden.shape[0], int(sampling.NUM_OPTIONS)
        if needs is not None and needs.processed:
            # Before these results take the place of the last ones.
            sampling.count_drawn(self._step.sections, self.drawn)
        for first in range(0, rows, _ROWS_PER_PASS):
            last = min(first + _ROWS_PER_PASS, rows)
            whole = last - first == rows
            at = dict(self._step.sections)
            if not whole:
                at["options"] = at["options"][first * options : last * options]
                at["history_start"] = at["history_start"][first : last + 1]
                at["bias_start"] = at["bias_start"][first : last + 1]
            some, out = hidden if whole else hidden[first:last], self.drawn[first:last]
            if needs is None:
                settle(some, lm_head, at["options"], out)
            else:
                general_sampling.sample(some, lm_head.weight, at, out, needs, self._step.take)

    def fetch(self, rows: int, *, want_raw: bool) -> FetchedSample:
        """Begin to copy the first rows of what was drawn last to the host."""
        size = rows * int(sampling.NUM_RESULTS)
        return FetchedSample(self._downloads.fetch(self.drawn, size), want_raw)


class FetchedSample:
    """Results of a step on their way to the host."""

    def __init__(self, fetch: Fetch, want_raw: bool) -> None:
        self._fetch, self._want_raw = fetch, want_raw

    def result(self) -> SampleResult:
        """Wait for them; asked for once."""
        columns = self._fetch.result().reshape(-1, int(sampling.NUM_RESULTS))
        return _sample_result(columns, self._want_raw)


def _sample_result(columns: NDArray[np.int32], want_raw: bool) -> SampleResult:
    floats = columns.view(np.float32)
    return SampleResult(
        tokens=columns[:, int(sampling.TOKEN)].copy(),
        logprobs=floats[:, int(sampling.LOGPROB)].copy(),
        policy_logprobs=floats[:, int(sampling.POLICY_LOGPROB)].copy(),
        entropy=floats[:, int(sampling.ENTROPY)].copy(),
        raw_logprobs=floats[:, int(sampling.RAW_LOGPROB)].copy() if want_raw else None,
    )
