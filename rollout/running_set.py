"""Requests that hold KV blocks, by weight set and in order of admission."""

from __future__ import annotations

from zerokl.rollout.request import Request


class RunningSet:
    """Adding and removing are O(1); the most recently admitted request is found in O(weight sets)."""

    __slots__ = ("_by_policy", "_num_admissions", "size")

    def __init__(self) -> None:
        self.size = 0
        self._num_admissions = 0
        self._by_policy: dict[str, dict[str, Request]] = {}

    def add(self, request: Request) -> None:
        """Append as the most recently admitted."""
        request.admission = self._num_admissions
        self._num_admissions += 1
        self._by_policy.setdefault(request.policy, {})[request.request_id] = request
        self.size += 1

    def remove(self, request: Request) -> None:
        """Take out a member."""
        requests = self._by_policy[request.policy]
        del requests[request.request_id]
        if not requests:
            del self._by_policy[request.policy]
        self.size -= 1

    def of(self, policy: str) -> list[Request]:
        """The requests of a weight set, oldest admission first; a copy, safe against changes while it is walked."""
        return list(self._by_policy.get(policy, {}).values())

    def count(self, policy: str) -> int:
        """Members of one weight set."""
        return len(self._by_policy.get(policy, ()))

    def policies(self) -> list[str]:
        """Weight sets with a running request."""
        return list(self._by_policy)

    def latest(self) -> Request:
        """The most recently admitted request of all."""
        last_ones = [next(reversed(requests.values())) for requests in self._by_policy.values()]
        return max(last_ones, key=lambda request: request.admission)
