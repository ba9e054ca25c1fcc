"""Requests between the queue and the ranks: those that join, move and are preempted."""

from __future__ import annotations

from zerokl.rollout.request import Request, RequestStatus
from zerokl.rollout.residents import Residents
from zerokl.rollout.scheduler_meter import SchedulerMeter
from zerokl.rollout.snapshot import Decision, Join
from zerokl.rollout.waiting_queue import WaitingQueue


class Transitions:
    """Carries out what was decided about who runs where; all of it is counted."""

    def __init__(self, residents: Residents, queue: WaitingQueue, meter: SchedulerMeter) -> None:
        self._residents = residents
        self._queue = queue
        self._meter = meter

    def carry_out(self, decision: Decision) -> None:
        """Preempt, grow, move and admit requests; what waits blocked is noted."""
        self._residents.share(decision)
        for number, rank in enumerate(decision.ranks):
            for request in rank.preempted:
                self.preempt(request)
            self._residents.grow(number, rank.grown)
        for move in decision.moves:
            self._residents.move(move)
            self._meter.count_handover()
        for outcome in decision.outcomes:
            if isinstance(outcome, Join):
                self._start_running(outcome)
            else:
                self._queue.note_blocked(outcome.request)

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks and put it first in the queue."""
        self._residents.stop(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self._queue.add_front(request)
        self._meter.count_preemption(request)

    def _start_running(self, join: Join) -> None:
        request = join.request
        self._residents.start(join)
        self._queue.remove(request)
        self._queue.note_joined(request)
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
        self._meter.count_admission(request)
