"""The engine's methods that say how it fares: metrics, health, and the mismatch KL of what the trainer reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.control import WeightSets
from zerokl.rollout.engine_loop import EngineLoop
from zerokl.rollout.expert_balance import ExpertBalance
from zerokl.rollout.kl import KLReport
from zerokl.rollout.mismatch import AlarmHook, MismatchMonitor, ReportedTokens
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.ranks import Ranks
from zerokl.rollout.scheduler import Scheduler
from zerokl.rollout.sleep import Sleep
from zerokl.rollout.weight_updates import WeightUpdates


class ObservationMethods:
    """The part of `RolloutEngine` that is observed; the engine makes the collaborators."""

    _balance: ExpertBalance
    _config: EngineConfig
    _facts: Sequence[Mapping[str, Any]]
    _loop: EngineLoop
    _mismatch: MismatchMonitor
    _ranks: Ranks
    _scheduler: Scheduler
    _sleep: Sleep
    _updates: WeightUpdates
    _weights: WeightSets

    def metrics(self) -> dict[str, float]:
        """Counters since the start, and sizes of now, all ranks together; `health` has what each rank holds.

        They are read without stopping the loop, so they may be a step apart.
        """
        failures = {"weight_update_failures": self._updates.num_failures}
        return {**self._loop.metrics(), **self._balance.metrics(), **self._ranks.metrics(), **failures}

    @property
    def rank_pids(self) -> list[int]:
        """The process of each rank now; one that is started anew has another."""
        return self._ranks.pids

    def health(self) -> dict[str, Any]:
        """State, cause of a failure, load, weight versions, errors of hooks, parts asleep, facts of the first worker.

        `ranks` holds of each rank its role, the worker's kind, pid and num_threads, the requests running there, its KV
        blocks and its tokens since the start.

        `inexact_weights` are the sets published as rounded otherwise than in the trainer's forward: the mismatch KL is
        not 0 under them. States are "running", "draining", "paused", "asleep", "failed" and "closed".
        """
        cause, state, roles = self._loop.cause, self._loop.state, self._config.rank_roles
        assert roles is not None, "an unresolved config"
        return {
            "state": "asleep" if state == "running" and self._sleep.parts else state,
            "cause": None if cause is None else repr(cause),
            "num_running": self._scheduler.num_running,
            "num_waiting": self._scheduler.num_waiting,
            "num_held": self._loop.num_held,
            "weight_versions": dict(self._weights.versions),
            "inexact_weights": sorted(self._weights.inexact),
            "hook_errors": self._updates.hooks.num_errors,
            "asleep": dict(self._sleep.parts),
            "worker": {**self._facts[0], "pid": self._ranks.pids[0]},
            "ranks": [
                {"rank": rank, "role": role, **facts, "pid": pid, **load}
                for rank, (role, facts, pid, load) in enumerate(
                    zip(roles, self._facts, self._ranks.pids, self._scheduler.rank_metrics(), strict=True)
                )
            ],
        }

    def describe_worker(self) -> dict[str, Any]:
        """Facts of the first rank's worker now: see `describe_ranks`."""
        return self.describe_ranks()[0]

    def describe_ranks(self) -> list[dict[str, Any]]:
        """Facts of each rank's worker now: kind, pid, num_threads, peak_rss_bytes of its process, weight versions by
        name."""
        return self._loop.at_boundary(self._ranks.describe).result()

    def telemetry(self) -> dict[str, Any]:
        """All that can be observed, at one moment and as plain data: what Prometheus and `rollout-top` are told.

        `metrics` and `health` as of the methods of these names; `version_tokens`: tokens sampled by version of the
        policy, the newest few, then those of "older" ones; `histograms`: `HistogramData` as dicts; `mismatch`: what was
        reported by `report_trainer_logprobs`.
        """
        return {
            "metrics": self.metrics(),
            "health": self.health(),
            "version_tokens": self._scheduler.meter.version_tokens(),
            "histograms": [histogram.to_wire() for histogram in self._loop.histograms()],
            "mismatch": self._mismatch.facts(),
        }

    def report_trainer_logprobs(
        self,
        rollouts: Rollout | Sequence[Rollout],
        logprobs: NDArray[np.float32] | Sequence[NDArray[np.float32]],
        *,
        version: int | None = None,
    ) -> KLReport:
        """Compare the trainer's own forward with the rollouts' `policy_logprobs`: the mismatch KL, exactly 0.0.

        `logprobs`: float32, an array [N] for each rollout of N tokens, or one of all tokens in the rollouts' order;
        what they hold for tokens that the policy did not sample (`Rollout.loss_mask`) does not count.
        `version`: of the weights that the forward had; None: the newest that sampled one of the tokens. Tokens of other
        versions, and of rollouts that are `inexact` or have `num_kept_updates`, are counted apart and never alarm: the
        report returned is about the others, or where there are none about all, with `inexact`.

        Above `EngineConfig.k3_alarm` it alarms: a warning in the log, a counter, the hooks of `on_k3_alarm`.
        Raises ValueError naming field, value and bound for arrays that do not fit the rollouts or are not finite.
        """
        return self._mismatch.report(ReportedTokens.of_rollouts(rollouts, logprobs), version)[0]

    def receive_trainer_logprobs(self, tokens: ReportedTokens, version: int | None) -> tuple[KLReport, bool]:
        """`report_trainer_logprobs` for a server: (report, whether it alarmed)."""
        return self._mismatch.report(tokens, version)

    def on_k3_alarm(self, hook: AlarmHook) -> Callable[[], None]:
        """Have `hook(KLReport)` called for each alarm, in the thread that reported; returns what removes it.

        What a hook raises is logged.
        """
        return self._mismatch.hooks.add(hook)
