"""The stations of a request's life, from the scheduler's view: how long each took, and a log line for each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import get_args

from zerokl.rollout.histogram import Histogram, HistogramData
from zerokl.rollout.request import FinishReason, Request
from zerokl.rollout.step_plan import Refusal

NOT_HELD, SIBLING, PREEMPTED = "none", "sibling", "preempted"
WAIT_REASONS = (
    *(refusal.value for refusal in Refusal if refusal is not Refusal.HANDOVER),
    NOT_HELD,
    SIBLING,
    PREEMPTED,
)
"""What a request waited for: the refusal that held it last, nothing, the first sample of its prompt, or to run again
after a preemption (then from the preemption on)."""

_logger = logging.getLogger(__name__)


class RequestLife:
    """Times and logs (level debug) what happens to requests. Called by the scheduler; any thread may read.

    No token, prompt or text is ever logged.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds, of the clock that arrival times are taken from."""
        self._clock = clock
        self._intake = Histogram()
        self._waits = {reason: Histogram() for reason in WAIT_REASONS}
        self._first_token = Histogram()
        self._lives = {reason: Histogram() for reason in get_args(FinishReason)}
        self._held: dict[str, tuple[str, int]] = {}
        """Weight set -> (refusal of the last plan, youngest arrival that it held)."""
        self._youngest = -1
        self._preempted_at: dict[str, float] = {}

    def received(self, request: Request) -> None:
        """It is queued, with its arrival time."""
        self._youngest = request.arrival
        self._intake.observe(self._clock() - request.arrival_time)
        if _logger.isEnabledFor(logging.DEBUG):
            event = "request resumed" if request.num_output_tokens else "request received"
            size = request.num_prompt_tokens
            _log(event, request, kind=request.kind, num_prompt_tokens=size, policy=request.policy)

    def held(self, refusals: Iterable[tuple[str, Refusal]]) -> None:
        """A plan is made, its joins carried out; these weight sets' requests that still wait were refused, and why."""
        self._held = {policy: (refusal.value, self._youngest) for policy, refusal in refusals}

    def admitted(self, request: Request) -> None:
        """It runs, for the first time or again."""
        now = self._clock()
        preempted_at = self._preempted_at.pop(request.request_id, None)
        reason = self._reason(request) if preempted_at is None else PREEMPTED
        seconds = now - (request.arrival_time if preempted_at is None else preempted_at)
        self._waits[reason].observe(seconds)
        if _logger.isEnabledFor(logging.DEBUG):
            cached = request.num_computed_tokens
            _log("request admitted", request, waited_for=reason, seconds=seconds, num_cached_tokens=cached)

    def preempted(self, request: Request) -> None:
        """It has lost its blocks and waits."""
        self._preempted_at[request.request_id] = self._clock()
        if _logger.isEnabledFor(logging.DEBUG):
            _log("request preempted", request, num_output_tokens=request.num_output_tokens)

    def first_token(self, request: Request) -> None:
        """It has sampled its first token."""
        if request.num_restarts:
            return
        seconds = self._clock() - request.arrival_time
        self._first_token.observe(seconds)
        if _logger.isEnabledFor(logging.DEBUG):
            _log("first token", request, seconds=seconds)

    def finished(self, request: Request, reason: FinishReason) -> None:
        """It has ended."""
        seconds = self._clock() - request.arrival_time
        self._lives[reason].observe(seconds)
        self._preempted_at.pop(request.request_id, None)
        if _logger.isEnabledFor(logging.DEBUG):
            event = "request aborted" if reason == "abort" else "request finished"
            _log(event, request, reason=reason, seconds=seconds, num_output_tokens=request.num_output_tokens)

    def histograms(self) -> list[HistogramData]:
        """Seconds from submission to the scheduler, to running by reason, to the first token, to the end by reason."""
        return [
            self._intake.data("intake_seconds"),
            *(wait.data("queue_wait_seconds", reason=reason) for reason, wait in self._waits.items()),
            self._first_token.data("time_to_first_token_seconds"),
            *(life.data("request_seconds", reason=reason) for reason, life in self._lives.items()),
        ]

    def _reason(self, request: Request) -> str:
        if not request.gathers:  # put at the front of the queue though never preempted: its group's leader was at work
            return SIBLING
        reason, youngest = self._held.get(request.policy, (NOT_HELD, -1))
        return reason if request.arrival <= youngest else NOT_HELD


def _log(event: str, request: Request, **fields: object) -> None:
    if request.rank >= 0:
        fields["rank"] = request.rank
    if request.num_output_tokens:
        fields["version"] = int(request.policy_versions[-1])
    _logger.debug(event, extra={"request_id": request.request_id, **fields})
