"""The thread that watches the processes of all ranks: their ends, their signs of life, the time that a step takes."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Collection, Sequence

from zerokl.rollout.supervision import Supervision
from zerokl.rollout.worker_child import WorkerChild

TICK_SECONDS = 0.2
"""How often the thread looks at the clock; the end of a process wakes it at once."""


class RankWatch:
    """Kills what `Supervision` finds lost, and reports the end of each process, in a thread of its own.

    Methods may be called from any thread.
    """

    def __init__(
        self,
        children: Sequence[WorkerChild],
        supervision: Supervision,
        unanswered: Callable[[], Collection[int]],
        report: Callable[[WorkerChild], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`unanswered` gives the ranks that still work on the step; `report` must return soon."""
        self._children = list(children)
        self._supervision = supervision
        self._unanswered = unanswered
        self._report = report
        self._clock = clock
        self._lock = threading.Lock()
        self._reported: set[WorkerChild] = set()
        self._closing = False
        for child in children:
            supervision.started(child.rank, clock())
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="zerokl-rank-watch", daemon=True)
        self._thread.start()

    def replace(self, child: WorkerChild) -> None:
        """A new process has taken the place of a rank's; the old one's descriptors may be closed afterwards."""
        with self._lock:
            self._reported.discard(self._children[child.rank])
            self._children[child.rank] = child
            self._supervision.started(child.rank, self._clock())
        os.eventfd_write(self._wake, 1)

    def begin_step(self, num_tokens: int) -> None:
        """A step was given to the ranks."""
        with self._lock:
            self._supervision.begin_step(num_tokens, self._clock())

    def end_step(self) -> None:
        """All ranks are through with it."""
        with self._lock:
            self._supervision.end_step()

    def close(self) -> None:
        """End the thread; once."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._closing:
            with self._lock:
                watched = [child for child in self._children if child not in self._reported]
                poll = select.poll()
                for descriptor in [self._wake, *(fd for child in watched for fd in (child.pidfd, child.heartbeat))]:
                    poll.register(descriptor, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll(1000 * TICK_SECONDS)}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            for child in self._look(watched, ready):
                self._report(child)

    def _look(self, watched: Sequence[WorkerChild], ready: Collection[int]) -> list[WorkerChild]:
        """Take in what has come and kill what is lost; the children that have ended."""
        with self._lock:
            now = self._clock()
            # One that was replaced meanwhile may have closed its descriptors.
            current = [child for child in watched if self._children[child.rank] is child]
            for child in current:
                if child.heartbeat in ready and child.take_heartbeats():
                    self._supervision.heard(child.rank, now)
            for child in current:
                if child.is_stopped:
                    self._supervision.stopped(child.rank, now)
            ended = [child for child in current if child.pidfd in ready]
            for child in ended:
                self._supervision.ended(child.rank)
            self._reported.update(ended)
            for rank, fault in self._supervision.look(now, self._unanswered()).items():
                self._children[rank].condemn(fault)
        return ended
