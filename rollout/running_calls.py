"""Calls whose requests the scheduler has: from the inbox to the future that resolves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from zerokl.rollout.control import Call
from zerokl.rollout.errors import EngineAsleepError, reason_of
from zerokl.rollout.loop_inbox import LoopInbox
from zerokl.rollout.request import Request
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.stop import StopStrings

_logger = logging.getLogger(__name__)


class RunningCalls:
    """Knows the call of each unfinished request. Runs on the loop thread."""

    def __init__(
        self, scheduler: Scheduler, inbox: LoopInbox, stop_strings: StopStrings, check_awake: Callable[[], None]
    ) -> None:
        """`check_awake` raises EngineAsleepError where requests cannot run."""
        self._scheduler = scheduler
        self._inbox = inbox
        self._stop_strings = stop_strings
        self._check_awake = check_awake
        self._calls: dict[str, Call] = {}
        """Request id -> call."""

    def add(self, call: Call) -> None:
        """Hand the requests of a call to the scheduler; one that cannot run any more is resolved with the error."""
        added: list[Request] = []
        try:
            self._check_awake()
            for request in call.requests:
                self._scheduler.add(request, call.arrival_time)
                added.append(request)
        except (ValueError, EngineAsleepError) as error:  # weights were dropped or put away since the call was checked
            for request in added:
                self._scheduler.abort(request.request_id)
            self._inbox.release_ids(call)
            call.future.set_exception(error)
            return
        self._calls.update((request.request_id, call) for request in added)
        for name in call.aborted:
            self._abort_group(call.groups[name])

    def deliver(self, request: Request) -> None:
        """Hand a request that has ended to its call, and resolve the call with its last one."""
        call = self._calls.pop(request.request_id)
        text = self._stop_strings.take_text(request)
        if text is not None:
            call.texts[request.request_id] = text
        call.num_left -= 1
        if not call.num_left:
            self._inbox.release_ids(call)
            if call.error is None:
                call.future.set_result(None)
            else:
                call.future.set_exception(call.error)

    def refuse(self, request: Request, error: Exception) -> None:
        """End the call of a request that is in flight, with an error."""
        call = self._calls[request.request_id]
        call.error = error
        _logger.info("request rejected", extra={"request_id": request.request_id, "reason": reason_of(error)})
        for group in call.groups.values():
            self._abort_group(group)

    def abort(self, ids: Collection[str] | None) -> int:
        """Abort the requests of these ids, or all, those of the inbox included; returns how many."""
        num_aborted = 0
        for name, call in self._inbox.find(ids):
            group = call.groups[name]
            if any(request.request_id in self._calls for request in group):
                num_aborted += self._abort_group(group)
            elif not any(request.is_finished for request in group):
                call.aborted.add(name)
                num_aborted += len(group)
        for call in self._inbox.take_aborted():  # as a whole: they need not wait for a change before them
            self.add(call)
        return num_aborted

    def abort_generating(self) -> None:
        """Abort all requests that generate, and none that score."""
        self.abort([name for name, call in self._inbox.find(None) if call.requests[0].kind == "generate"])

    def _abort_group(self, group: list[Request]) -> int:
        aborted = [self._scheduler.abort(request.request_id) for request in group]
        finished = [request for request in aborted if request is not None]
        for request in finished:
            self.deliver(request)
        return len(finished)
