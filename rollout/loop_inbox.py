"""What callers have handed to the engine's loop: where their threads and the loop's meet, under one lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from zerokl.rollout.control import Call, Exclusive, settle
from zerokl.rollout.errors import EngineClosedError, EngineFailedError

Result = TypeVar("Result")


class LoopInbox:
    """Calls and changes in order, short actions ahead of them, the ids in use, and whether the loop has ended.

    Any thread may hand something over or ask; only the loop thread takes things out. `len` counts the calls and changes
    not yet taken up. An id is in use from the call's submission to its resolution. An ended inbox is never left again.
    """

    def __init__(self, check_awake: Callable[[], None], clock: Callable[[], float]) -> None:
        """`check_awake` raises EngineAsleepError where requests cannot run; `clock` gives seconds."""
        self.ended: Literal["failed", "closed"] | None = None
        self.cause: BaseException | None = None
        """What made the engine fail."""
        self._check_awake = check_awake
        self._clock = clock
        self._wake = threading.Condition()
        self._items: deque[Call | Exclusive] = deque()
        self._num_changes = 0
        self._urgent: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._open: dict[str, Call] = {}
        """Abort id -> call."""

    def __len__(self) -> int:
        return len(self._items)

    # -- any thread ---------------------------------------------------------------------------------------------------
    @property
    def num_changes(self) -> int:
        """Changes not yet taken up."""
        return self._num_changes

    @property
    def num_urgent(self) -> int:
        """Short actions that have not been run to their end."""
        return len(self._urgent)

    def submit(self, item: Call | Exclusive) -> None:
        """As `EngineLoop.submit`."""
        with self._wake:
            self.check_alive()
            if isinstance(item, Call):
                self._check_awake()
                item.arrival_time = self._clock()
                taken = next((name for name in item.groups if name in self._open), None)
                if taken is not None:
                    raise ValueError(f"request_ids: {taken!r} is the id of a request in flight")
                self._open.update(dict.fromkeys(item.groups, item))
            self._items.append(item)
            self._num_changes += isinstance(item, Exclusive)
            self._wake.notify()

    def at_boundary(self, action: Callable[[], Result]) -> Future[Result]:
        """As `EngineLoop.at_boundary`."""
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()
        with self._wake:
            self.check_alive()
            self._urgent.append((action, future))
            self._wake.notify()
        return future

    def close(self) -> None:
        """Take nothing more, and have the loop end after its current step."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def check_alive(self) -> None:
        """Raise EngineFailedError or EngineClosedError where the loop has ended, or is about to be."""
        if self.ended == "failed":
            raise EngineFailedError(f"the engine has failed: {self.cause!r}") from self.cause
        if self.ended == "closed" or self._closing:
            raise EngineClosedError("the engine is closed")

    # -- the loop thread ----------------------------------------------------------------------------------------------
    def wait(self, has_work: Callable[[], bool], until: float | None) -> bool:
        """Sleep until there is an urgent action or `has_work`; False when the loop is to end.

        `has_work` is asked again whenever something comes, and at the time `until` of the clock (None: no such time).
        """
        with self._wake:
            while not (self._closing or self._urgent or has_work()):
                self._wake.wait(None if until is None else min(until - self._clock(), threading.TIMEOUT_MAX))
            return not self._closing

    def run_urgent(self) -> None:
        """Run the short actions and resolve their futures; one that ends the loop stays, for `end` to resolve."""
        while self._urgent:
            action, future = self._urgent[0]
            settle(future, action)
            self._urgent.popleft()

    def take(self, *, only_changes: bool) -> Call | Exclusive | None:
        """The next item; with `only_changes` the next change, past the calls before it."""
        with self._wake:
            if only_changes:
                items = (item for item in self._items if isinstance(item, Exclusive))
                change = next(items, None) if self._num_changes else None
                if change is not None:
                    self._items.remove(change)
                    self._num_changes -= 1
                return change
            item = self._items.popleft() if self._items else None
            self._num_changes -= isinstance(item, Exclusive)
            return item

    def take_call(self) -> Call | None:
        """The next item if it is a call."""
        with self._wake:
            first = self._items[0] if self._items else None
            if not isinstance(first, Call):
                return None
            self._items.popleft()
            return first

    def take_aborted(self) -> list[Call]:
        """The calls of which every id was aborted before they were taken up."""
        with self._wake:
            items = list(self._items)
            done = [item for item in items if isinstance(item, Call) and len(item.aborted) == len(item.groups)]
            if done:
                self._items = deque(item for item in items if item not in done)
        return done

    def find(self, ids: Collection[str] | None) -> list[tuple[str, Call]]:
        """Those of these ids that are in use, or all, with their calls."""
        with self._wake:
            return [(name, self._open[name]) for name in (self._open if ids is None else ids) if name in self._open]

    def release_ids(self, call: Call) -> None:
        """The call is about to be resolved."""
        with self._wake:
            for name in call.groups:
                del self._open[name]

    def end(
        self, state: Literal["failed", "closed"], cause: BaseException | None
    ) -> tuple[list[Future[Any]], list[Exclusive]]:
        """Take nothing more and forget all; returns the futures of calls and actions, and the changes not begun."""
        with self._wake:
            self.cause = cause
            self.ended = state
            futures: list[Future[Any]] = [call.future for call in set(self._open.values())]
            futures += [future for _, future in self._urgent]
            changes = [item for item in self._items if isinstance(item, Exclusive)]
            self._items.clear()
            self._num_changes = 0
            self._urgent.clear()
            self._open.clear()
        return futures, changes
