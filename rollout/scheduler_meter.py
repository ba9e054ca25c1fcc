"""What the scheduler has done so far, and what its ranks hold now."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from zerokl.rollout.histogram import HistogramData
from zerokl.rollout.request import FinishReason, Request
from zerokl.rollout.request_life import RequestLife
from zerokl.rollout.residents import Residents
from zerokl.rollout.snapshot import Decision
from zerokl.rollout.step_plan import RankPlan, Refusal, StepPlan
from zerokl.rollout.version_tokens import VersionTokens

COUNTERS = (
    "received",
    "computed_tokens",
    "generated_tokens",
    "cached_tokens",
    "result_rows",
    "admissions",
    "preemptions",
    "handovers",
    *(f"refused_{refusal.value}" for refusal in Refusal),
    *("finished_stop", "finished_length", "finished_abort"),
)

_logger = logging.getLogger(__name__)


class SchedulerMeter:
    """Counters that the scheduler keeps; any thread may read them, a step apart."""

    def __init__(self, residents: Residents, clock: Callable[[], float]) -> None:
        """`clock`: seconds, of the clock that arrival times are taken from."""
        self._residents = residents
        self._counts: Counter[str] = Counter()
        self._life = RequestLife(clock)
        self._versions = VersionTokens()
        self._ranks = [Counter(computed_tokens=0, generated_tokens=0) for _ in residents.kv_caches]

    def count_received(self, request: Request) -> None:
        """A request is queued."""
        self._counts["received"] += 1
        self._life.received(request)

    def count_results(self, plan: StepPlan, rank_plan: RankPlan, num_generated: int) -> None:
        """A rank has computed its part of a step and sampled so many tokens in it."""
        self._counts["computed_tokens"] += rank_plan.num_tokens
        self._counts["result_rows"] += rank_plan.num_rows
        self._counts["generated_tokens"] += num_generated
        rank = self._ranks[rank_plan.rank]
        rank["computed_tokens"] += rank_plan.num_tokens
        rank["generated_tokens"] += num_generated
        if num_generated:
            self._versions.count(plan.policy_version, num_generated)

    def count_first_token(self, request: Request) -> None:
        """A request has sampled its first token."""
        self._life.first_token(request)

    def count_admission(self, request: Request) -> None:
        """A request has joined; what it has computed came from the prefix cache."""
        self._counts["admissions"] += 1
        self._counts["cached_tokens"] += request.num_computed_tokens
        self._life.admitted(request)

    def count_preemption(self, request: Request) -> None:
        """A request has lost its blocks."""
        self._counts["preemptions"] += 1
        self._life.preempted(request)

    def count_handover(self) -> None:
        """A request has moved to another rank."""
        self._counts["handovers"] += 1

    def count_refusals(
        self, decision: Decision, requests: Mapping[str, Request], waiting: Iterable[str], step: int
    ) -> None:
        """Those of a step's decision, once its joins are carried out.

        `requests`: all unfinished ones by id. `waiting`: weight sets with a request that could join.
        """
        held: list[tuple[str, Refusal]] = []
        for refusal, request_id in decision.refusals:
            self._counts[f"refused_{refusal.value}"] += 1
            if _logger.isEnabledFor(logging.DEBUG):
                named = {} if request_id is None else {"request_id": request_id}
                _logger.debug("refused", extra={"reason": refusal.value, "step": step, **named})
            if request_id is not None:
                held.append((requests[request_id].policy, refusal))
            else:
                runs = decision.policy if refusal is Refusal.POLICY else None
                held += [(policy, refusal) for policy in waiting if policy != runs]
        self._life.held((policy, refusal) for policy, refusal in held if refusal is not Refusal.HANDOVER)

    def count_finish(self, request: Request, reason: FinishReason) -> None:
        """A request has ended."""
        self._counts[f"finished_{reason}"] += 1
        self._life.finished(request, reason)

    def metrics(self, *, steps: int, waiting: int) -> dict[str, int]:
        """Gauges and counters since the start; refusals are counted per step and cause."""
        gauges: Counter[str] = Counter(steps=steps, waiting=waiting)
        for rank in self.rank_metrics():
            gauges.update(rank)
        return dict(gauges) | {name: self._counts[name] for name in COUNTERS}

    def rank_metrics(self) -> list[dict[str, int]]:
        """Of each rank the requests that run there, its KV blocks, and tokens since the start."""
        return [
            {
                "running": running.size,
                "free_blocks": kv_cache.num_free_blocks,
                "cached_blocks": kv_cache.num_cached_blocks,
                "total_blocks": kv_cache.num_blocks,
                **counts,
            }
            for running, kv_cache, counts in zip(
                self._residents.running, self._residents.kv_caches, self._ranks, strict=True
            )
        ]

    def version_tokens(self) -> dict[str, int]:
        """Tokens sampled by version of the weights: see `VersionTokens.tokens`."""
        return self._versions.tokens()

    def histograms(self) -> list[HistogramData]:
        """Durations in the lives of requests: see `RequestLife.histograms`."""
        return self._life.histograms()
