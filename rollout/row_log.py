"""Rows of the latest steps that requests have not taken to themselves: written for all of them at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.growing_tokens import GrowingTokens
from zerokl.rollout.request import Request
from zerokl.rollout.results import CELL, Rows, enlarged

DEPTH = 64
"""Rows of a request that wait at most."""


class RowLog:
    """A lane for each request that decodes step after step.

    The fields and arrays of a thousand requests lie far apart in memory: to visit each of them costs more than what is
    written there. So a step writes its rows to lanes, and a request takes those of its own when anybody asks for them
    (`Request.settle`), when its lane is full and when it stops. On the thread of the scheduler alone.
    """

    def __init__(self) -> None:
        self._free: list[int] = []
        self._cells: NDArray[np.void] = np.zeros((0, DEPTH), CELL)
        self._tokens: NDArray[np.int32] = np.zeros((0, DEPTH), np.int32)
        self._pending: NDArray[np.int64] = np.zeros(0, np.int64)
        """[lanes], rows that wait."""
        self._left: NDArray[np.int64] = np.zeros(0, np.int64)
        """[lanes], tokens that the request may still draw."""
        self.cached_lens: NDArray[np.int32] = np.zeros(0, np.int32)
        """[lanes], `num_matched_tokens` of the request."""
        self._stops: Counter[frozenset[int]] = Counter()
        self._stop_ids: frozenset[int] = frozenset()
        """Of all requests that have a lane."""

    @staticmethod
    def serves(request: GrowingTokens) -> bool:
        """Whether nothing but its last token is to be looked at as it comes."""
        sampling = request.sampling
        return request.kind == "generate" and sampling.history is None and not sampling.has_stop_strings

    def enter(self, request: Request) -> None:
        """Give a lane to a running request that `serves`, whose rows from here on are those of single tokens."""
        if not self._free:
            self._grow()
        lane = self._free.pop()
        request.log, request.lane = self, lane
        self._left[lane] = request.max_num_tokens - request.num_tokens
        self.cached_lens[lane] = request.num_matched_tokens
        self._count_stops(request.sampling.stop_ids, 1)

    def leave(self, request: GrowingTokens) -> None:
        """Take the lane back; its rows are the request's before."""
        self.settle(request)
        self._free.append(request.lane)
        request.log, request.lane = None, -1
        self._count_stops(request.sampling.stop_ids, -1)

    def settle(self, request: GrowingTokens) -> None:
        """Have the request take the rows of its lane."""
        lane = request.lane
        pending = self._pending.item(lane)
        if pending:
            self._pending[lane] = 0
            request.store(self._tokens[lane, :pending], self._cells[lane, :pending])

    def write(
        self, members: Sequence[Request], lanes: NDArray[Any], tokens: NDArray[np.int32], rows: Rows
    ) -> list[int]:
        """A token and a row for each of these requests, whose lanes these are; all arrays are [n].

        Returns the places among them of those that may end with it, rising.
        """
        pending = self._pending[lanes]
        for index in np.flatnonzero(pending == DEPTH).tolist():
            self.settle(members[index])
            pending[index] = 0
        self._cells[lanes, pending] = rows.view(CELL)
        self._tokens[lanes, pending] = tokens
        self._pending[lanes] = pending + 1
        left = self._left[lanes] - 1
        self._left[lanes] = left
        for request in members:
            request.num_tokens += 1
            request.num_output_tokens += 1
        last: list[int] = np.flatnonzero(left == 0).tolist()
        stop_ids = self._stop_ids
        if stop_ids:
            stopped = {index for index, token in enumerate(tokens.tolist()) if token in stop_ids}
            last = sorted(stopped.union(last)) if stopped else last
        return last

    def _count_stops(self, stop_ids: frozenset[int], change: int) -> None:
        if not stop_ids:
            return
        self._stops[stop_ids] += change
        if self._stops[stop_ids] == max(change, 0):  # the first, or the last one
            self._stops += Counter()  # those of nobody are dropped
            self._stop_ids = frozenset().union(*self._stops)

    def _grow(self) -> None:
        old = len(self._pending)
        size = max(64, 2 * old)
        self._cells, self._tokens = enlarged(self._cells, size), enlarged(self._tokens, size)
        self._pending, self._left = enlarged(self._pending, size), enlarged(self._left, size)
        self.cached_lens = enlarged(self.cached_lens, size)
        self._free = list(range(size - 1, old - 1, -1))
