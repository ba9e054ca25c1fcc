"""The requests that run on a rank, by weight set and in order of admission, and what each of them lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from zerokl.rollout.request import Request
from zerokl.rollout.step_plan import PlanEntry


class _Members(NamedTuple):
    """The requests of one weight set, oldest admission first in both tables."""

    requests: dict[str, Request]
    next_entries: dict[str, PlanEntry | None]


class RunningSet:
    """Adding and removing are O(1).

    A step plans a thousand decoding requests, whose fields lie far apart in memory. So what the next step does with
    each is noted when it is moved forward (`advance`), while they are at hand, and planning reads one table.
    """

    __slots__ = ("_block_size", "_by_policy", "_resting", "_short", "expected_tokens", "size")

    def __init__(self, block_size: int) -> None:
        self.size = 0
        self.expected_tokens = 0
        """Tokens of all members at their longest: known ones and those they may still sample."""
        self._block_size = block_size
        self._by_policy: dict[str, _Members] = {}
        self._short: dict[str, Request] = {}
        self._resting: dict[str, Request] = {}

    def add(self, request: Request, admission: int) -> None:
        """Append as the most recently admitted; `admission` counts admissions over all ranks."""
        request.admission = admission
        self._by_policy.setdefault(request.policy, _Members({}, {})).requests[request.request_id] = request
        self.size += 1
        self.expected_tokens += request.max_num_tokens
        self.advance(request)

    def advance(self, request: Request) -> None:
        """Note how far a member is, after its tokens or the computed ones of them have become more.

        A token under way, which only the device has, counts: `compute_target` says so.
        """
        start, request_id = request.num_computed_tokens, request.request_id
        entry = None
        if start + 1 == request.compute_target:
            # The last known token always gives a row. Written so as a call of the class takes twice as long.
            entry = tuple.__new__(PlanEntry, (request_id, start, 1, 1))
            if start == request.num_blocks * self._block_size:
                self._short[request_id] = request
        self._by_policy[request.policy].next_entries[request_id] = entry

    def foresee(self, policy: str, entries: Sequence[PlanEntry], members: Sequence[Request | None]) -> None:
        """Note how far members of a weight set are once the step under way is over, of which these are the entries.

        Their computed tokens say so already. Who samples in it has one more token then, to be computed next; who has
        nothing more to compute rests. None for one that has left.
        """
        if policy not in self._by_policy:  # all have left
            return
        next_entries, block_size, short = self._by_policy[policy].next_entries, self._block_size, self._short
        make = tuple.__new__
        for (request_id, _, _, num_rows), request in zip(entries, members, strict=True):
            if request is None:
                continue
            start = request.num_computed_tokens
            if num_rows and start + 1 < request.max_num_tokens and request.kind == "generate":
                request.compute_target = start + 1
                next_entries[request_id] = make(PlanEntry, (request_id, start, 1, 1))
                if start == request.num_blocks * block_size:
                    short[request_id] = request
            elif start < request.compute_target:
                self.advance(request)
            else:
                self.rest(request)

    def rest(self, request: Request) -> None:
        """A member has nothing more to compute: it ends with the results that are under way."""
        self._short.pop(request.request_id, None)
        self._by_policy[request.policy].next_entries[request.request_id] = None
        self._resting[request.request_id] = request

    def note_grown(self, request: Request) -> None:
        """A member has got a block for its next token, perhaps before the result came that shows the need of it."""
        self._short.pop(request.request_id, None)

    def remove(self, request: Request) -> None:
        """Take out a member."""
        members = self._by_policy[request.policy]
        del members.requests[request.request_id], members.next_entries[request.request_id]
        self._short.pop(request.request_id, None)
        self._resting.pop(request.request_id, None)
        if not members.requests:
            del self._by_policy[request.policy]
        self.size -= 1
        self.expected_tokens -= request.max_num_tokens

    # -- questions ---------------------------------------------------------------------------------
    def of(self, policy: str) -> Mapping[str, Request]:
        """The requests of a weight set by id, oldest admission first; not to be changed meanwhile."""
        members = self._by_policy.get(policy)
        return members.requests if members else {}

    def next_entries(self, policy: str) -> Mapping[str, PlanEntry | None]:
        """By id in the same order what the next step computes of a request; None where it lacks several tokens, or
        rests.
        """
        members = self._by_policy.get(policy)
        return members.next_entries if members else {}

    @property
    def short(self) -> Mapping[str, Request]:
        """Those of all weight sets that lack a block for their next token."""
        return self._short

    @property
    def resting(self) -> Mapping[str, Request]:
        """Those of all weight sets that have nothing more to compute."""
        return self._resting

    def in_order(self) -> list[Request]:
        """All members, oldest admission first."""
        members = [request for group in self._by_policy.values() for request in group.requests.values()]
        return sorted(members, key=lambda request: request.admission)

    def count(self, policy: str) -> int:
        """Members of one weight set."""
        return len(self.of(policy))

    def policies(self) -> list[str]:
        """Weight sets with a running request."""
        return list(self._by_policy)

    def check_integrity(self) -> None:
        """Assert that what is noted here is what the requests say, between two steps."""
        assert not self._resting, f"{list(self._resting)} rest"
        for members in self._by_policy.values():
            assert list(members.requests) == list(members.next_entries), "the tables differ in order"
            for request_id, request in members.requests.items():
                start, target = request.num_computed_tokens, request.compute_target
                expected = PlanEntry(request_id, start, 1, 1) if target - start == 1 else None
                assert members.next_entries[request_id] == expected, f"{request_id}: not {expected}"
                is_short = target > request.num_blocks * self._block_size
                assert is_short == (request_id in self._short), f"{request_id}: short is {is_short}"
        assert all(any(name in group.requests for group in self._by_policy.values()) for name in self._short)
