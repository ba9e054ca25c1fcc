"""Per-token results of one request: arrays that grow, no object per token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import SampleResult


class ResultArrays:
    """Columns of equal length `size`; the properties of `Request` show them."""

    __slots__ = ("entropy", "logprobs", "policy_logprobs", "raw_logprobs", "size", "versions")

    def __init__(self, capacity: int, *, want_raw: bool) -> None:
        self.size = 0
        self.logprobs: NDArray[np.float32] = np.zeros(capacity, np.float32)
        self.policy_logprobs: NDArray[np.float32] = np.zeros(capacity, np.float32)
        self.entropy: NDArray[np.float32] = np.zeros(capacity, np.float32)
        self.versions: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self.raw_logprobs: NDArray[np.float32] | None = np.zeros(capacity, np.float32) if want_raw else None

    def extend(self, result: SampleResult, first_row: int, num_rows: int, policy_version: int) -> None:
        """Append rows first_row .. first_row + num_rows of a step's result."""
        begin, end = self.size, self.size + num_rows
        if end > len(self.logprobs):
            self._grow(max(end, 2 * len(self.logprobs)))
        if num_rows == 1:  # one index costs a fifth of a slice, and decoding is all single rows
            self._copy(result, begin, first_row, policy_version)
        else:
            self._copy(result, slice(begin, end), slice(first_row, first_row + num_rows), policy_version)
        self.size = end

    def _copy(self, result: SampleResult, at: int | slice, rows: int | slice, policy_version: int) -> None:
        self.logprobs[at] = result.logprobs[rows]
        self.policy_logprobs[at] = result.policy_logprobs[rows]
        self.entropy[at] = result.entropy[rows]
        self.versions[at] = policy_version
        if self.raw_logprobs is not None:
            assert result.raw_logprobs is not None, "raw logprobs were asked for"
            self.raw_logprobs[at] = result.raw_logprobs[rows]

    def _grow(self, capacity: int) -> None:
        self.logprobs = enlarged(self.logprobs, capacity)
        self.policy_logprobs = enlarged(self.policy_logprobs, capacity)
        self.entropy = enlarged(self.entropy, capacity)
        self.versions = enlarged(self.versions, capacity)
        if self.raw_logprobs is not None:
            self.raw_logprobs = enlarged(self.raw_logprobs, capacity)


def enlarged(array: NDArray[Any], size: int) -> NDArray[Any]:
    """A copy of `array` with `size` entries, new ones 0."""
    larger = np.zeros(size, array.dtype)
    larger[: len(array)] = array
    return larger
