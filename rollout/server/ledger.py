"""How much of the server's memory is promised, and to whom."""

from __future__ import annotations

import threading

from zerokl.rollout.protocol.failures import BusyError
from zerokl.rollout.server.limits import ServerLimits


class Ledger:
    """Bytes of all clients. Any thread may take and give back."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limit = limits.max_queued_bytes
        self._lock = threading.Lock()
        self.queued_bytes = 0
        self.max_queued_bytes = 0
        """The most that was ever promised."""

    def take(self, nbytes: int) -> None:
        """Promise so many bytes. Raises ValueError for more than could ever be, BusyError for more than there is."""
        if nbytes > self._limit:
            raise ValueError(f"the call and its results may take {nbytes} bytes, over max_queued_bytes ({self._limit})")
        with self._lock:
            if self.queued_bytes + nbytes > self._limit:
                raise BusyError(f"{self.queued_bytes} bytes are queued, max_queued_bytes is {self._limit}")
            self.queued_bytes += nbytes
            self.max_queued_bytes = max(self.max_queued_bytes, self.queued_bytes)

    def give_back(self, nbytes: int) -> None:
        """They are free again."""
        with self._lock:
            self.queued_bytes -= nbytes
            assert self.queued_bytes >= 0, "more was given back than taken"
