"""The requests that run on a rank, by weight set and in order of admission."""

from __future__ import annotations

from collections.abc import Iterable

from zerokl.rollout.request import Request


class RunningSet:
    """Adding and removing are O(1)."""

    __slots__ = ("_by_policy", "expected_tokens", "size")

    def __init__(self) -> None:
        self.size = 0
        self.expected_tokens = 0
        """Tokens of all members at their longest: known ones and those they may still sample."""
        self._by_policy: dict[str, dict[str, Request]] = {}

    def add(self, request: Request, admission: int) -> None:
        """Append as the most recently admitted; `admission` counts admissions over all ranks."""
        request.admission = admission
        self._by_policy.setdefault(request.policy, {})[request.request_id] = request
        self.size += 1
        self.expected_tokens += request.max_num_tokens

    def remove(self, request: Request) -> None:
        """Take out a member."""
        requests = self._by_policy[request.policy]
        del requests[request.request_id]
        if not requests:
            del self._by_policy[request.policy]
        self.size -= 1
        self.expected_tokens -= request.max_num_tokens

    def of(self, policy: str) -> Iterable[Request]:
        """The requests of a weight set, oldest admission first; not to be changed meanwhile."""
        return self._by_policy.get(policy, {}).values()

    def in_order(self) -> list[Request]:
        """All members, oldest admission first."""
        members = [request for requests in self._by_policy.values() for request in requests.values()]
        return sorted(members, key=lambda request: request.admission)

    def count(self, policy: str) -> int:
        """Members of one weight set."""
        return len(self._by_policy.get(policy, ()))

    def policies(self) -> list[str]:
        """Weight sets with a running request."""
        return list(self._by_policy)
