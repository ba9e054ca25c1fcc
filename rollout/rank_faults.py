"""How often ranks were lost, and what it took to have them back."""

from __future__ import annotations

from collections.abc import Iterable

from zerokl.rollout.supervision import Fault


class FaultMeter:
    """Counters since the start; one thread writes, any may read."""

    def __init__(self) -> None:
        self._deaths = self._stalls = self._step_timeouts = self._in_step = self._restarts = 0
        self._restart_seconds = 0.0

    def count_lost(self, faults: Iterable[Fault | None]) -> None:
        """Ranks were lost; None stands for a process that ended by itself."""
        for fault in faults:
            if fault is None:
                self._deaths += 1
            elif fault.kind == "stall":
                self._stalls += 1
            else:
                self._step_timeouts += 1

    def count_in_step(self, num_ranks: int) -> None:
        """So many of them were lost with a step in flight."""
        self._in_step += num_ranks

    def count_restarts(self, num_ranks: int, seconds: float) -> None:
        """Processes were started, and took this time to hold again what their ranks should."""
        self._restarts += num_ranks
        self._restart_seconds += seconds

    def metrics(self) -> dict[str, float]:
        """`rank_deaths`, `rank_stalls` and `rank_step_timeouts` by how ranks were lost; `rank_faults_in_step`;
        `rank_restarts`; `rank_restart_seconds`, summed."""
        return {
            "rank_deaths": self._deaths,
            "rank_stalls": self._stalls,
            "rank_step_timeouts": self._step_timeouts,
            "rank_faults_in_step": self._in_step,
            "rank_restarts": self._restarts,
            "rank_restart_seconds": self._restart_seconds,
        }
