"""How much of the server's memory is promised, and to whom."""

from __future__ import annotations

import threading
from collections import Counter

from zerokl.rollout.protocol.failures import BusyError
from zerokl.rollout.server.limits import ServerLimits


class Ledger:
    """Bytes of all clients and sequences of each. Any thread may take and give back."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._requests: Counter[bytes] = Counter()
        self.queued_bytes = 0
        self.max_queued_bytes = 0
        """The most that was ever promised."""

    @property
    def is_roomy(self) -> bool:
        """Whether those who were refused should try again."""
        return 8 * self.queued_bytes <= 7 * self._limits.max_queued_bytes

    def take(self, client: bytes, nbytes: int, num_requests: int = 0) -> None:
        """Promise both to a client. Raises ValueError for more than could ever be, BusyError for more than is left."""
        limits = self._limits
        if nbytes > limits.max_queued_bytes:
            raise ValueError(
                f"the call and its results may take {nbytes} bytes, over max_queued_bytes ({limits.max_queued_bytes})"
            )
        if num_requests > limits.max_requests:
            raise ValueError(f"the call has {num_requests} sequences, over max_requests ({limits.max_requests})")
        with self._lock:
            if self.queued_bytes + nbytes > limits.max_queued_bytes:
                raise BusyError(f"{self.queued_bytes} bytes are queued, of at most {limits.max_queued_bytes}")
            if self._requests[client] + num_requests > limits.max_requests:
                raise BusyError(f"{self._requests[client]} sequences are in flight, of at most {limits.max_requests}")
            self._requests[client] += num_requests
            self.queued_bytes += nbytes
            self.max_queued_bytes = max(self.max_queued_bytes, self.queued_bytes)

    def give_back(self, client: bytes, nbytes: int, num_requests: int) -> None:
        """They are free again."""
        with self._lock:
            self.queued_bytes -= nbytes
            self._requests[client] -= num_requests
            assert self.queued_bytes >= 0 and self._requests[client] >= 0, "more was given back than taken"
            if not self._requests[client]:
                del self._requests[client]
