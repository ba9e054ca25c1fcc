"""Per-token results of one request: an array of rows that grows, no object per token."""

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
    phase: int | NDArray[Any] = PREFILL
    cached_len: int | NDArray[Any] = 0
    """Tokens of the sequence whose keys and values came from the prefix cache in the forward that gave the rows."""
    rank: int = 0
    """Rank that computed them."""


ROW = np.dtype(
    [
        ("logprobs", np.float32),
        ("policy_logprobs", np.float32),
        ("entropy", np.float32),
        ("raw_logprobs", np.float32),
        ("policy_versions", np.int64),
        ("steps", np.int64),
        ("cached_lens", np.int32),
        ("ranks", np.int16),
        ("phases", np.uint8),
    ],
    align=True,
)
"""All that is kept of a token beside its id. One copy of so many bytes costs a ninth of nine numbers, one by one."""

CELL = np.dtype((np.void, ROW.itemsize))
"""The same bytes, of which NumPy knows no fields: it copies them several times as fast."""

Rows = NDArray[np.void]
"""[n] of type ROW."""


def make_rows(result: SampleResult, origin: Origin) -> Rows:
    """The rows of a step's result [n] with where they come from; phase and cached length may be arrays [n]."""
    made = np.zeros(len(result.tokens), ROW)
    made["logprobs"] = result.logprobs
    made["policy_logprobs"] = result.policy_logprobs
    made["entropy"] = result.entropy
    if result.raw_logprobs is not None:
        made["raw_logprobs"] = result.raw_logprobs
    for name, value in zip(("policy_versions", "steps", "phases", "cached_lens", "ranks"), origin, strict=True):
        made[name] = value
    return made


def cells_of(rows: Rows) -> list[Any]:
    """Each row for an entry of `ResultArrays.cells`."""
    return list(rows.view(CELL))


class ResultArrays:
    """Rows of a request, of which its first `num_output_tokens` are filled; its properties show their columns."""

    __slots__ = ("_rows", "_want_raw", "capacity", "cells")

    def __init__(self, capacity: int, *, want_raw: bool) -> None:
        self._want_raw = want_raw
        self._take(np.zeros(capacity, ROW))

    def _take(self, rows: Rows) -> None:
        self._rows = rows
        self.cells = rows.view(CELL)
        """[capacity]; an entry of `cells_of` may be assigned to one of these."""
        self.capacity = len(rows)

    def reserve(self, size: int) -> None:
        """Have room for so many rows, and for as many again as there was room for."""
        if size > self.capacity:
            self._take(enlarged(self._rows, max(size, 2 * self.capacity)))

    def put(self, first: int, cells: NDArray[np.void]) -> None:
        """Fill rows from `first` on; `cells`: of type CELL."""
        end = first + len(cells)
        if end > self.capacity:
            self.reserve(end)
        self.cells[first:end] = cells

    def column(self, name: str) -> NDArray[Any] | None:
        """A field of ROW of all rows there is room for, as a view; None for raw logprobs that nobody asked for."""
        return None if name == "raw_logprobs" and not self._want_raw else self._rows[name]


def enlarged(array: NDArray[Any], size: int) -> NDArray[Any]:
    """A copy of `array` [n, ...] with `size` entries, new ones 0."""
    larger = np.zeros((size, *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger
