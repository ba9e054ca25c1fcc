"""Sees every step that an engine applies, and can make the engine wait between two of them."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from typing import Any

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import EngineFailedError

PATIENCE_S = 120.0
GLANCE_S = 0.2


class StepWatch:
    """Wraps the scheduler's `update`, which is where a step's results are taken; make it before the first request.

    After `allow_first` the engine stops when so many steps are done, inside the last one, until `allow` or `open`.
    Whatever is submitted meanwhile is taken up before the next step: arrivals at a chosen step need no timing.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._changed = threading.Condition()
        self._permits = math.inf
        self._is_stopped = False
        self._first_seen: dict[str, int] = {}
        self._counts: Counter[str] = Counter()
        self.first_token_at: dict[str, float] = {}
        """Request id -> `time.perf_counter()` when its first token was in."""
        self.rank_tokens: Counter[int] = Counter()
        """Rank -> tokens computed."""
        self._engine = engine
        scheduler: Any = engine._scheduler
        self._update = scheduler.update
        scheduler.update = self._apply

    # -- the loop's thread --------------------------------------------------------------------------------------------
    def _apply(self, plan: Any, results: Any, ahead: Any) -> Any:
        finished = self._update(plan, results, ahead)
        self._count(plan)
        with self._changed:
            self._permits -= 1
            self._is_stopped = self._permits <= 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._permits > 0)
            self._is_stopped = False
        return finished

    def _count(self, plan: Any) -> None:
        now = time.perf_counter()
        entries = []
        for rank, part in enumerate(plan.ranks):
            self.rank_tokens[rank] += part.num_tokens
            self._counts["dummy_entries"] += not part.entries
            entries += part.entries
        fresh = [entry for entry in entries if entry.request_id not in self.first_token_at]
        joined = [entry.request_id for entry in entries if entry.request_id not in self._first_seen]
        self._counts["steps"] += 1
        self._counts["chunks"] += sum(entry.num_rows == 0 for entry in entries)
        self._counts["prefill_steps"] += any(entry.num_tokens > 1 for entry in entries) or bool(fresh)
        self._counts["late_joins"] += len(joined) if len(joined) < len(entries) else 0
        self._counts["max_batch"] = max(self._counts["max_batch"], len(entries))
        self._first_seen.update(dict.fromkeys(joined, plan.step))
        self.first_token_at.update({entry.request_id: now for entry in fresh if entry.num_rows})

    # -- any other thread ---------------------------------------------------------------------------------------------
    def factors(self) -> dict[str, float]:
        """What has happened: steps, chunks, prefill_steps, late_joins, dummy_entries, busy_ranks, max_batch.

        A chunk is a part of a prompt with more of it to come; a late join is a request that entered a step in which
        others were at work already; a dummy entry is a rank's part of a step without tokens.
        """
        return {**self._counts, "busy_ranks": sum(tokens > 0 for tokens in self.rank_tokens.values())}

    def allow_first(self, steps: int) -> None:
        """Stop after so many steps from now; the engine must be idle."""
        with self._changed:
            self._permits = steps

    def wait_stopped(self) -> None:
        """Until the engine has used up its permits. Raises EngineFailedError if it failed on the way."""
        deadline = time.perf_counter() + PATIENCE_S
        with self._changed:
            while not self._changed.wait_for(lambda: self._is_stopped, GLANCE_S):
                health = self._engine.health()
                if health["state"] == "failed":
                    raise EngineFailedError(health["cause"])
                assert time.perf_counter() < deadline, "the engine does not step"

    def allow(self, steps: int) -> None:
        """Let so many further steps pass, from where the engine is stopped."""
        with self._changed:
            assert self._is_stopped, "the engine is not stopped"
            self._permits = steps
            self._is_stopped = False
            self._changed.notify_all()

    def open(self) -> None:
        """Let all further steps pass."""
        with self._changed:
            self._permits = math.inf
            self._changed.notify_all()
