"""A client's calls without an answer: which wait to be sent, which are with the server, which it had no room for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from itertools import chain

from zerokl.rollout.client_calls import PendingCall

_MAX_CALLS = 1024
"""In flight; below the server's own limit."""


class OpenCalls:
    """waiting -> in flight, under a number -> answered; or parked, where the server had no room, and waiting again.

    Of the link's thread.
    """

    def __init__(self) -> None:
        self._waiting: deque[PendingCall] = deque()
        """Not sent, or to be sent again under a new number."""
        self._in_flight: dict[int, PendingCall] = {}
        self._parked: deque[PendingCall] = deque()
        self._last_number = 0

    @property
    def in_flight(self) -> Collection[PendingCall]:
        """Those that are with the server, in the order in which they were sent."""
        return self._in_flight.values()

    def add(self, call: PendingCall) -> None:
        """A call is to be sent."""
        call.waits_since = time.monotonic()
        self._waiting.append(call)

    def next_to_send(self) -> PendingCall | None:
        """The next call that waits, now in flight; None where none does, or enough are."""
        if not self._waiting or len(self._in_flight) >= _MAX_CALLS:
            return None
        call = self._waiting.popleft()
        self._last_number += 1
        call.number = self._last_number
        self._in_flight[call.number] = call
        return call

    def find(self, number: int) -> PendingCall | None:
        """The call in flight of that number."""
        return self._in_flight.get(number)

    def answered(self, call: PendingCall) -> None:
        """A call in flight is none any more: it is the caller's to resolve."""
        del self._in_flight[call.number]

    def park(self, call: PendingCall) -> None:
        """The server had no room for a call in flight."""
        self.answered(call)
        self._parked.append(call)

    def unpark(self, count: int) -> None:
        """Try some calls again."""
        for _ in range(min(count, len(self._parked))):
            self._waiting.append(self._parked.popleft())

    def remove(self, call: PendingCall) -> None:
        """Forget a call, wherever it is: it is the caller's to resolve."""
        self._in_flight.pop(call.number, None)
        for calls in (self._waiting, self._parked):
            if call in calls:
                calls.remove(call)

    def waiting_since(self, instant: float) -> list[PendingCall]:
        """Those that have been open since then, in seconds of time.monotonic."""
        everything = chain(self._waiting, self._parked, self._in_flight.values())
        return [call for call in everything if call.waits_since < instant]

    def fail_in_flight(self, error: Exception) -> None:
        """Resolve those that are with the server."""
        calls, self._in_flight = list(self._in_flight.values()), {}
        for call in calls:
            call.fail(error)

    def fail_all(self, error: Exception) -> None:
        """Resolve all."""
        calls = [*self._waiting, *self._parked]
        self._waiting.clear()
        self._parked.clear()
        self.fail_in_flight(error)
        for call in calls:
            call.fail(error)
