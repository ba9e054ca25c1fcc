"""When a rank counts as lost though its process is there. Pure: no processes, no threads, no clock of its own.

Whoever watches calls `heard` for every sign of life and `look` at short intervals, with the time of one clock in
seconds. What went by while the watcher itself did not run (it was stopped, or got no processor) is held against nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

FaultKind = Literal["stall", "step_timeout"]

START_SECONDS = 20.0
"""For a process that was started: until its first sign of life, which comes once the interpreter is up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a rank that has not ended is of no use any more."""

    kind: FaultKind
    text: str
    """Follows "was killed: "."""


class Supervision:
    """Of `size` ranks. What it finds, it finds once: the rank is left alone until `started`."""

    def __init__(
        self,
        size: int,
        *,
        heartbeat_timeout: float,
        step_timeout_base: float,
        step_timeout_per_token: float,
        tick: float,
    ) -> None:
        """Seconds, as the fields of `EngineConfig`; `look` is meant to be called every `tick`."""
        self._heartbeat_timeout = heartbeat_timeout
        self._base, self._per_token = step_timeout_base, step_timeout_per_token
        self._tick = tick
        self._due: dict[int, float] = {}
        """When a rank has to be heard of."""
        self._has_begun = [False] * size
        self._step_end: float | None = None
        self._step_seconds = 0.0
        self._last_look: float | None = None

    def started(self, rank: int, now: float) -> None:
        """A process was started for the rank."""
        self._due[rank] = now + START_SECONDS
        self._has_begun[rank] = False

    def heard(self, rank: int, now: float) -> None:
        """A sign of life has come."""
        if rank in self._due:
            self._due[rank] = now + self._heartbeat_timeout
            self._has_begun[rank] = True

    def stopped(self, rank: int, now: float) -> None:
        """The rank's process was found stopped. One that is starting has no longer than another, then."""
        if rank in self._due and not self._has_begun[rank]:
            self._due[rank] = min(self._due[rank], now + self._heartbeat_timeout)

    def ended(self, rank: int) -> None:
        """The rank's process has ended: nothing more is expected of it."""
        self._due.pop(rank, None)

    def begin_step(self, num_tokens: int, now: float) -> None:
        """A step of so many tokens, all ranks together, was given to the ranks."""
        self._step_seconds = self._base + num_tokens * self._per_token
        self._step_end = now + self._step_seconds

    def end_step(self) -> None:
        """It is over, or the ranks were given up."""
        self._step_end = None

    def look(self, now: float, unanswered: Iterable[int] = ()) -> dict[int, Fault]:
        """The ranks that are lost. `unanswered` are those that have not done their part of the step that runs."""
        if self._last_look is not None and now - self._last_look > 2 * self._tick:
            self._put_off(now - self._last_look - self._tick)
        self._last_look = now
        faults: dict[int, Fault] = {}
        for rank, due in self._due.items():
            if now >= due:
                faults[rank] = Fault(kind="stall", text="it was stopped, or stuck: it gave no sign of life")
        if self._step_end is not None and now >= self._step_end:
            text = f"its step did not end within {self._step_seconds:g} s"
            late = [rank for rank in unanswered if rank in self._due and rank not in faults]
            faults |= {rank: Fault(kind="step_timeout", text=text) for rank in late}
        for rank in faults:
            self.ended(rank)
        return faults

    def _put_off(self, seconds: float) -> None:
        self._due = {rank: due + seconds for rank, due in self._due.items()}
        if self._step_end is not None:
            self._step_end += seconds
