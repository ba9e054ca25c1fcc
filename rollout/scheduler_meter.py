"""What the scheduler has done so far, and what its ranks hold now."""

from __future__ import annotations

from collections import Counter

from zerokl.rollout.request import FinishReason
from zerokl.rollout.residents import Residents
from zerokl.rollout.step_plan import Refusal

COUNTERS = (
    "computed_tokens",
    "cached_tokens",
    "result_rows",
    "admissions",
    "preemptions",
    "handovers",
    *(f"refused_{refusal.value}" for refusal in Refusal),
    *("finished_stop", "finished_length", "finished_abort"),
)


class SchedulerMeter:
    """Counters that the scheduler keeps; any thread may read them, a step apart."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._counts: Counter[str] = Counter()

    def count_results(self, num_tokens: int, num_rows: int) -> None:
        """A rank has computed so many tokens in a step, and given so many rows of results."""
        self._counts["computed_tokens"] += num_tokens
        self._counts["result_rows"] += num_rows

    def count_admission(self, num_cached_tokens: int) -> None:
        """A request has joined, with so many tokens from the prefix cache."""
        self._counts["admissions"] += 1
        self._counts["cached_tokens"] += num_cached_tokens

    def count_preemption(self) -> None:
        """A request has lost its blocks."""
        self._counts["preemptions"] += 1

    def count_handover(self) -> None:
        """A request has moved to another rank."""
        self._counts["handovers"] += 1

    def count_refusal(self, refusal: Refusal) -> None:
        """One that waits, or all, could not join in a step."""
        self._counts[f"refused_{refusal.value}"] += 1

    def count_finish(self, reason: FinishReason) -> None:
        """A request has ended."""
        self._counts[f"finished_{reason}"] += 1

    def metrics(self, *, steps: int, waiting: int) -> dict[str, int]:
        """Gauges and counters since the start; refusals are counted per step and cause."""
        gauges: Counter[str] = Counter(steps=steps, waiting=waiting)
        for rank in self.rank_metrics():
            gauges.update(rank)
        return dict(gauges) | {name: self._counts[name] for name in COUNTERS}

    def rank_metrics(self) -> list[dict[str, int]]:
        """Gauges of each rank: the requests that run there and its KV blocks."""
        return [
            {
                "running": running.size,
                "free_blocks": kv_cache.num_free_blocks,
                "cached_blocks": kv_cache.num_cached_blocks,
                "total_blocks": kv_cache.num_blocks,
            }
            for running, kv_cache in zip(self._residents.running, self._residents.kv_caches, strict=True)
        ]
