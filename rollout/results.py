"""Per-token results of one request: arrays that grow, no object per token."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SampleResult

PREFILL, DECODE = 0, 1
"""Phases of a row: DECODE where its forward computed one token of the sequence, which it had sampled itself."""


class Origin(NamedTuple):
    """Where rows of results come from: what a jump of the KL can be cut by. Decides no bit of them."""

    policy_version: int
    step: int = 0
    """Number of the step."""
    phase: int = PREFILL
    cached_len: int = 0
    """Tokens of the sequence whose keys and values came from the prefix cache in the forward that gave the rows."""
    rank: int = 0
    """Rank that computed them."""


class ResultArrays:
    """Columns of equal length `size`; the properties of `Request` show them."""

    __slots__ = (
        "cached_lens",
        "entropy",
        "logprobs",
        "phases",
        "policy_logprobs",
        "ranks",
        "raw_logprobs",
        "size",
        "steps",
        "versions",
    )

    def __init__(self, capacity: int, *, want_raw: bool) -> None:
        self.size = 0
        self.logprobs: NDArray[np.float32] = np.zeros(capacity, np.float32)
        self.policy_logprobs: NDArray[np.float32] = np.zeros(capacity, np.float32)
        self.entropy: NDArray[np.float32] = np.zeros(capacity, np.float32)
        self.versions: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self.steps: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self.phases: NDArray[np.uint8] = np.zeros(capacity, np.uint8)
        self.cached_lens: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self.ranks: NDArray[np.int16] = np.zeros(capacity, np.int16)
        self.raw_logprobs: NDArray[np.float32] | None = np.zeros(capacity, np.float32) if want_raw else None

    def extend(self, result: SampleResult, first_row: int, num_rows: int, origin: Origin) -> None:
        """Append rows first_row .. first_row + num_rows of a step's result."""
        begin, end = self.size, self.size + num_rows
        if end > len(self.logprobs):
            self._grow(max(end, 2 * len(self.logprobs)))
        if num_rows == 1:  # one index costs a fifth of a slice, and decoding is all single rows
            self._copy(result, begin, first_row, origin)
        else:
            self._copy(result, slice(begin, end), slice(first_row, first_row + num_rows), origin)
        self.size = end

    def _copy(self, result: SampleResult, at: int | slice, rows: int | slice, origin: Origin) -> None:
        self.logprobs[at] = result.logprobs[rows]
        self.policy_logprobs[at] = result.policy_logprobs[rows]
        self.entropy[at] = result.entropy[rows]
        self.versions[at], self.steps[at], self.phases[at], self.cached_lens[at], self.ranks[at] = origin
        if self.raw_logprobs is not None:
            assert result.raw_logprobs is not None, "raw logprobs were asked for"
            self.raw_logprobs[at] = result.raw_logprobs[rows]

    def _grow(self, capacity: int) -> None:
        self.logprobs = enlarged(self.logprobs, capacity)
        self.policy_logprobs = enlarged(self.policy_logprobs, capacity)
        self.entropy = enlarged(self.entropy, capacity)
        self.versions = enlarged(self.versions, capacity)
        self.steps = enlarged(self.steps, capacity)
        self.phases = enlarged(self.phases, capacity)
        self.cached_lens = enlarged(self.cached_lens, capacity)
        self.ranks = enlarged(self.ranks, capacity)
        if self.raw_logprobs is not None:
            self.raw_logprobs = enlarged(self.raw_logprobs, capacity)


def enlarged(array: NDArray[Any], size: int) -> NDArray[Any]:
    """A copy of `array` with `size` entries, new ones 0."""
    larger = np.zeros(size, array.dtype)
    larger[: len(array)] = array
    return larger
