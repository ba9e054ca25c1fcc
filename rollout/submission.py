"""A call that is on its way: its future, and how to read what came of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from zerokl.rollout.control import Call

Result = TypeVar("Result")


class Submission(Generic[Result]):
    """A generate or score call in flight, or one that had nothing to compute."""

    def __init__(self, call: Call | None, read: Callable[[], Result]) -> None:
        self.call = call
        """None where there was nothing to compute."""
        self.read = read
        """The call's result, once `future` has resolved; may take milliseconds (text)."""
        self.future: Future[None] = _done() if call is None else call.future
        """Resolves when all requests are finished; must not be cancelled: abort `request_ids` instead."""

    @property
    def request_ids(self) -> list[str]:
        """What `abort` takes."""
        return [] if self.call is None else list(self.call.groups)


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
