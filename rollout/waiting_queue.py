"""Requests that hold no KV blocks: who is next, who waits for a sibling, and who has been overtaken too often."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice

from zerokl.rollout.request import Request


class WaitingQueue:
    """One FIFO per weight set, with groups parked behind their leader and ageing of blocked requests.

    Parking: of the samples of one prompt the first, the leader, enters its FIFO; the others are parked until the leader
    has computed the blocks that they share (`release_group`), then they enter at the front. So the shared part of the
    prompt is computed once, and a parked request never stands in the way of another one.

    Ageing: a request that was refused for want of blocks (`note_blocked`) may be overtaken by younger ones
    `max_overtakes` times; then it is `aged` and the only candidate, so the blocks it needs gather. No request is
    overtaken more often than that.

    Adding, removing and promoting are O(1); a request waits in exactly one place.
    """

    def __init__(self, max_overtakes: int) -> None:
        self._max_overtakes = max_overtakes
        self._queues: dict[str, OrderedDict[str, Request]] = {}
        self._parked: dict[str, OrderedDict[str, Request]] = {}
        self._leaders: dict[str, str] = {}
        self._blocked: dict[str, Request] = {}
        self._aged: Request | None = None
        self._tried: dict[str, int] = {}
        self._size = 0

    def __len__(self) -> int:
        """Waiting requests, parked ones included."""
        return self._size

    # -- entering and leaving ----------------------------------------------------------------------
    def add(self, request: Request, *, shareable_tokens: int) -> None:
        """At the end; or parked, if its group has a leader still at work on the prompt's `shareable_tokens`."""
        self._size += 1
        group = request.group_id
        if group is not None and group in self._leaders:
            self._parked[group][request.request_id] = request
            return
        if group is not None and shareable_tokens > 0:
            self._leaders[group] = request.request_id
            self._parked[group] = OrderedDict()
        self._queue(request.policy)[request.request_id] = request

    def add_front(self, request: Request) -> None:
        """Before all others: a preempted request, or a sibling whose group was released. It never waits for others."""
        self._size += 1
        request.gathers = False
        queue = self._queue(request.policy)
        queue[request.request_id] = request
        queue.move_to_end(request.request_id, last=False)

    def remove(self, request: Request) -> None:
        """Take out a waiting request, parked or not, for good or to run it."""
        group = request.group_id
        if group is not None and request.request_id in self._parked.get(group, ()):
            del self._parked[group][request.request_id]
        else:
            queue = self._queues[request.policy]
            del queue[request.request_id]
            if not queue:
                del self._queues[request.policy]
        self._size -= 1
        self._blocked.pop(request.request_id, None)
        if self._aged is request:
            self._aged = self._oldest_over_limit()

    # -- groups ------------------------------------------------------------------------------------
    @property
    def has_leaders(self) -> bool:
        """Whether any request leads a group."""
        return bool(self._leaders)

    def leads(self, request: Request) -> bool:
        """Whether siblings are parked, or would be, behind this request."""
        return request.group_id is not None and self._leaders.get(request.group_id) == request.request_id

    def release_group(self, leader: Request) -> None:
        """The leader has computed the shared blocks: its siblings enter at the front, in their order."""
        assert leader.group_id is not None and self.leads(leader)
        del self._leaders[leader.group_id]
        for sibling in reversed(self._parked.pop(leader.group_id).values()):
            self._size -= 1
            self.add_front(sibling)

    def replace_leader(self, leader: Request) -> None:
        """The leader is gone before it was done: the next sibling takes its place, at the front."""
        group = leader.group_id
        assert group is not None and self.leads(leader)
        parked = self._parked[group]
        if not parked:
            del self._leaders[group], self._parked[group]
            return
        request_id, successor = parked.popitem(last=False)
        self._leaders[group] = request_id
        self._size -= 1
        self.add_front(successor)

    # -- order -------------------------------------------------------------------------------------
    def policies(self) -> list[str]:
        """Weight sets with a request that could join, those parked left out: their leader stands for them."""
        return list(self._queues)

    def candidates(self, policy: str, limit: int) -> list[Request]:
        """Up to `limit` requests of a weight set, in the order in which to try them; the aged one stands alone."""
        if self._aged is not None:
            return [self._aged] if self._aged.policy == policy else []
        queue = self._queues.get(policy)
        return list(islice(queue.values(), limit)) if queue else []

    def gathers_since(self, policy: str) -> float | None:
        """When the first request of a weight set arrived, if all that could join are new; None if one is not.

        New: it has not been tried in a step that left without waiting (`note_tried`), nor run before.
        """
        queue = self._queues.get(policy)
        if not queue or self._aged is not None:
            return None
        first = next(iter(queue.values()))  # older ones and those put at the front stand before new ones
        is_new = first.gathers and first.arrival > self._tried.get(policy, -1)
        return first.arrival_time if is_new else None

    def note_tried(self, policy: str) -> None:
        """A step has taken from a weight set's queue what it could: those that still wait are not new any more."""
        queue = self._queues.get(policy)
        if queue:
            self._tried[policy] = max(self._tried.get(policy, -1), next(reversed(queue.values())).arrival)

    @property
    def blocked(self) -> Mapping[str, Request]:
        """Requests that were refused for want of blocks; their `num_overtaken` counts."""
        return self._blocked

    @property
    def aged(self) -> Request | None:
        """The request that was overtaken `max_overtakes` times, if there is one: nobody joins before it."""
        return self._aged

    def note_blocked(self, request: Request) -> None:
        """It was refused for want of blocks: from now on younger requests that join count as overtaking it."""
        self._blocked[request.request_id] = request

    def note_joined(self, request: Request) -> None:
        """It runs now (after `remove`): blocked requests that are older have been overtaken once more."""
        for other in self._blocked.values():
            if other.arrival < request.arrival:
                other.num_overtaken += 1
        request.num_overtaken = 0
        self._aged = self._oldest_over_limit()

    def _oldest_over_limit(self) -> Request | None:
        over = [request for request in self._blocked.values() if request.num_overtaken >= self._max_overtakes]
        return min(over, key=lambda request: request.arrival, default=None)

    def _queue(self, policy: str) -> OrderedDict[str, Request]:
        return self._queues.setdefault(policy, OrderedDict())
